"""Loads inside a step, planned by the connector's half in vLLM's scheduler."""

import pytest

from kvbm.config import load_config
from kvbm.logic.operations import Direction
from kvbm.runtime.leader import Leader
from tests.engine.scheduler_tools import BLOCK, NAMESPACE, SLOTS, Scheduler, decode, hashes_of, make_request


def test_a_load_waits_where_no_rank_can_load_in_step() -> None:
    scheduler = Scheduler()
    scheduler.store(make_request("a"))
    assert scheduler.side.match(make_request("b"), 0) == (2 * BLOCK, True)


@pytest.mark.parametrize(
    ("can", "offered"),
    [((True, True), True), ((True, False), False), ((False, True), False), ((False, False), False)],
)
def test_in_step_only_where_all_ranks_can(can: tuple[bool, bool], offered: bool) -> None:
    scheduler = Scheduler(ranks=2, in_step=can)
    first, second = make_request("a"), make_request("b")
    scheduler.admit(first, [5, 6, 7])
    for operation in scheduler.run({first: 10}, new=(first,)).operations:
        scheduler.report(operation, rank=0)
        scheduler.report(operation, rank=1)
    scheduler.side.finish(first, [[5, 6, 7]])
    scheduler.step()

    assert scheduler.admit(second, [11, 12, 13]) == 2 * BLOCK
    assert second.waits is not offered
    (load,) = scheduler.step({second: 2} if offered else None, new=(second,)).operations
    assert load.in_step is offered


def test_nothing_is_offered_before_all_ranks_are_ready() -> None:
    scheduler = Scheduler(ranks=2, in_step=(True, True))
    fresh = Leader(
        load_config(environ={}, host__num_blocks=SLOTS),
        namespace=NAMESPACE,
        block_size=BLOCK,
        num_slots=SLOTS,
        ranks=2,
    )
    assert not fresh.loads_in_step
    fresh.receive([scheduler.report_of(0)])
    assert not fresh.loads_in_step
    fresh.receive([scheduler.report_of(1)])
    assert fresh.loads_in_step
    fresh.off_reason = "test"
    assert not fresh.loads_in_step


def test_the_order_of_a_load_in_step() -> None:
    scheduler, request = Scheduler(in_step=(True,)), make_request("b", tokens=14)
    scheduler.store(make_request("a", tokens=14))
    assert scheduler.admit(request, [11, 12, 13, 14]) == 3 * BLOCK
    assert request.waits is False
    orders = scheduler.step({request: 2}, new=(request,))
    (load,) = orders.operations
    assert (load.direction, load.in_step, orders.tokens) == (Direction.ONBOARD, True, 2)
    assert load.device_blocks.tolist() == [11, 12, 13]
    assert load.host_slots.tolist() == scheduler.leader.pool.find(hashes_of(request)).tolist()


def test_load_in_step_behind_blocks_on_the_device() -> None:
    scheduler, request = Scheduler(in_step=(True,)), make_request("b", tokens=14)
    scheduler.store(make_request("a", tokens=14))
    assert scheduler.admit(request, [11, 12, 13, 14], device_hit=BLOCK) == 2 * BLOCK
    assert request.waits is False
    (load,) = scheduler.step({request: 2}, new=(request,)).operations
    assert load.device_blocks.tolist() == [12, 13]
    assert load.host_slots.tolist() == scheduler.leader.pool.find(hashes_of(request)).tolist()[1:]


def test_what_a_request_computes_behind_its_load_is_stored() -> None:
    scheduler, request = Scheduler(in_step=(True,)), make_request("b", tokens=18)
    scheduler.store(make_request("a", tokens=9))
    assert scheduler.admit(request, [11, 12, 13, 14, 15]) == 2 * BLOCK
    orders = scheduler.step({request: 10}, new=(request,))
    assert [operation.in_step for operation in orders.operations] == [True]
    assert scheduler.stored(scheduler.step(), request) == {2: 13, 3: 14}


