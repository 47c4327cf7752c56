"""The leader: when it begins, when it stops, and that the engine never hears of its troubles."""

import logging
from typing import Any

import numpy as np
import pytest

from kvbm.config import load_config
from kvbm.errors import ConfigError
from kvbm.logic.operations import Completion, Direction, Failure
from kvbm.logic.outcome import Outcome
from kvbm.logic.pool import BlockEvent, EventKind
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import StepOrders, WorkerReport

SLOTS = 16
BLOCK_SIZE = 4
INIT_TIMEOUT_S = 100.0
TIMEOUT_S = 10.0


class Clock:
    now = 5000.0

    def __call__(self) -> float:
        return self.now


def make_leader(ranks: int = 2, **settings: Any) -> tuple[Leader, Clock]:
    clock = Clock()
    config = load_config(
        environ={},
        host__num_blocks=SLOTS,
        engine__init_timeout_s=INIT_TIMEOUT_S,
        transfer__timeout_s=TIMEOUT_S,
        **settings,
    )
    leader = Leader(
        config, namespace=b"n" * 16, block_size=BLOCK_SIZE, num_slots=SLOTS, ranks=ranks, clock=clock
    )
    return leader, clock


def make_ready(leader: Leader, ranks: int = 2) -> Leader:
    leader.receive(WorkerReport(rank, SLOTS, SLOTS) for rank in range(ranks))
    assert leader.ready
    return leader


def arrive(leader: Leader, request_id: str, tokens: int, **identity: Any) -> None:
    leader.start(request_id, **identity)
    hasher = leader.hasher(request_id)
    assert hasher is not None
    hasher.extend(range(tokens))


def done(leader: Leader, orders: StepOrders, ranks: int = 2, failed: bool = False) -> list[Outcome]:
    """Every rank has executed the orders. Nothing new is said of their memory."""
    outcomes = []
    for rank in range(ranks):
        completions = [
            Completion(
                operation.id,
                np.arange(len(operation.host_slots) if failed else 0, dtype=np.int32),
                Failure.ERROR if failed else Failure.NONE,
            )
            for operation in orders.operations
        ]
        outcomes += leader.receive([WorkerReport(rank, SLOTS, completions=completions)])
    return outcomes


def cached(leader: Leader, blocks: int = 3) -> Leader:
    """A request has come and gone: its blocks are in the host tier."""
    arrive(leader, "first", blocks * BLOCK_SIZE)
    leader.set_table("first", list(range(blocks)))
    leader.store([("first", blocks)])
    done(leader, leader.take_orders())
    leader.finish("first", blocks, list(range(blocks)))
    assert leader.pool.num_registered == blocks
    return leader


# ---- the course of things ----


def test_store_and_load() -> None:
    leader = cached(make_ready(make_leader()[0]))
    assert not leader.has_work
    arrive(leader, "second", 4 * BLOCK_SIZE)
    assert leader.match("second", 0) == 3
    assert leader.match("second", 1) == 2
    assert leader.match("second", 3) == 0
    leader.load("second", 1, 2, [9, 10, 11, 12])
    assert leader.has_work
    orders = leader.take_orders()
    assert leader.take_orders() == StepOrders()
    (load,) = orders.operations
    assert load.direction == Direction.ONBOARD
    assert load.request_id == "second"
    assert load.device_blocks.tolist() == [10, 11]
    assert load.timeout_s == TIMEOUT_S
    assert leader.has_work
    done(leader, orders)
    assert not leader.has_work
    assert leader.stats.onboarded_blocks == 2
    leader.store([("second", 4)])
    (offload,) = leader.take_orders().operations
    assert offload.direction == Direction.OFFLOAD
    assert offload.device_blocks.tolist() == [12]


def test_the_block_is_visible_when_the_last_rank_has_written_it() -> None:
    leader = make_ready(make_leader()[0])
    arrive(leader, "a", BLOCK_SIZE)
    leader.set_table("a", [3])
    leader.store([("a", 1)])
    (operation,) = leader.take_orders().operations
    arrive(leader, "b", BLOCK_SIZE)
    nothing = np.empty(0, np.int32)
    leader.receive([WorkerReport(1, SLOTS, SLOTS, completions=[Completion(operation.id, nothing)])])
    assert leader.match("b", 0) == 0
    leader.receive([WorkerReport(1, SLOTS, SLOTS, completions=[Completion(operation.id, nothing)])])
    assert leader.match("b", 0) == 0
    leader.receive([WorkerReport(0, SLOTS, SLOTS, completions=[Completion(operation.id, nothing)])])
    assert leader.match("b", 0) == 1


