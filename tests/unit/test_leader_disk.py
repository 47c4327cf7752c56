"""The leader with a disk tier: when requests wait, what the ranks are told, what a broken disk means."""

import logging
from typing import Any

import numpy as np
import pytest

from kvbm.config import load_config
from kvbm.logic.estimate import LoadEstimate
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.logic.policies import Lru, SegmentedLru
from kvbm.logic.pool import BlockEvent
from kvbm.runtime.disk import make_disk_tier
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import StepOrders, WorkerReport

HOST, DISK, BLOCK = 16, 32, 4
TIMEOUT_S = 10.0
NO_RECORDS = (np.empty(0, np.int32), np.empty((0, 2), np.uint64))
WRITE, READ, ONBOARD = Direction.WRITE, Direction.READ, Direction.ONBOARD


class Engine:
    """A scheduler of one request after the other, and ranks that do what they are told. Time passes in
    `step`."""

    def __init__(self, *, ranks: int = 2, ready: bool = True, **settings: Any) -> None:
        self.now = 5000.0
        self.ranks = ranks
        config = load_config(
            environ={},
            **{
                "host__num_blocks": HOST,
                "disk__num_blocks": DISK,
                "disk__disable_filter": True,
                "disk__timeout_s": TIMEOUT_S,
                **settings,
            },
        )
        self.leader = Leader(
            config,
            namespace=b"n" * 16,
            block_size=BLOCK,
            num_slots=HOST,
            ranks=ranks,
            disk_slots=DISK,
            disk_record_bytes=8192,
            clock=lambda: self.now,
        )
        self.ready_host()
        if ready:
            for rank in range(ranks):
                self.report(rank, found=NO_RECORDS, found_all=True)
            self.step()
            assert self.disk.ready

    @property
    def disk(self) -> Any:
        return self.leader.disk

    def ready_host(self) -> None:
        for rank in range(self.ranks):
            self.report(rank)

    def report(self, rank: int, completions: tuple[Completion, ...] = (), **more: Any) -> None:
        self.leader.receive([WorkerReport(rank, HOST, HOST, completions=list(completions), **more)])

    def step(self, seconds: float = 0.0, tokens: int = 0) -> StepOrders:
        self.now += seconds
        self.leader.tick()
        return self.leader.take_orders(tokens)

    def done(self, *operations: Operation, failed: bool = False, reason: Failure = Failure.ERROR) -> None:
        for operation in operations:
            positions = operation.positions if failed else operation.positions[:0]
            completion = Completion(operation.id, positions, reason if failed else Failure.NONE)
            for rank in range(self.ranks):
                self.report(rank, (completion,))

    def arrive(self, request: str, blocks: int, first: int = 0) -> None:
        self.leader.start(request)
        hasher = self.leader.hasher(request)
        assert hasher is not None
        hasher.extend(range(first, first + blocks * BLOCK))

    def run(self, request: str, blocks: int, first: int = 0) -> list[Operation]:
        """A request that is computed, stored and written to disk: all operations."""
        self.arrive(request, blocks, first)
        self.leader.set_table(request, list(range(blocks)))
        self.leader.store([(request, blocks)])
        operations = self.step().operations
        self.done(*operations)
        self.leader.finish(request, blocks, list(range(blocks)))
        writes = self.step().operations
        self.done(*writes)
        return operations + writes

    def lose(self) -> None:
        """The host tier alone loses all it has."""
        self.leader.pool.withdraw(np.flatnonzero(self.leader.pool.states(np.arange(HOST)) == 3))


def kinds(orders: StepOrders) -> list[Direction]:
    return [operation.direction for operation in orders.operations]


# ---- the course of things ----