def test_the_second_request_of_a_step_waits_for_its_load() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"), make_request("b", first=5000))
    first, second, third = make_request("c"), make_request("d", first=5000), make_request("e")
    scheduler.admit(first, [11, 12, 13])
    scheduler.admit(second, [21, 22, 23])
    scheduler.admit(third, [31, 32, 33])
    assert [request.waits for request in (first, second, third)] == [False, True, True]
    orders = scheduler.step({first: 2}, new=(first,))
    assert [(load.request_id, load.in_step) for load in orders.operations] == [
        ("c", True),
        ("d", False),
        ("e", False),
    ]


def test_asked_again_without_room_the_request_is_still_offered_a_load_in_step() -> None:
    """vLLM asks in every step until it finds device blocks for the request; only then it is allocated."""
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    for _ in range(3):
        assert scheduler.side.match(request, 0) == (2 * BLOCK, False)
        assert scheduler.step().operations == []
    assert scheduler.admit(request, [11, 12, 13]) == 2 * BLOCK
    assert request.waits is False


def test_the_offer_follows_the_state_of_the_engine() -> None:
    """An offer that vLLM did not take binds nobody: what counts is the last answer."""
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"))
    request, other = make_request("b"), make_request("c", first=5000)
    assert scheduler.side.match(request, 0) == (2 * BLOCK, False)
    scheduler.admit(other, [31, 32, 33])
    scheduler.step({other: 10}, new=(other,))
    assert scheduler.admit(request, [11, 12, 13]) == 2 * BLOCK
    assert request.waits is True
    loads = [load for load in scheduler.step({other: 1}).operations if load.request_id]
    assert [load.in_step for load in loads] == [False]


def test_a_pipeline_is_busy_with_requests_that_the_last_step_has_not() -> None:
    """vLLM plans empty steps while a request is in both stages."""
    scheduler = Scheduler(in_step=(True,), steps_in_flight=2)
    scheduler.store(make_request("a"))
    runs, request = make_request("runs", first=5000), make_request("b")
    scheduler.admit(runs, [31, 32, 33])
    scheduler.step({runs: 10}, new=(runs,))
    scheduler.step()
    assert scheduler.side.match(request, 0) == (2 * BLOCK, True)
    scheduler.step()
    assert scheduler.side.match(request, 0) == (2 * BLOCK, False)
    scheduler.step({runs: 1})
    scheduler.side.finish(runs, [[31, 32, 33]])
    assert scheduler.side.match(request, 0) == (2 * BLOCK, False)


def test_a_load_waits_while_another_request_runs() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"))
    runs = make_request("runs", first=5000)
    scheduler.admit(runs, [31, 32, 33])
    scheduler.step({runs: 10}, new=(runs,))
    assert scheduler.side.match(make_request("b"), 0) == (2 * BLOCK, True)
    decode(runs)
    scheduler.step({runs: 1})
    assert scheduler.side.match(make_request("c"), 0) == (2 * BLOCK, True)
    scheduler.side.finish(runs, [[31, 32, 33]])
    assert scheduler.side.match(make_request("d"), 0) == (2 * BLOCK, False)


def test_a_request_that_is_not_cached_keeps_the_engine_busy_too() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"))
    stranger = make_request("stranger", first=5000)
    stranger.prompt_embeds = object()
    scheduler.admit(stranger, [31, 32, 33])
    scheduler.step({stranger: 10}, new=(stranger,))
    assert scheduler.side.match(make_request("b"), 0) == (2 * BLOCK, True)
    scheduler.side.finish(stranger, [[31, 32, 33]])
    assert scheduler.side.match(make_request("b"), 0) == (2 * BLOCK, False)


def test_a_load_waits_while_another_request_waits_for_its_load() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"))
    runs, waits = make_request("runs", first=5000), make_request("waits")
    scheduler.admit(runs, [31, 32, 33])
    scheduler.step({runs: 10}, new=(runs,))
    scheduler.admit(waits, [11, 12, 13])
    assert waits.waits is True
    loads = [load for load in scheduler.step({runs: 1}).operations if load.direction == Direction.ONBOARD]
    scheduler.side.finish(runs, [[31, 32, 33]])
    scheduler.step()
    assert scheduler.side.match(make_request("b"), 0) == (2 * BLOCK, True)
    scheduler.report(loads[0])
    assert scheduler.side.match(make_request("c"), 0) == (2 * BLOCK, False)