def test_identities_do_not_share() -> None:
    leader = cached(make_ready(make_leader()[0]))
    for i, identity in enumerate(({"salt": "x"}, {"adapter": "x"}, {"salt": ""})):
        arrive(leader, f"other{i}", 12, **identity)
        assert leader.match(f"other{i}", 0) == 0
    arrive(leader, "same", 12)
    assert leader.match("same", 0) == 3


def test_a_match_follows_the_tokens() -> None:
    """A request that was asked about goes on growing: what is known of it later counts as well."""
    leader = cached(make_ready(make_leader()[0]))
    leader.start("grows")
    hasher = leader.hasher("grows")
    assert hasher is not None
    hasher.extend(range(BLOCK_SIZE))
    assert leader.match("grows", 0) == 1
    hasher.extend(range(BLOCK_SIZE, 3 * BLOCK_SIZE))
    assert leader.match("grows", 0) == 3


def test_finish_holds_what_is_read_and_completion_releases_it() -> None:
    leader = make_ready(make_leader()[0])
    arrive(leader, "a", 8)
    outcome = leader.finish("a", 2, [5, 6])
    assert [blocks.tolist() for blocks in outcome.hold] == [[5, 6]]
    outcomes = done(leader, leader.take_orders())
    assert [blocks.tolist() for o in outcomes for blocks in o.release] == [[5, 6]]
    assert not any(o.hold for o in outcomes)


def test_finish_after_preemption_holds_only_the_blocks_that_the_request_has() -> None:
    """What a preempted request had belongs to others; the offloads that read it were cancelled."""
    leader = make_ready(make_leader()[0])
    arrive(leader, "a", 8)
    leader.set_table("a", [5, 6])
    leader.store([("a", 2)])
    leader.preempt("a")
    orders = leader.take_orders()
    assert orders.cancel == [operation.id for operation in orders.operations]
    outcome = leader.finish("a", 0, [])
    assert [blocks.tolist() for blocks in outcome.hold] == []


def test_abandon_cancels_and_releases() -> None:
    leader = make_ready(make_leader()[0])
    arrive(leader, "a", 8)
    leader.finish("a", 2, [5, 6])
    outcome = leader.abandon()
    assert [blocks.tolist() for blocks in outcome.release] == [[5, 6]]
    orders = leader.take_orders()
    assert orders.cancel == [operation.id for operation in orders.operations]
    outcomes = done(leader, orders)
    assert not any(o.hold or o.release for o in outcomes)
    assert leader.pool.num_free == SLOTS


def test_clear() -> None:
    leader = cached(make_ready(make_leader()[0]))
    assert leader.reset()
    arrive(leader, "b", 12)
    assert leader.match("b", 0) == 0


def test_refused_requests_are_counted() -> None:
    leader, _ = make_leader()
    leader.refuse("pooling request")
    leader.refuse("pooling request")
    leader.refuse("streaming input")
    assert leader.not_cached == {"pooling request": 2, "streaming input": 1}


def test_unknown_requests_are_nobody() -> None:
    leader = make_ready(make_leader()[0])
    assert leader.hasher("x") is None
    assert leader.match("x", 0) == 0
    leader.set_table("x", [1])
    leader.extend_table("x", [1])
    leader.store([("x", 3)])
    leader.preempt("x")
    assert leader.finish("x", 1, [1]) == Outcome()
    assert leader.take_orders() == StepOrders()
    assert leader.off_reason is None


# ---- ready ----


def test_ready_when_all_ranks_have_reported() -> None:
    leader, _ = make_leader(ranks=3)
    arrive(leader, "a", 8)
    leader.set_table("a", [1, 2])
    for rank in (2, 0, 2):
        leader.receive([WorkerReport(rank, SLOTS, SLOTS)])
        assert not leader.ready
        leader.store([("a", 2)])
        assert leader.match("a", 0) == 0
        assert leader.take_orders().operations == []
    leader.receive([WorkerReport(1, SLOTS, SLOTS)])
    assert leader.ready
    leader.store([("a", 2)])
    assert len(leader.take_orders().operations) == 1


def test_a_rank_that_does_not_exist_makes_nothing_ready() -> None:
    leader, _ = make_leader(ranks=2)
    leader.receive([WorkerReport(0, SLOTS, SLOTS), WorkerReport(7, SLOTS, SLOTS)])
    assert not leader.ready