def test_from_device_to_disk_and_back() -> None:
    e = Engine()
    operations = e.run("a", 3)
    assert [operation.direction for operation in operations] == [Direction.OFFLOAD, WRITE]
    assert len({operation.id for operation in operations}) == 2
    assert e.disk.stats.written_blocks == 3
    e.lose()
    e.arrive("b", 4)
    assert e.leader.match("b", 0, 3) is None
    assert e.leader.has_work
    (read,) = e.step().operations
    assert read.direction == READ
    assert e.leader.match("b", 0, 3) is None
    e.done(read)
    assert e.leader.match("b", 0, 3) == 3
    e.leader.load("b", 0, 3, [4, 5, 6, 7])
    orders = e.step()
    assert kinds(orders) == [ONBOARD]
    e.done(*orders.operations)
    assert e.leader.stats.onboarded_blocks == 3
    assert not e.leader.has_work
    e.leader.finish("b", 3, [4, 5, 6, 7])
    assert not e.leader.pool.pins(np.arange(HOST)).any()
    assert not e.disk.pool.pins(np.arange(DISK)).any()


def test_only_what_is_asked_for_is_read() -> None:
    e = Engine()
    e.run("a", 5)
    e.lose()
    e.arrive("b", 5)
    assert e.leader.match("b", 1, 2) is None
    (read,) = e.step().operations
    hasher = e.leader.hasher("b")
    assert hasher is not None
    assert read.hashes.tolist() == hasher.hashes[1:3].tolist()
    e.done(read)
    assert e.leader.match("b", 1, 2) == 2


def test_no_waiting_where_nothing_can_come() -> None:
    e = Engine()
    e.run("a", 2)
    e.lose()
    e.arrive("b", 2)
    assert e.leader.match("b", 0, 0) == 0
    assert e.leader.match("unknown", 0, 5) == 0
    e.arrive("c", 3, first=1000)
    assert e.leader.match("c", 0, 3) == 0
    assert e.step().operations == []


def test_the_filter_sees_offloads_and_loads() -> None:
    e = Engine(disk__disable_filter=False)
    assert [operation.direction for operation in e.run("a", 3)] == [Direction.OFFLOAD]
    e.arrive("b", 3)
    assert e.leader.match("b", 0, 2) == 2
    e.leader.load("b", 0, 2, [4, 5, 6])
    orders = e.step()
    assert kinds(orders) == [ONBOARD, WRITE]
    assert orders.operations[1].host_slots.tolist() == orders.operations[0].host_slots.tolist()


def test_the_next_request_comes_after_an_hour() -> None:
    """The engine has made no step since: neither the request's patience nor the read's time is over."""
    e = Engine()
    e.run("a", 2)
    e.lose()
    e.now += 3600.0
    e.arrive("b", 2)
    assert e.leader.match("b", 0, 2) is None
    (read,) = e.step().operations
    assert e.leader.match("b", 0, 2) is None
    e.step(seconds=TIMEOUT_S)
    assert e.leader.match("b", 0, 2) is None
    e.done(read)
    assert e.leader.match("b", 0, 2) == 2
    assert not e.disk.stats.failures


def test_a_write_after_a_long_step_has_its_time() -> None:
    e = Engine()
    e.arrive("a", 1)
    e.leader.set_table("a", [0])
    e.leader.store([("a", 1)])
    (offload,) = e.step().operations
    e.now += 5 * TIMEOUT_S
    e.done(offload)
    (write,) = e.step().operations
    e.step(seconds=TIMEOUT_S)
    e.done(write)
    assert e.disk.stats.written_blocks == 1


def test_a_read_that_failed_is_a_miss_and_is_not_read_again() -> None:
    e = Engine()
    e.run("a", 2)
    e.lose()
    e.arrive("b", 2)
    assert e.leader.match("b", 0, 2) is None
    (read,) = e.step().operations
    e.done(read, failed=True, reason=Failure.CORRUPT)
    assert e.leader.match("b", 0, 2) == 0
    orders = e.step()
    assert sorted(orders.forget) == sorted(read.disk_slots.tolist())
    assert orders.operations == []
    assert e.step().forget == []