def test_idle_again_after_a_preemption() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a"))
    runs = make_request("runs")
    scheduler.admit(runs, [11, 12, 13])
    assert runs.waits is False
    (load,) = scheduler.step({runs: 2}, new=(runs,)).operations
    scheduler.report(load)
    runs.num_computed_tokens = 0
    scheduler.step(preempted=(runs,))
    assert scheduler.admit(runs, [21, 22, 23]) == 2 * BLOCK
    assert runs.waits is False
    (load,) = scheduler.step({runs: 2}, resumed=(runs,), blocks={"runs": [21, 22, 23]}).operations
    assert (load.in_step, load.device_blocks.tolist()) == (True, [21, 22])


@pytest.mark.parametrize(
    ("tokens", "stored", "offered"),
    [
        (3 * BLOCK, 3, 2),  # whole blocks, all of them in the host tier
        (3 * BLOCK, 2, 2),
        (3 * BLOCK + 1, 3, 3),
        (3 * BLOCK - 1, 2, 2),
        (BLOCK, 1, 0),
        (BLOCK - 1, 0, 0),
    ],
)
def test_a_step_has_a_token_left_to_compute(tokens: int, stored: int, offered: int) -> None:
    """The last token has to be computed for its logits, whether the request waits for its load or not."""
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a", tokens=max(stored * BLOCK, 1)))
    assert scheduler.side.match(make_request("idle", tokens=tokens), 0) == (offered * BLOCK, False)
    runs = make_request("runs", first=5000)
    scheduler.admit(runs, [31, 32, 33])
    scheduler.step({runs: 10}, new=(runs,))
    busy = scheduler.side.match(make_request("busy", tokens=tokens), 0)
    assert busy == (offered * BLOCK, offered > 0)


def test_a_token_is_left_to_compute_behind_blocks_on_the_device() -> None:
    scheduler = Scheduler(in_step=(True,))
    scheduler.store(make_request("a", tokens=3 * BLOCK))
    assert scheduler.side.match(make_request("b", tokens=3 * BLOCK), BLOCK) == (BLOCK, False)
    assert scheduler.side.match(make_request("c", tokens=3 * BLOCK), 2 * BLOCK) == (0, False)
    assert scheduler.side.match(make_request("d", tokens=3 * BLOCK), 3 * BLOCK) == (0, False)


def test_a_request_that_is_offered_nothing_is_computed() -> None:
    scheduler, request = Scheduler(in_step=(True,)), make_request("b", tokens=BLOCK)
    scheduler.store(make_request("a", tokens=BLOCK))
    assert scheduler.admit(request, [11]) == 0
    orders = scheduler.step({request: BLOCK}, new=(request,))
    orders.operations += scheduler.step().operations
    assert orders.operations == []  # nothing to load, and the host has what it computes
    assert scheduler.pinned() == 1
    scheduler.side.finish(request, [[11]])
    assert scheduler.pinned() == 0


def test_the_completion_of_a_load_in_step_releases_its_pins() -> None:
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    assert scheduler.pinned() == 0
    scheduler.admit(request, [11, 12, 13])
    (load,) = scheduler.step({request: 2}, new=(request,)).operations
    assert scheduler.pinned() == 2  # of the load
    assert scheduler.step().operations == []
    assert scheduler.pinned() == 2 + 2  # and of the request that uses the blocks
    assert scheduler.leader.stats.onboarded_blocks == 0
    scheduler.report(load)
    assert scheduler.pinned() == 2
    assert scheduler.leader.stats.onboarded_blocks == 2
    scheduler.side.finish(request, [[11, 12, 13]])
    assert (scheduler.pinned(), scheduler.pool.in_use(), scheduler.side.has_work) == (0, {}, False)


@pytest.mark.parametrize("tokens_out", [0, 1])
def test_request_ends_while_its_load_in_step_is_under_way(tokens_out: int) -> None:
    """On a GPU the step is over for the scheduler when the copy is, but its report comes a step later.

    tokens_out: 0 is an abort.
    """
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    scheduler.admit(request, [11, 12, 13])
    (load,) = scheduler.step({request: 2}, new=(request,)).operations
    if tokens_out:
        decode(request, tokens_out)
    scheduler.side.finish(request, [[11, 12, 13]])
    # The engine may give the device blocks to others: what these do is ordered behind the load.
    assert scheduler.pool.in_use() == {}
    assert scheduler.pinned() > 0  # the copy reads the host blocks
    assert scheduler.side.has_work
    # and is idle: the next request does not wait
    assert scheduler.side.match(make_request("c"), 0) == (2 * BLOCK, False)
    scheduler.report(load)
    assert (scheduler.pinned(), scheduler.side.has_work) == (0, False)
    assert scheduler.visible(request) == 2