def test_the_tier_grows_with_the_slowest_rank(caplog: pytest.LogCaptureFixture) -> None:
    leader, _ = make_leader()
    seen = []
    with caplog.at_level(logging.INFO):
        for rank, ready in ((0, 6), (0, 8), (1, 0), (1, 3), (1, 9), (0, SLOTS), (1, 9), (1, SLOTS), (0, 6)):
            assert leader.receive([WorkerReport(rank, SLOTS, ready)]) == []
            seen.append(leader.pool.usable)
            assert leader.ready == (seen[-1] > 0)
            assert leader.pool.num_free == leader.pool.usable
    assert seen == [0, 0, 0, 3, 8, 9, 9, SLOTS, SLOTS]
    assert [record.levelname for record in caplog.records] == ["INFO"] * 2  # in use, then ready
    assert "3 of 16" in caplog.messages[0]
    assert "ready, 16 blocks" in caplog.messages[1]


def test_only_slots_that_every_rank_has_are_used() -> None:
    leader, _ = make_leader()
    leader.receive([WorkerReport(0, SLOTS, 2), WorkerReport(1, SLOTS, 5)])
    arrive(leader, "a", 5 * BLOCK_SIZE)
    leader.set_table("a", list(range(5)))
    leader.store([("a", 5)])
    orders = leader.take_orders()
    assert sorted(slot for o in orders.operations for slot in o.host_slots.tolist()) == [0, 1]
    done(leader, orders)
    leader.receive([WorkerReport(0, SLOTS, 3)])
    leader.store([("a", 5)])
    later = leader.take_orders()
    assert [slot for o in later.operations for slot in o.host_slots.tolist()] == [2]
    make_ready(leader)
    done(leader, later)
    leader.store([("a", 5)])
    done(leader, leader.take_orders())
    arrive(leader, "b", 5 * BLOCK_SIZE)
    assert leader.match("b", 0) == 5


def test_a_rank_is_heard_when_it_has_memory() -> None:
    leader, clock = make_leader()
    leader.tick()
    leader.receive([WorkerReport(0, SLOTS, SLOTS), WorkerReport(1, 0, 0)])
    clock.now += INIT_TIMEOUT_S + 1
    leader.tick()
    assert leader.off_reason == "ranks [1] did not report in time"


def test_a_rank_with_another_number_of_slots_while_memory_is_pinned() -> None:
    leader, _ = make_leader()
    leader.receive([WorkerReport(0, SLOTS, 4), WorkerReport(1, SLOTS + 4, 4)])
    assert not leader.ready
    assert leader.off_reason is not None
    assert "rank 1 has 20 blocks" in leader.off_reason


@pytest.mark.parametrize("able", [(True, True), (True, False), (False, True), (False, False)])
def test_loads_inside_a_step_where_every_rank_can(able: tuple[bool, bool]) -> None:
    leader, _ = make_leader()
    assert not leader.loads_in_step
    for rank in range(2):
        assert not leader.loads_in_step
        leader.receive([WorkerReport(rank, SLOTS, 4, loads_in_step=able[rank])])
    assert leader.loads_in_step == all(able)
    for rank in range(2):
        leader.receive([WorkerReport(rank, SLOTS, SLOTS, loads_in_step=able[rank])])
    assert leader.loads_in_step == all(able)
    leader.off_reason = "internal error elsewhere"
    assert not leader.loads_in_step


@pytest.mark.parametrize("in_step", [True, False])
def test_a_load_says_whether_the_step_reads_it(in_step: bool) -> None:
    leader = cached(make_ready(make_leader()[0]))
    arrive(leader, "b", 12)
    leader.load("b", 0, 3, [7, 8, 9], in_step=in_step)
    leader.load("unknown", 0, 1, [4], in_step=in_step)
    planned, lost = leader.take_orders().operations
    assert planned.in_step == lost.in_step == in_step
    assert lost.host_slots.tolist() == [-1]


def test_a_request_that_ends_before_all_are_ready_is_not_stored() -> None:
    leader, _ = make_leader()
    arrive(leader, "a", 8)
    assert leader.finish("a", 2, [1, 2]) == Outcome()
    assert leader.take_orders().operations == []


def test_a_rank_that_refuses(caplog: pytest.LogCaptureFixture) -> None:
    leader, _ = make_leader()
    leader.receive([WorkerReport(0, SLOTS, SLOTS)])
    with caplog.at_level(logging.WARNING):
        leader.receive([WorkerReport(1, refused="layout unknown")])
    assert not leader.ready
    assert leader.off_reason == "layout unknown"
    assert "layout unknown" in caplog.text
    leader.receive([WorkerReport(1, SLOTS, SLOTS)])
    assert not leader.ready


