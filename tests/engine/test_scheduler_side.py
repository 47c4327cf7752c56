"""The connector's half in the scheduler, with the calls that vLLM's scheduler makes, and no engine."""

from typing import Any

import pytest

from kvbm.logic.operations import Direction
from kvbm.vllm_integration import scheduler as scheduler_module
from tests.engine.scheduler_tools import BLOCK, FakeRequest, Scheduler, decode, hashes_of, make_request


def test_chunked_prefill_and_decode() -> None:
    scheduler, request = Scheduler(), make_request(tokens=10)
    assert scheduler.admit(request, [5, 6]) == 0
    assert scheduler.step({request: 6}, new=(request,)).operations == []
    assert scheduler.stored(scheduler.step({request: 4}, blocks={"r": [9]}), request) == {0: 5}
    decode(request)
    assert scheduler.stored(scheduler.step({request: 1}), request) == {1: 6}
    decode(request)
    assert scheduler.step({request: 1}).operations == []
    decode(request)  # 13 tokens: block 2 is full and computed by now
    assert scheduler.step({request: 1}, blocks={"r": [3]}).operations == []
    steps = [scheduler.step() for _ in range(scheduler_module._STEPS_TOGETHER)]
    assert [scheduler.stored(orders, request) for orders in steps] == [*[{}] * (len(steps) - 1), {2: 9}]


def decoding(scheduler: Scheduler, count: int) -> list[FakeRequest]:
    """Requests whose next token fills a block; what they have computed before is stored."""
    requests = [make_request(f"r{i}", tokens=2 * BLOCK - 1, first=100 * i) for i in range(count)]
    for i, request in enumerate(requests):
        assert scheduler.admit(request, [2 * i, 2 * i + 1]) == 0
    scheduler.step({request: request.num_tokens for request in requests}, new=tuple(requests))
    assert len(scheduler.step().operations) == 1
    for request in requests:
        decode(request)
    return requests


def fill(scheduler: Scheduler, request: FakeRequest, block: int) -> int:
    """A step in which a request goes on to another block; how many blocks its orders store."""
    scheduler.step({request: 1})
    decode(request)
    orders = scheduler.step({request: 1}, blocks={request.request_id: [block]})
    return sum(len(operation.host_slots) for operation in orders.operations)


def test_blocks_that_fill_one_by_one_are_stored_together() -> None:
    scheduler = Scheduler()
    first, second, third = decoding(scheduler, 3)
    assert (fill(scheduler, first, 41), fill(scheduler, second, 42)) == (0, 0)
    counts = [len(scheduler.stored(scheduler.step(), first)) for _ in range(scheduler_module._STEPS_TOGETHER)]
    assert counts.index(1) == scheduler_module._STEPS_TOGETHER - 3  # two steps were over
    assert scheduler.leader.queued[0] == 3 + 2
    # The next ones wait anew. A request that ends waits for none: its blocks are about to be freed.
    assert fill(scheduler, third, 43) == 0
    scheduler.side.finish(third, [[4, 5, 43]])
    (operation,) = scheduler.step().operations
    assert operation.device_blocks.tolist() == [5]


def test_blocks_of_many_requests_do_not_wait() -> None:
    scheduler = Scheduler()
    requests = decoding(scheduler, scheduler_module._STORED_TOGETHER)
    scheduler.step(dict.fromkeys(requests, 1))
    for request in requests:
        decode(request)
    blocks = {request.request_id: [40 + i] for i, request in enumerate(requests)}
    assert scheduler.step(dict.fromkeys(requests, 1), blocks=blocks).operations == []
    (operation,) = scheduler.step().operations
    assert len(operation.host_slots) == len(requests)


def test_blocks_that_wait_go_with_a_prompt() -> None:
    scheduler = Scheduler()
    (request,) = decoding(scheduler, 1)
    assert fill(scheduler, request, 41) == 0
    prompt = make_request("prompt", tokens=2 * BLOCK, first=5000)
    assert scheduler.admit(prompt, [51, 52]) == 0
    assert scheduler.step({prompt: 2 * BLOCK, request: 1}, new=(prompt,)).operations == []
    (operation,) = scheduler.step().operations
    assert sorted(operation.device_blocks.tolist()) == [1, 51, 52]


def test_blocks_in_flight_are_not_matched() -> None:
    scheduler, request = Scheduler(), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.run({request: 10}, new=(request,)).operations
    assert scheduler.visible(request) == 0
    scheduler.report(operation)
    assert scheduler.visible(request) == 2