def test_request_aborted_before_its_load_in_step_was_ordered() -> None:
    """The load goes out all the same, with the next step, and is accounted for."""
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    scheduler.admit(request, [11, 12, 13])
    request.num_computed_tokens = 0
    scheduler.side.finish(request, [[11, 12, 13]])
    for load in scheduler.step().operations:
        scheduler.report(load)
    assert (scheduler.pinned(), scheduler.pool.in_use(), scheduler.side.has_work) == (0, {}, False)


def test_a_load_in_step_that_can_not_be_planned_is_ordered_to_fail_in_step() -> None:
    """The request is in the step already: vLLM waits for no load of it."""
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    assert scheduler.side.match(request, 0) == (2 * BLOCK, False)
    scheduler.leader.off_reason = "test"
    scheduler.side.allocated(request, [[11, 12, 13]], 2 * BLOCK)
    (load,) = scheduler.step({request: 2}, new=(request,)).operations
    assert (load.in_step, load.device_blocks.tolist(), load.host_slots.tolist()) == (True, [11, 12], [-1, -1])


def test_all_ranks_must_have_loaded_in_step() -> None:
    scheduler = Scheduler(ranks=2, in_step=(True, True))
    first, second = make_request("a"), make_request("b")
    scheduler.admit(first, [5, 6, 7])
    for operation in scheduler.run({first: 10}, new=(first,)).operations:
        scheduler.report(operation, rank=0)
        scheduler.report(operation, rank=1)
    scheduler.side.finish(first, [[5, 6, 7]])
    scheduler.step()
    scheduler.admit(second, [11, 12, 13])
    (load,) = scheduler.step({second: 2}, new=(second,)).operations
    scheduler.side.finish(second, [[11, 12, 13]])
    scheduler.report(load, rank=1)
    assert scheduler.pinned() > 0
    scheduler.report(load, rank=0)
    assert scheduler.pinned() == 0


def test_a_request_whose_load_in_step_failed_is_left_alone() -> None:
    """The next step was planned on top of it: what comes of the request is not to be trusted."""
    scheduler, request = Scheduler(in_step=(True,)), make_request("b")
    scheduler.store(make_request("a"))
    scheduler.admit(request, [11, 12, 13])
    (load,) = scheduler.step({request: 2}, new=(request,)).operations
    scheduler.report(load, failed=True)
    assert scheduler.visible(request) == 0
    request.num_computed_tokens = 0  # vLLM computes it again, in the same device blocks
    assert scheduler.side.match(request, 0) == (0, False)
    scheduler.step({request: 10})
    scheduler.side.finish(request, [[11, 12, 13]])
    orders = scheduler.step()
    assert scheduler.stored(orders, request) == {}
    assert (scheduler.pinned(), scheduler.visible(request), scheduler.pool.in_use()) == (0, 0, {})


def test_blocks_computed_from_a_failed_load_in_step_do_not_become_visible() -> None:
    """They were computed in the same step from what was not there."""
    scheduler, request = Scheduler(in_step=(True,)), make_request("b", tokens=18)
    scheduler.store(make_request("a", tokens=9))
    scheduler.admit(request, [11, 12, 13, 14, 15])
    (load,) = scheduler.step({request: 10}, new=(request,)).operations
    (offload,) = scheduler.step().operations  # planned before the load is reported
    assert (load.in_step, offload.device_blocks.tolist()) == (True, [13, 14])
    scheduler.report(load, failed=True)
    # vLLM computes the request again from the first block that failed, in the same device blocks.
    request.num_computed_tokens = 0
    scheduler.report(offload)
    own = scheduler.leader.pool.find(hashes_of(request))
    assert (own[2:4] < 0).all(), "the wrong bytes have the name of the right ones"