def test_a_rank_with_another_number_of_slots() -> None:
    leader, _ = make_leader()
    leader.receive([WorkerReport(0, SLOTS, SLOTS), WorkerReport(1, SLOTS - 1, SLOTS - 1)])
    assert not leader.ready
    assert leader.off_reason is not None
    assert "rank 1" in leader.off_reason


def test_init_timeout_counts_from_the_first_tick() -> None:
    leader, clock = make_leader()
    clock.now += 10 * INIT_TIMEOUT_S  # compiling a model takes its time
    leader.tick()
    leader.receive([WorkerReport(0, SLOTS, SLOTS)])
    clock.now += INIT_TIMEOUT_S
    leader.tick()
    assert leader.off_reason is None
    clock.now += 0.1
    leader.tick()
    assert leader.off_reason == "ranks [1] did not report in time"
    leader.receive([WorkerReport(1, SLOTS, SLOTS)])
    assert not leader.ready


def test_no_init_timeout_once_ready() -> None:
    leader, clock = make_leader()
    leader.tick()
    make_ready(leader)
    clock.now += 10 * INIT_TIMEOUT_S
    leader.tick()
    assert leader.ready


def test_ticks_let_deadlines_pass() -> None:
    leader, clock = make_leader()
    make_ready(leader)
    arrive(leader, "a", 8)
    leader.set_table("a", [1, 2])
    leader.store([("a", 2)])
    leader.take_orders()
    leader.tick()
    assert leader.has_work
    clock.now += 3 * TIMEOUT_S
    leader.tick()
    assert not leader.has_work
    assert leader.pool.num_free == SLOTS - 2  # a copy may still write there


def test_an_unknown_policy_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="can't be loaded"):
        make_leader(host__policy="no_such_module:Policy")


# ---- loads are always answered ----


def test_a_load_that_cannot_be_planned_is_an_operation_that_fails() -> None:
    leader = make_ready(make_leader()[0])
    leader.load("unknown", 1, 2, [4, 5, 6])
    leader.load("unknown too", 0, 1, [7])
    one, two = leader.take_orders().operations
    assert one.direction == two.direction == Direction.ONBOARD
    assert one.request_id == "unknown"
    assert one.device_blocks.tolist() == [5, 6]
    assert one.host_slots.tolist() == [-1, -1]
    assert two.device_blocks.tolist() == [7]
    assert one.id != two.id
    assert one.id < 0
    assert two.id < 0
    outcomes = leader.receive(
        [
            WorkerReport(
                0, SLOTS, SLOTS, completions=[Completion(one.id, np.arange(2, dtype=np.int32), Failure.ERROR)]
            )
        ]
    )
    assert outcomes == [Outcome()]
    assert leader.ready


def test_a_load_of_what_was_evicted_since_fails_only_there() -> None:
    leader = cached(make_ready(make_leader()[0]))
    arrive(leader, "b", 12)
    assert leader.match("b", 0) == 3
    hasher = leader.hasher("b")
    assert hasher is not None
    leader.pool.withdraw(leader.pool.match(hasher.hashes)[2:])
    leader.load("b", 0, 3, [1, 2, 3])
    (load,) = leader.take_orders().operations
    assert (load.host_slots >= 0).tolist() == [True, True, False]


def test_a_request_whose_load_failed_is_not_offered_another() -> None:
    leader = cached(make_ready(make_leader()[0]))
    arrive(leader, "b", 12)
    leader.load("b", 0, 2, [1, 2, 3])
    done(leader, leader.take_orders(), failed=True)
    assert leader.match("b", 0) == 0
    arrive(leader, "c", 12)
    assert leader.match("c", 0) == 0  # its first blocks could not be read


# ---- errors inside ----

CALLS: dict[str, tuple[Any, ...]] = {
    "start": ("x",),
    "hasher": ("a",),
    "match": ("a", 0),
    "set_table": ("a", [1]),
    "extend_table": ("a", [1]),
    "store": ([("a", 1)],),
    "preempt": ("a",),
    "finish": ("a", 1, [1]),
    "abandon": (),
    "receive": ([WorkerReport(0, SLOTS, SLOTS, completions=[Completion(0, np.empty(0, np.int32))])],),
    "tick": (),
    "reset": (),
    "new_weights": ("b",),
}
ANSWERS: dict[str, Any] = {
    "start": None,
    "hasher": None,
    "match": 0,
    "set_table": None,
    "extend_table": None,
    "store": Outcome(),
    "preempt": None,
    "finish": Outcome(),
    "abandon": Outcome(),
    "receive": [],
    "tick": None,
    "reset": False,
    "new_weights": None,
}