def test_a_request_that_goes_on_without_its_blocks_does_not_keep_them() -> None:
    """It waited in vain, and may now run for an hour."""
    e = Engine()
    e.run("a", 2)
    e.lose()
    e.arrive("b", 2)
    assert e.leader.match("b", 0, 2) is None
    (read,) = e.step().operations
    e.step(seconds=2 * TIMEOUT_S + 1)
    assert e.leader.match("b", 0, 2) == 0
    e.leader.set_table("b", [3, 4])
    e.done(read)
    assert not e.leader.pool.pins(np.arange(HOST)).any()
    assert e.disk._fetched == 0


def test_a_load_keeps_what_was_fetched_until_it_is_over() -> None:
    e = Engine()
    e.run("a", 2)
    e.lose()
    e.arrive("b", 3)
    assert e.leader.match("b", 0, 2) is None
    e.done(*e.step().operations)
    e.leader.load("b", 0, 2, [3, 4, 5])
    assert len(e.leader.pool.allocate(HOST)) == HOST - 2
    orders = e.step()
    assert (orders.operations[0].host_slots >= 0).all()


def test_a_request_that_is_aborted_while_it_waits() -> None:
    e = Engine()
    e.run("a", 2)
    e.lose()
    e.arrive("b", 2)
    assert e.leader.match("b", 0, 2) is None
    (read,) = e.step().operations
    e.leader.finish("b", 0, [])
    e.done(read)
    assert not e.leader.pool.pins(np.arange(HOST)).any()
    assert not e.leader.has_work


def test_a_request_whose_load_failed_reads_nothing() -> None:
    e = Engine()
    e.run("a", 2)
    e.arrive("b", 3)
    assert e.leader.match("b", 0, 2) == 2
    e.leader.load("b", 0, 2, [3, 4, 5])
    e.done(*e.step().operations, failed=True)
    assert e.leader.match("b", 0, 2) == 0
    assert e.step().operations == []


# ---- at start ----


def stored_hashes(blocks: int) -> Any:
    e = Engine()
    e.arrive("x", blocks)
    hasher = e.leader.hasher("x")
    assert hasher is not None
    return hasher.hashes.copy()


def test_requests_wait_until_it_is_known_what_is_on_disk() -> None:
    hashes = stored_hashes(3)
    slots = np.array([7, 8, 9], np.int32)
    e = Engine(ready=False)
    e.arrive("b", 4)
    assert e.leader.match("b", 0, 3) is None
    assert e.leader.match("b", 0, 0) == 0
    assert e.leader.has_work
    e.report(0, found=(slots[:2], hashes[:2]))
    e.report(1, found=(slots, hashes), found_all=True)
    e.step()
    assert e.leader.match("b", 0, 3) is None
    e.report(0, found=(slots[2:], hashes[2:]), found_all=True)
    e.step()
    e.step()
    assert e.disk.stats.recovered_blocks == 3
    assert e.leader.match("b", 0, 3) is None  # they are read now


def test_what_is_found_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    e = Engine(ready=False)
    slots = np.array([7, 8, 9], np.int32)
    for rank in range(2):
        e.report(rank, found=(slots, stored_hashes(3)), found_all=True)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            e.step()
    assert caplog.text.count("disk tier ready, 32 blocks, 3 of them from an earlier run") == 1


def test_requests_do_not_wait_for_ever() -> None:
    e = Engine(ready=False)
    e.arrive("b", 3)
    e.step()
    e.step(seconds=4.9)
    assert e.leader.match("b", 0, 3) is None
    e.step(seconds=0.2)
    assert e.leader.match("b", 0, 3) == 0
    assert not e.leader.has_work
    for rank in range(2):
        e.report(rank, found=NO_RECORDS, found_all=True)
    e.step()
    assert e.disk.ready


@pytest.mark.parametrize("when", ["restoring", "ready"])
def test_a_refusal_turns_only_the_disk_off(when: str, caplog: pytest.LogCaptureFixture) -> None:
    e = Engine(ready=when == "ready")
    e.report(1, disk_refused="the drive is gone")
    e.report(0, disk_refused="mine too")
    assert caplog.text.count("the disk tier is off") == 1
    assert e.disk.off_reason == "the drive is gone"
    assert e.leader.off_reason is None
    assert e.leader.ready
    operations = e.run("a", 3)
    assert [operation.direction for operation in operations] == [Direction.OFFLOAD]
    e.arrive("b", 3)
    assert e.leader.match("b", 0, 3) == 3
    assert e.leader.match("b", 0, 3) == 3
    assert not e.leader.has_work