def test_all_ranks_must_have_written() -> None:
    scheduler, request = Scheduler(ranks=2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.run({request: 10}, new=(request,)).operations
    scheduler.report(operation, rank=0)
    assert scheduler.visible(request) == 0
    scheduler.report(operation, rank=0)  # twice the same is not both
    assert scheduler.visible(request) == 0
    scheduler.report(operation, rank=1)
    assert scheduler.visible(request) == 2


def test_a_rank_that_failed_withdraws_the_block() -> None:
    scheduler, request = Scheduler(ranks=2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.run({request: 10}, new=(request,)).operations
    scheduler.report(operation, rank=1)
    scheduler.report(operation, rank=0, failed=True)
    assert scheduler.visible(request) == 0


def test_nothing_is_stored_while_a_load_is_under_way() -> None:
    """vLLM counts the tokens of a load as computed when it starts."""
    scheduler, first = Scheduler(), make_request("a", tokens=13)
    scheduler.admit(first, [5, 6, 7, 8])
    (operation,) = scheduler.run({first: 13}, new=(first,)).operations
    scheduler.report(operation)
    scheduler.side.finish(first, [[5, 6, 7, 8]])

    second = make_request("b", tokens=21)
    assert scheduler.admit(second, [11, 12, 13, 14, 15, 16]) == 12
    orders = scheduler.step()
    assert [operation.direction for operation in orders.operations] == [Direction.ONBOARD]
    assert orders.operations[0].device_blocks.tolist() == [11, 12, 13]
    second.num_computed_tokens = 20  # as if more had been counted
    scheduler.side.finish(second, [[11, 12, 13, 14, 15, 16]])  # aborted
    assert scheduler.step().operations == []
    scheduler.report(orders.operations[0])
    assert scheduler.pool.in_use() == {}


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("same_step", [False, True])
def test_resumed_after_preemption(v2: bool, same_step: bool) -> None:
    """After its resumption every block is stored from the device block that now has it.

    same_step: as with reset_prefix_cache(reset_running_requests=True), which reports the preemption with
    the step that resumes the request.
    """
    scheduler, request = Scheduler(v2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.run({request: 10}, new=(request,)).operations
    scheduler.report(operation)
    decode(request)

    request.num_computed_tokens = 0
    if not same_step:
        scheduler.step(preempted=(request,))
    external = scheduler.admit(request, [21, 22, 23])
    assert external == 2 * BLOCK
    loads = scheduler.step(preempted=(request,) if same_step else ()).operations
    assert [load.device_blocks.tolist() for load in loads] == [[21, 22]]
    scheduler.report(loads[0])

    scheduler.side.allocated(request, [[21, 22, 23]], 0)  # the load is over, it is admitted again
    orders = scheduler.step({request: 3}, resumed=(request,), blocks={"r": [21, 22, 23]})
    assert scheduler.stored(orders, request) == {}
    stored: dict[int, int] = {}
    for block in (24, 25, 26):
        for _ in range(BLOCK - 1 if block == 24 else BLOCK):
            decode(request)
            grows = (request.num_computed_tokens + 1) % BLOCK == 1
            orders = scheduler.step({request: 1}, blocks={"r": [block]} if grows else None)
            stored |= scheduler.stored(orders, request)
    scheduler.side.finish(request, [[21, 22, 23, 24, 25, 26]])
    stored |= scheduler.stored(scheduler.step(), request)
    assert stored == {2: 23, 3: 24, 4: 25} or stored == {2: 23, 3: 24}


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("same_step", [False, True])
def test_resumed_without_host_hit(v2: bool, same_step: bool) -> None:
    """The offload under way is given up with the device blocks, and is done again from the new ones."""
    scheduler, request = Scheduler(v2), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    (lost,) = scheduler.run({request: 10}, new=(request,)).operations
    decode(request)

    request.num_computed_tokens = 0
    orders = None if same_step else scheduler.step(preempted=(request,))
    assert scheduler.admit(request, [21, 22, 23]) == 0
    resumed = scheduler.step(
        {request: 11},
        resumed=(request,),
        blocks={"r": [21, 22, 23]},
        preempted=(request,) if same_step else (),
    )
    cancelled = (orders or resumed).cancel
    assert cancelled == [lost.id]
    stored = scheduler.stored(resumed, request)
    for operation in resumed.operations:
        scheduler.report(operation)
    scheduler.report(lost, failed=True)
    for _ in range(2):
        decode(request)
        grows = request.num_computed_tokens % BLOCK == 0
        orders = scheduler.step({request: 1}, blocks={"r": [24]} if grows else None)
        stored |= scheduler.stored(orders, request)
    scheduler.side.finish(request, [[21, 22, 23, 24]])
    stored |= scheduler.stored(scheduler.step(), request)
    assert {block: device for block, device in stored.items() if block > 2 or device < 20} == {}
    assert stored == {0: 21, 1: 22, 2: 23}


def test_what_was_computed_in_a_step_before_a_preemption_is_not_stored() -> None:
    """Its device blocks are given to others in the step with whose orders it would be."""
    scheduler, request = Scheduler(), make_request(tokens=10)
    scheduler.admit(request, [5, 6, 7])
    scheduler.step({request: 10}, new=(request,))
    other = make_request("other", tokens=10, first=5000)
    request.num_computed_tokens = 0
    scheduler.admit(other, [5, 6, 7])
    assert scheduler.step({other: 10}, new=(other,), preempted=(request,)).operations == []
    assert scheduler.stored(scheduler.step(), other) == {0: 5, 1: 6}
    assert scheduler.visible(request) == 0


def test_what_is_being_loaded_is_not_stored() -> None:
    """Of a request that was preempted and is admitted again, in one step."""
    scheduler, request = Scheduler(), make_request(tokens=13)
    scheduler.admit(request, [5, 6, 7, 8])
    (operation,) = scheduler.run({request: 13}, new=(request,)).operations
    scheduler.report(operation)
    decode(request, 4)
    scheduler.step({request: 4}, blocks={"r": [9]})
    other = make_request("other", tokens=13)
    assert scheduler.admit(other, [31, 32, 33, 34]) == 3 * BLOCK
    request.num_computed_tokens = 0
    assert scheduler.admit(request, [11, 12, 13, 14, 15]) == 3 * BLOCK
    # What the host has turns out to be damaged before the step is planned.
    scheduler.leader._planner.drop(scheduler.leader.pool.find(hashes_of(request)[:3]))
    orders = scheduler.step(preempted=(request,))
    assert [operation.direction for operation in orders.operations] == [Direction.ONBOARD] * 2


def hashed(scheduler: Scheduler, request: Any) -> int:
    hasher = scheduler.leader.hasher(request.request_id)
    assert hasher is not None
    return len(hasher)


def test_before_a_step_only_as_much_is_named_as_the_answer_needs() -> None:
    scheduler = Scheduler(slots=2048)
    look = scheduler_module._FIRST_LOOK
    prompt = make_request("a", tokens=12 * look * BLOCK + 1)
    assert scheduler.side.match(prompt, 0) == (0, False)
    assert hashed(scheduler, prompt) == look
    scheduler.side.allocated(prompt, [list(range(12 * look + 1))], 0)
    scheduler.step({prompt: prompt.num_tokens}, new=(prompt,))
    assert hashed(scheduler, prompt) == look  # the model computes these blocks, and takes its time
    operations = scheduler.step().operations
    assert sum(len(each.host_slots) for each in operations) == hashed(scheduler, prompt) == 12 * look
    assert 12 * look > scheduler_module._NAMES_A_STEP
    for operation in operations:
        scheduler.report(operation)

    everything = make_request("b", tokens=prompt.num_tokens)
    assert scheduler.side.match(everything, 0) == (12 * look * BLOCK, True)
    beside = make_request("c", tokens=prompt.num_tokens)
    for block in (look - 1, look, 2 * look, 3 * look + 1):
        part = make_request(f"{block}", tokens=prompt.num_tokens)
        part.all_token_ids[block * BLOCK] = 1
        assert scheduler.side.match(part, 0) == (block * BLOCK, block > 0)
        assert block < hashed(scheduler, part) <= 2 * block + look
    # All on the device but the last token: nothing is asked, nothing named.
    assert scheduler.side.match(beside, 12 * look * BLOCK) == (0, False)
    assert hashed(scheduler, beside) == 0


def test_what_is_found_on_the_device_is_stored_step_by_step() -> None:
    """Steps that compute next to nothing are short: the engine waits for what is done meanwhile."""
    scheduler = Scheduler(slots=2048)
    most = scheduler_module._NAMES_A_STEP
    request = make_request(tokens=3 * most * BLOCK + 1)
    other = make_request("other", tokens=most * BLOCK + 1, first=100_000)
    for each, blocks in ((request, range(3 * most + 1)), (other, range(4000, 4001 + most))):
        assert scheduler.admit(each, list(blocks), device_hit=each.num_tokens - 1) == 0
    scheduler.step({request: 1, other: 1}, new=(request, other))
    named, stored = [], []
    for _ in range(5):
        orders = scheduler.step()
        named.append((hashed(scheduler, request), hashed(scheduler, other)))
        stored.append(sum(len(operation.host_slots) for operation in orders.operations))
    assert named == [(most, 0), (2 * most, 0), (3 * most, 0), (3 * most, most), (3 * most, most)]
    assert stored == [most] * 4 + [0]
    assert scheduler.pinned() == 2 * 4 * most  # of the offloads, and of the requests, each once


def test_what_was_not_stored_yet_is_when_the_request_ends() -> None:
    scheduler = Scheduler(slots=2048)
    most = scheduler_module._NAMES_A_STEP
    request = make_request(tokens=3 * most * BLOCK + 1)
    blocks = [i % 63 + 1 for i in range(3 * most + 1)]
    scheduler.admit(request, blocks, device_hit=request.num_tokens - 1)
    scheduler.step({request: 1}, new=(request,))
    decode(request)
    operations = scheduler.step({request: 1}, blocks={"r": [63]}).operations  # and grows on
    operations += scheduler.step().operations
    scheduler.side.finish(request, [[*blocks, 63]])
    operations += scheduler.step().operations
    assert sum(len(operation.host_slots) for operation in operations) == 3 * most
    assert scheduler.step().operations == []
    for operation in operations:
        scheduler.report(operation)
    assert scheduler.pinned() == 0


def test_finish_holds_the_blocks_that_offloads_read() -> None:
    scheduler, request = Scheduler(), make_request(tokens=12)
    scheduler.admit(request, [5, 6, 7])
    orders = scheduler.step({request: 12}, new=(request,))
    scheduler.side.finish(request, [[5, 6, 7]])
    assert scheduler.pool.in_use() == {5: 1, 6: 1, 7: 1}
    for operation in orders.operations + scheduler.step().operations:
        scheduler.report(operation)
    assert scheduler.pool.in_use() == {}
    assert scheduler.visible(request) == 3


def test_reset_is_possible_while_offloads_read() -> None:
    scheduler, request = Scheduler(), make_request(tokens=12)
    scheduler.admit(request, [5, 6, 7])
    orders = scheduler.run({request: 12}, new=(request,))
    scheduler.side.finish(request, [[5, 6, 7]])
    assert scheduler.pool.reset_prefix_cache()
    assert scheduler.step().cancel == [operation.id for operation in orders.operations]
    for operation in orders.operations:
        scheduler.report(operation)  # too late
    assert scheduler.visible(request) == 0
    assert scheduler.pool.in_use() == {}


def test_reset_is_possible_after_a_load_timed_out_on_the_same_blocks() -> None:
    """What a stuck load holds, and gives back, is not taken for what offloads hold."""
    scheduler, first = Scheduler(), make_request("a", tokens=9)
    scheduler.admit(first, [5, 6, 7])
    (operation,) = scheduler.run({first: 9}, new=(first,)).operations
    scheduler.report(operation)
    scheduler.side.finish(first, [[5, 6, 7]])
    for operation in scheduler.step().operations:
        scheduler.report(operation)

    second = make_request("b", tokens=9)
    assert scheduler.admit(second, [11, 12, 13]) == 8
    (load,) = scheduler.step().operations
    scheduler.report(load, failed=True, quiesced=False)
    assert scheduler.pool.in_use() == {11: 1, 12: 1}
    scheduler.report(load, failed=True)
    assert scheduler.pool.in_use() == {}
    second.num_computed_tokens = 0
    scheduler.side.finish(second, [[]])

    third = make_request("c", tokens=9, first=5000)
    scheduler.admit(third, [11, 12, 13])
    scheduler.run({third: 9}, new=(third,))
    scheduler.side.finish(third, [[11, 12, 13]])
    assert scheduler.pool.in_use() == {11: 1, 12: 1}
    assert scheduler.pool.reset_prefix_cache()


def test_request_that_is_not_cached() -> None:
    scheduler, request = Scheduler(), make_request(tokens=12)
    request.prompt_embeds = object()
    assert scheduler.admit(request, [5, 6, 7]) == 0
    assert scheduler.step({request: 12}, new=(request,)).operations == []
    scheduler.side.finish(request, [[5, 6, 7]])
    assert scheduler.leader.not_cached == {"prompt embeddings": 1}
    assert scheduler.pool.in_use() == {}


def test_prompt_logprobs_are_not_loaded_but_stored() -> None:
    """vLLM 0.30 and older ask the connector even for requests that must be computed whole."""
    scheduler, request = Scheduler(), make_request(tokens=12)
    scheduler.admit(request, [5, 6, 7])
    (operation,) = scheduler.run({request: 12}, new=(request,)).operations
    scheduler.report(operation)
    whole = make_request("whole", tokens=12)
    whole.skip_reading_prefix_cache = True
    assert scheduler.admit(whole, [8, 9, 10]) == 0