class Broken:
    """A planner in which everything is wrong."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} is broken")


def check_off(leader: Leader) -> None:
    for name, arguments in CALLS.items():
        assert getattr(leader, name)(*arguments) == ANSWERS[name]
    assert not leader.ready
    assert not leader.has_work
    assert leader.take_orders() == StepOrders()
    # The engine waits for a load that it was promised before.
    leader.load("a", 0, 2, [1, 2, 3])
    (operation,) = leader.take_orders().operations
    assert operation.host_slots.tolist() == [-1, -1]


@pytest.mark.parametrize("first", [*CALLS, "has_work", "load"])
def test_an_error_inside_turns_caching_off(first: str, caplog: pytest.LogCaptureFixture) -> None:
    leader = make_ready(make_leader()[0])
    arrive(leader, "a", 8)
    leader._planner = leader.upkeep._planner = Broken()  # type: ignore[assignment]
    with caplog.at_level(logging.ERROR):
        if first == "has_work":
            assert not leader.has_work
        elif first == "load":
            leader.load("a", 0, 2, [1, 2])
            (operation,) = leader.take_orders().operations
            assert operation.host_slots.tolist() == [-1, -1]
        else:
            assert getattr(leader, first)(*CALLS[first]) == ANSWERS[first]
        assert leader.off_reason is not None
        assert "internal error" in leader.off_reason
        check_off(leader)
    assert caplog.text.count("internal error") == 1  # one log entry


@pytest.mark.parametrize("reason", ["refused", "slots", "time"])
def test_when_off_every_call_answers_empty(reason: str) -> None:
    leader, clock = make_leader()
    if reason == "refused":
        leader.receive([WorkerReport(0, refused="no")])
    elif reason == "slots":
        leader.receive([WorkerReport(0, 3, 3)])
    else:
        leader.tick()
        clock.now += INIT_TIMEOUT_S + 1
        leader.tick()
    assert leader.off_reason
    check_off(leader)


def test_a_hung_load_keeps_its_device_blocks_when_caching_is_off() -> None:
    """Whatever went wrong: blocks that a copy may still write to must not be given to others."""
    leader = cached(make_ready(make_leader()[0]))
    arrive(leader, "b", 12)
    leader.load("b", 0, 3, [7, 8, 9])
    (load,) = leader.take_orders().operations
    leader.off_reason = "internal error elsewhere"
    everything = np.arange(3, dtype=np.int32)
    late = Completion(load.id, everything, Failure.TIMEOUT, quiesced=False)
    outcomes = leader.receive([WorkerReport(0, SLOTS, SLOTS, completions=[late])])
    assert [blocks.tolist() for outcome in outcomes for blocks in outcome.hold] == [[7, 8, 9]]


def test_a_completion_that_makes_no_sense_does_not_raise() -> None:
    leader = make_ready(make_leader()[0])
    arrive(leader, "a", 8)
    leader.set_table("a", [1, 2])
    leader.store([("a", 2)])
    (operation,) = leader.take_orders().operations
    assert leader.receive(
        [WorkerReport(0, SLOTS, SLOTS, completions=[Completion(operation.id, np.array([99], np.int32))])]
    ) in ([], [Outcome()])


# ---- subscribers ----


def test_subscribers_hear_of_blocks() -> None:
    leader = make_ready(make_leader()[0])
    heard: list[BlockEvent] = []
    unsubscribe = leader.subscribe(heard.append)
    cached(leader)
    assert [(event.kind, len(event.hashes), event.tier) for event in heard] == [(EventKind.STORED, 3, "host")]
    leader.reset()
    assert [event.kind for event in heard] == [EventKind.STORED, EventKind.REMOVED]
    unsubscribe()
    cached(leader, 2)
    assert len(heard) == 2


def test_a_subscriber_that_raises_is_unsubscribed(caplog: pytest.LogCaptureFixture) -> None:
    leader = make_ready(make_leader()[0])
    calls = []
    heard: list[BlockEvent] = []

    def broken(event: BlockEvent) -> None:
        calls.append(event)
        raise ValueError("broken")

    unsubscribe = leader.subscribe(broken)
    leader.subscribe(heard.append)
    cached(leader)
    leader.reset()
    assert len(calls) == 1
    assert len(heard) == 2
    assert leader.ready
    assert "unsubscribed" in caplog.text
    unsubscribe()  # the user does not know that it is already over


def test_unsubscribing_twice_is_harmless() -> None:
    leader = make_ready(make_leader()[0])
    unsubscribe = leader.subscribe(lambda event: None)
    unsubscribe()
    unsubscribe()