def test_a_refusal_while_a_request_waits() -> None:
    e = Engine()
    e.run("a", 2)
    e.lose()
    e.arrive("b", 2)
    assert e.leader.match("b", 0, 2) is None
    (read,) = e.step().operations
    e.report(0, (Completion(read.id, read.positions, Failure.UNAVAILABLE),), disk_refused="gone")
    assert e.leader.match("b", 0, 2) is None  # the other rank still writes to the host slots
    e.report(1, (Completion(read.id, read.positions[:0]),))
    assert e.leader.match("b", 0, 2) == 0
    e.leader.finish("b", 0, [])
    assert not e.leader.pool.pins(np.arange(HOST)).any()


# ---- clearing ----


def test_clear_reaches_the_ranks_even_of_an_idle_engine() -> None:
    e = Engine()
    e.run("a", 2)
    assert not e.leader.has_work
    assert e.leader.reset()
    assert e.leader.has_work
    orders = e.step()
    assert orders.forget_all
    assert not e.leader.has_work
    assert not e.step().forget_all
    e.arrive("b", 2)
    assert e.leader.match("b", 0, 2) == 0
    assert e.disk.pool.num_registered == 0


def test_what_was_ordered_but_not_taken_is_not_written_after_the_clearing() -> None:
    e = Engine()
    e.arrive("a", 2)
    e.leader.set_table("a", [0, 1])
    e.leader.store([("a", 2)])
    e.done(*e.step().operations)
    e.leader.reset()
    orders = e.step()
    assert orders.operations == []
    assert orders.forget_all
    e.leader.finish("a", 0, [])
    assert not e.disk.pool.pins(np.arange(DISK)).any()
    assert not e.leader.pool.pins(np.arange(HOST)).any()


def test_without_a_disk_nothing_is_forgotten_there() -> None:
    config = load_config(environ={}, host__num_blocks=HOST)
    leader = Leader(config, namespace=b"n" * 16, block_size=BLOCK, num_slots=HOST, ranks=1)
    assert leader.disk is None
    leader.reset()
    assert leader.take_orders(tokens=1000) == StepOrders(tokens=1000)


# ---- subscribers ----


def test_subscribers_hear_of_both_tiers() -> None:
    e = Engine()
    heard: list[BlockEvent] = []
    unsubscribe = e.leader.subscribe(heard.append)
    e.run("a", 2)
    assert [(event.tier, len(event.hashes)) for event in heard] == [("host", 2), ("disk", 2)]
    unsubscribe()
    e.run("b", 2, first=1000)
    assert len(heard) == 2


# ---- how fast the model is ----


def rate(e: Engine) -> float | None:
    value = e.leader._estimate._computing.value
    return None if value is None else round(value, 6)


def test_steps_are_timed() -> None:
    e = Engine()
    orders = e.step(tokens=1000)
    assert (orders.timed, orders.tokens) == (True, 1000)
    e.now += 2.0
    e.report(0, timed=True)
    assert rate(e) == 500.0


def test_small_steps_are_not_timed() -> None:
    e = Engine()
    assert not e.step(tokens=LoadEstimate.MIN_TOKENS - 1).timed
    assert e.step(tokens=LoadEstimate.MIN_TOKENS).timed


def test_without_a_disk_no_step_is_timed() -> None:
    config = load_config(environ={}, host__num_blocks=HOST)
    leader = Leader(config, namespace=b"n" * 16, block_size=BLOCK, num_slots=HOST, ranks=1)
    assert not leader.take_orders(tokens=10_000).timed


def test_steps_planned_ahead_do_not_count_twice() -> None:
    """The asynchronous scheduler plans a step while the one before is computed."""
    e = Engine()
    e.step(tokens=1000)
    e.now += 1.0
    e.step(tokens=2000)
    e.now += 1.0
    e.report(0, timed=True)  # the first took 2 s
    e.now += 4.0
    e.report(0, timed=True)  # the second 4 s since then, not 5
    assert rate(e) == round((0.9 * 1000 + 2000) / (0.9 * 2 + 4), 6)


def test_a_report_on_a_step_that_was_not_timed_says_nothing() -> None:
    e = Engine()
    e.step(tokens=1000)
    e.report(0)
    e.report(1)
    assert rate(e) is None
    e.leader.receive([WorkerReport(0, HOST, HOST, timed=True), WorkerReport(1, HOST, HOST)])
    e.report(0, timed=True)  # nothing is under way
    assert e.leader.off_reason is None
    e.step(tokens=1000)
    e.now += 2.0
    e.report(0, timed=True)
    assert rate(e) == (0.9 * 1000 + 1000) / 2.0


def test_what_is_computed_sooner_is_not_read() -> None:
    e = Engine()
    e.run("a", 3)
    e.lose()
    e.step(tokens=1000)
    e.now += 0.001
    e.report(0, timed=True)
    e.arrive("b", 3)
    assert e.leader.match("b", 0, 3) is None  # reading was not measured yet
    (read,) = e.step().operations
    e.report(0, (Completion(read.id, read.positions[:0], seconds=1.0),))
    e.report(1, (Completion(read.id, read.positions[:0], seconds=3.0),))
    e.leader.finish("b", 0, [])
    e.lose()
    e.arrive("c", 3)
    assert e.leader.match("c", 0, 3) == 0
    assert e.disk.stats.declined_blocks == 3


def test_unless_that_is_not_wanted() -> None:
    e = Engine(disk__skip_slow_loads=False)
    e.run("a", 3)
    e.leader._estimate.computed(10**6, 1e-3)
    e.leader._estimate.read(1, 100.0, e.now)
    e.lose()
    e.arrive("c", 3)
    assert e.leader.match("c", 0, 3) is None


# ---- errors inside ----


def test_an_error_in_the_disk_tier_turns_caching_off() -> None:
    e = Engine()
    e.disk.fetch = None
    e.arrive("b", 3)
    assert e.leader.match("b", 0, 3) == 0
    assert e.leader.off_reason is not None
    assert not e.leader.has_work
    assert e.step(tokens=1000).operations == []


# ---- as the settings want it ----


def tier(**settings: Any) -> Any:
    defaults: dict[str, Any] = {"host__num_blocks": 100, "disk__num_blocks": 50}
    config = load_config(environ={}, **{**defaults, **settings})
    engine = Engine()
    return make_disk_tier(
        config,
        engine.leader.pool,
        capacity=50,
        record_bytes=1_000_000,
        ranks=1,
        ids=iter(range(10)),
        drop=lambda slots, fate: None,
        estimate=LoadEstimate(4),
    )


def test_the_filter_is_there_if_there_is_a_host_cache() -> None:
    assert tier()._admission is not None
    assert tier(disk__disable_filter=True)._admission is None
    assert tier(host__num_blocks=0)._admission is None
    assert tier(host__num_blocks=0, disk__disable_filter=False)._admission is not None
    assert tier(host__num_blocks=0, host__cache_gb=1)._admission is not None


def test_limits() -> None:
    limits = tier()._limits
    assert limits.max_queued_writes == limits.max_fetched_blocks == HOST // 2
    assert (limits.max_batch_blocks, limits.timeout_s) == (32, 10.0)
    limits = tier(disk__max_queued_blocks=3, disk__timeout_s=2, transfer__max_batch_blocks=5)._limits
    assert (limits.max_queued_writes, limits.max_batch_blocks, limits.timeout_s) == (3, 5, 2.0)


def test_budget_in_gigabytes() -> None:
    assert tier()._budget is None
    budget = tier(disk__write_gb_per_day=0.0035)._budget
    assert budget.take(10, 0.0) == 3


def test_policies() -> None:
    assert isinstance(tier().pool._policy, SegmentedLru)
    assert isinstance(tier(disk__policy="lru").pool._policy, Lru)
