"""The disk tier's logic: what is written when, what is read, and who waits for it."""

from itertools import pairwise

import pytest

from kvbm.logic.admission import FrequencyFilter, WriteBudget
from kvbm.logic.operations import Direction, Failure
from kvbm.logic.policies import Lru, SegmentedLru
from kvbm.logic.pool import BlockEvent, EventKind
from tests.unit.disk_tier import TIMEOUT_S, Tier, names, numbers_of, one

WRITE, READ = Direction.WRITE, Direction.READ
FAILURES = [Failure.TIMEOUT, Failure.UNAVAILABLE, Failure.ERROR]


# ---- writing ----


def test_written_when_seen_again() -> None:
    t = Tier(admission=FrequencyFilter(100))
    t.hold(1, 2)
    assert t.step() == []
    assert t.stats.not_admitted_blocks == 2
    t.hold(1, 2, 3)
    operation = one(t.step(), WRITE, 1, 2)
    assert operation.host_slots.tolist() == t.host.find(names(1, 2)).tolist()
    assert operation.disk_slots.tolist() == t.pool.find(names(1, 2)).tolist()
    assert (operation.timeout_s, len(operation.device_blocks)) == (TIMEOUT_S, 0)
    assert t.on_disk(1, 2) == []
    t.answer(operation, 0)
    assert t.on_disk(1, 2) == []
    t.answer(operation, 0)  # said twice
    assert t.on_disk(1, 2) == []
    assert t.tier.has_work
    t.answer(operation, 1)
    assert t.on_disk(1, 2, 3) == [1, 2]
    assert (t.stats.written_blocks, t.stats.not_admitted_blocks) == (2, 3)
    t.check_idle()


def test_the_filter_forgets_with_time() -> None:
    t = Tier(admission=FrequencyFilter(100))
    t.hold(1)
    t.step(seconds=599.0)
    t.hold(2)
    t.step(seconds=2.0)
    t.hold(1, 2)
    assert t.step() == []


def test_without_a_filter_everything_is_written() -> None:
    t = Tier()
    t.hold(1, 2)
    t.answer(one(t.step(), WRITE, 1, 2))
    assert t.on_disk(1, 2) == [1, 2]
    assert t.stats.not_admitted_blocks == 0


def test_what_is_on_disk_or_on_its_way_is_not_written_again() -> None:
    t = Tier()
    t.hold(1, 2)
    first = one(t.step(), WRITE, 1, 2)
    t.hold(1, 2, 3)
    second = one(t.step(), WRITE, 3)
    t.answer(first)
    t.answer(second)
    t.hold(1, 2, 3)
    assert t.step() == []
    assert t.stats.written_blocks == 3
    t.check_idle()


def test_what_is_used_again_stays_on_disk() -> None:
    t = Tier(disk=3)
    for number in (1, 2, 3):
        t.store(number)
    t.hold(1)
    t.store(4)
    assert t.on_disk(1, 2, 3, 4) == [1, 3, 4]


def test_batches() -> None:
    t = Tier(host=80, disk=80, max_batch_blocks=32)
    t.hold(*range(70))
    operations = t.step()
    assert [len(operation.host_slots) for operation in operations] == [32, 32, 6]
    assert [number for operation in operations for number in numbers_of(operation.hashes)] == list(range(70))
    assert len({operation.id for operation in operations}) == 3
    for operation in operations:
        assert operation.host_slots.tolist() == t.host.find(operation.hashes).tolist()
        assert operation.disk_slots.tolist() == t.pool.find(operation.hashes).tolist()
    t.answer(operations[1])
    assert t.on_disk(*range(70)) == list(range(32, 64))


def test_one_rank_that_fails_withdraws_the_block() -> None:
    t = Tier()
    t.hold(1, 2, 3)
    operation = one(t.step(), WRITE, 1, 2, 3)
    t.answer(operation, 1)
    t.answer(operation, 0, failed=[1], reason=Failure.ERROR)
    assert t.on_disk(1, 2, 3) == [1, 3]
    assert t.in_host(1, 2, 3) == [1, 2, 3]
    assert t.stats.failures == {(WRITE, Failure.ERROR): 1}
    assert t.stats.written_blocks == 2
    assert t.forgotten == []
    t.check_idle()


def test_a_host_block_whose_bytes_have_changed_is_dropped() -> None:
    t = Tier()
    t.hold(1, 2)
    operation = one(t.step(), WRITE, 1, 2)
    t.answer(operation, 0, failed=[0], reason=Failure.CORRUPT)
    t.answer(operation, 1)
    assert t.in_host(1, 2) == [2]
    assert t.on_disk(1, 2) == [2]
    t.check_idle()


def test_a_damaged_block_that_the_host_tier_has_dropped_meanwhile() -> None:
    t = Tier(host=2)
    t.hold(1, 2)
    operation = one(t.step(), WRITE, 1, 2)
    t.lose(1, 2)
    t.answer(operation, 0)
    t.answer(operation, 1, failed=[0], reason=Failure.CORRUPT)
    assert t.on_disk(1, 2) == [2]
    t.check_idle()


def test_the_queue_is_bounded() -> None:
    t = Tier(max_queued_writes=4, max_batch_blocks=3)
    t.hold(1, 2, 3)
    t.hold(4, 5, 6)
    first, second = t.step()
    assert numbers_of(second.hashes) == [4]
    assert t.stats.dropped_blocks == 2
    t.hold(5, 6)
    assert t.step() == []
    assert t.stats.dropped_blocks == 4
    t.answer(second)
    t.hold(5, 6)
    third = one(t.step(), WRITE, 5)
    t.fail(first)  # what has failed leaves the queue as well
    t.answer(third)
    t.hold(6, 7, 8, 9)
    assert sum(len(operation.host_slots) for operation in t.step()) == 4


def test_the_budget() -> None:
    t = Tier(budget=WriteBudget(5), max_queued_writes=4)
    t.hold(*range(6))
    t.answer(one(t.step(), WRITE, 0, 1, 2, 3))  # the queue takes no more: the budget is not used up by it
    t.hold(*range(6))
    t.answer(one(t.step(), WRITE, 4))
    t.hold(*range(6))
    assert t.step(seconds=3600.0) == []
    assert t.stats.dropped_blocks == 4
    t.step(seconds=24 * 3600.0)
    t.hold(*range(6))
    one(t.step(), WRITE, 5)


def test_a_full_tier_evicts() -> None:
    t = Tier(disk=4)
    t.store(1, 2, 3)
    t.store(4)
    removed: list[int] = []

    def hear(event: BlockEvent) -> None:
        assert event.tier == "disk"
        if event.kind == EventKind.REMOVED:
            removed.extend(numbers_of(event.hashes))

    t.pool.subscribe(hear)
    t.store(5, 6)
    assert removed == [3, 2]  # tail first
    t.store(7)
    assert t.on_disk(*range(1, 8)) == [4, 5, 6, 7]
    t.check_idle()


def test_a_tier_whose_blocks_are_all_in_use_drops_what_comes() -> None:
    t = Tier(disk=4, host=8)
    t.store(1, 2)
    t.hold(3)
    writing = one(t.step(), WRITE, 3)
    assert not t.fetch("r", 1, 2)
    reading = one(t.step(), READ, 1, 2)
    t.hold(4, 5)
    last = one(t.step(), WRITE, 4)
    assert t.stats.dropped_blocks == 1
    for operation in (writing, reading, last):
        t.answer(operation)
    t.hold(5)
    one(t.step(), WRITE, 5)


@pytest.mark.parametrize("policy", [Lru, SegmentedLru])
def test_a_host_block_stays_while_it_is_written(policy: type[Lru] | type[SegmentedLru]) -> None:
    t = Tier(host=4, host_policy=policy)
    t.hold(1, 2)
    operation = one(t.step(), WRITE, 1, 2)
    taken = t.host.allocate(4)
    assert len(taken) == 2
    t.host.release(taken)
    assert t.in_host(1, 2) == [1, 2]
    t.answer(operation)
    assert len(t.host.allocate(4)) == 4


def test_to_be_written_is_not_to_be_used_again() -> None:
    """In a segmented LRU a scan that is written to disk must not push out what requests use."""
    t = Tier(host=4, host_policy=SegmentedLru)
    t.hold(1, 2)
    t.hold(1, 2)  # wanted again
    for operation in t.step():
        t.answer(operation)
    for number in range(10, 20):
        t.hold(number)
        for operation in t.step():
            t.answer(operation)
    assert t.in_host(1, 2) == [1, 2]


# ---- failures ----


@pytest.mark.parametrize("reason", FAILURES)
def test_a_tier_that_fails_is_left_alone_longer_and_longer(reason: Failure) -> None:
    t = Tier(host=64, disk=400)
    t.store(500)
    block = iter(range(1, 400))

    def works() -> bool:
        """Whether it is written; the write fails."""
        t.hold(next(block))
        operations = t.step()
        for operation in operations:
            t.fail(operation, reason)
        return bool(operations)

    assert [works() for _ in range(5)] == [True, True, True, False, False]
    assert t.stats.dropped_blocks == 2
    for i, pause_s in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0)):
        assert t.fetch(f"r{i}", 500)  # nothing is read either
        t.step(seconds=pause_s - 0.01)
        assert not works()
        t.step(seconds=0.02)
        assert works()
        assert not works()
    assert t.stats.failures[WRITE, reason] == 11
    t.step(seconds=61.0)
    t.hold(399)
    t.answer(one(t.step(), WRITE, 399))  # it works again, and all begins anew
    assert [works() for _ in range(4)] == [True, True, True, False]
    t.step(seconds=1.01)
    assert works()


def test_reads_count_as_failures_too() -> None:
    t = Tier()
    t.store(1, 2, 3, 4)
    for i, number in enumerate((1, 2, 3)):
        assert not t.fetch(f"r{i}", number)
        t.fail(one(t.step(), READ, number), Failure.UNAVAILABLE)
    assert t.fetch("r4", 4)
    assert t.step() == []
    t.step(seconds=1.1)
    assert not t.fetch("r5", 4)


@pytest.mark.parametrize("reason", [Failure.CORRUPT, Failure.CANCELLED])
def test_what_is_no_fault_of_the_tier_is_no_reason_to_pause(reason: Failure) -> None:
    t = Tier(host=64, disk=64)
    for number in range(10):
        t.hold(number)
        t.fail(one(t.step(), WRITE, number), reason)
    assert t.stats.failures[WRITE, reason] == 10


def test_failures_in_a_row_only() -> None:
    t = Tier(host=64, disk=64)
    for number in range(0, 30, 3):
        for failing in (number, number + 1):
            t.hold(failing)
            t.fail(one(t.step(), WRITE, failing))
        t.hold(number + 2)
        t.answer(one(t.step(), WRITE, number + 2))


def test_operations_that_fail_together_are_one_reason_to_pause() -> None:
    """Many were under way when the tier broke: the pause does not grow with their number."""
    t = Tier(host=64, disk=64, max_batch_blocks=1)
    t.hold(*range(20))
    for operation in t.step():
        t.fail(operation)
    t.step(seconds=1.01)
    t.hold(30)
    assert len(t.step()) == 1


# ---- reading ----


def test_a_request_waits_until_its_blocks_are_there() -> None:
    t = Tier()
    slots = t.store(1, 2, 3)
    assert not t.fetch("r", 1, 2, 3)
    operation = one(t.step(), READ, 1, 2, 3)
    assert operation.disk_slots.tolist() == slots
    assert operation.timeout_s == TIMEOUT_S
    assert t.in_host(1, 2, 3) == []
    assert not t.fetch("r", 1, 2, 3)
    t.answer(operation, 1)
    assert not t.fetch("r", 1, 2, 3)
    assert t.in_host(1, 2, 3) == []
    t.answer(operation, 0)
    assert t.in_host(1, 2, 3) == [1, 2, 3]
    assert operation.host_slots.tolist() == t.host.match(names(1, 2, 3)).tolist()
    assert t.fetch("r", 1, 2, 3)
    assert t.fetch("r", 1, 2, 3)
    assert t.step() == []
    assert t.stats.read_blocks == 3
    assert t.on_disk(1, 2, 3) == [1, 2, 3]
    t.tier.finish("r")
    t.check_idle()


def test_nothing_on_disk_nothing_to_wait_for() -> None:
    t = Tier()
    t.store(2)
    t.hold(3)
    assert t.fetch("a", 1, 2)
    assert t.fetch("b", 3)
    assert t.fetch("c")
    assert all(operation.direction == WRITE for operation in t.step())


def test_up_to_the_first_gap() -> None:
    t = Tier()
    t.store(1, 2, 3, 5)
    t.hold(2)
    assert not t.fetch("r", 1, 2, 3, 4, 5)
    t.answer(one(t.step(), READ, 1, 3))
    assert t.fetch("r", 1, 2, 3, 4, 5)
    assert t.in_host(1, 2, 3, 4, 5) == [1, 2, 3]


def test_what_is_being_written_can_not_be_read_yet() -> None:
    t = Tier()
    t.store(1)
    t.hold(2)
    writing = one(t.step(), WRITE, 2)
    t.lose(2)
    assert not t.fetch("r", 1, 2)
    one(t.step(), READ, 1)
    t.answer(writing)


def test_what_was_fetched_stays_until_it_is_used() -> None:
    t = Tier(host=4)
    t.store(1, 2)
    t.hold(3)
    for operation in t.step():
        t.answer(operation)
    assert not t.fetch("r", 3, 1, 2)
    t.answer(one(t.step(), READ, 1, 2))
    assert t.fetch("r", 3, 1, 2)
    assert len(t.host.allocate(4)) == 1  # what is in the host tier ahead of them as well
    t.tier.release("r")
    assert len(t.host.allocate(4)) == 3
    assert t.fetch("r", 3, 1, 2)  # no second time
    assert t.step() == []


def test_the_head_of_what_was_fetched_stays_longest() -> None:
    t = Tier(host=4, max_batch_blocks=2)
    t.store(1, 2, 3, 4)
    assert not t.fetch("r", 1, 2, 3, 4)
    for operation in t.step():
        t.answer(operation)
    t.tier.release("r")
    for left in ([1, 2, 3], [1, 2], [1], []):
        t.host.allocate(1)
        assert t.in_host(1, 2, 3, 4) == left


def test_a_request_that_ends_while_its_blocks_are_read() -> None:
    t = Tier()
    t.store(1, 2)
    assert not t.fetch("r", 1, 2)
    operation = one(t.step(), READ, 1, 2)
    t.tier.finish("r")
    assert len(t.host.allocate(16)) == 14
    t.answer(operation)
    assert t.in_host(1, 2) == [1, 2]
    t.tier.finish("r")
    t.tier.release("r")
    assert not t.tier._fetches


def test_two_requests_read_the_same_blocks_once() -> None:
    t = Tier()
    t.store(1, 2, 3)
    assert not t.fetch("a", 1, 2)
    first = one(t.step(), READ, 1, 2)
    assert not t.fetch("b", 1, 2, 3)
    second = one(t.step(), READ, 3)
    assert not t.fetch("c", 1)
    assert t.step() == []
    t.answer(second)
    assert [t.fetch("a", 1, 2), t.fetch("b", 1, 2, 3), t.fetch("c", 1)] == [False] * 3
    t.answer(first)
    assert [t.fetch("a", 1, 2), t.fetch("b", 1, 2, 3), t.fetch("c", 1)] == [True] * 3
    assert t.stats.read_blocks == 3
    t.tier.finish("a")
    assert t.host.pins(t.host.match(names(1, 2, 3))).tolist() == [2, 1, 1]
    t.tier.finish("b")
    t.tier.finish("c")
    t.check_idle()


def test_blocks_on_disk_stay_while_they_are_read() -> None:
    t = Tier(disk=2)
    t.store(1, 2)
    assert not t.fetch("r", 1)
    operation = one(t.step(), READ, 1)
    t.store(3)
    t.hold(4, 5)  # only one of them finds room
    assert t.on_disk(1, 2, 3, 4, 5) == [1]
    t.answer(operation)


@pytest.mark.parametrize("policy", [Lru, SegmentedLru])
def test_what_was_read_leaves_the_disk_last(policy: type[Lru] | type[SegmentedLru]) -> None:
    t = Tier(disk=3, disk_policy=policy)
    for number in (1, 2, 3):
        t.store(number)
    assert not t.fetch("r", 1)
    t.answer(one(t.step(), READ, 1))
    t.store(4)
    t.store(5)
    assert t.on_disk(1, 2, 3, 4, 5) == [1, 4, 5]


def test_what_was_read_is_not_pushed_out_by_what_is_only_written() -> None:
    t = Tier(disk=4, disk_policy=SegmentedLru)
    for number in (1, 2, 3, 4):
        t.store(number)
    assert not t.fetch("r", 1)
    t.answer(one(t.step(), READ, 1))
    for number in range(10, 20):
        t.store(number)
    assert t.on_disk(1, 2, 3, 4) == [1]


def test_no_pin_is_left_where_the_host_tier_has_no_room_for_all() -> None:
    """The blocks behind the first that finds no room are let go, also those that are there."""
    t = Tier(host=4)
    t.store(1, 2)
    t.hold(3)
    for operation in t.step():
        t.answer(operation)
    busy = t.host.allocate(2)
    assert not t.fetch("r", 1, 2, 3)
    t.answer(one(t.step(), READ, 1))
    assert t.fetch("r", 1, 2, 3)
    t.tier.finish("r")
    t.host.release(busy)
    t.check_idle()


def test_the_host_tier_has_no_room() -> None:
    t = Tier(host=4)
    t.store(1, 2, 3)
    busy = t.host.allocate(2)
    assert not t.fetch("r", 1, 2, 3)
    t.answer(one(t.step(), READ, 1, 2))
    assert t.fetch("r", 1, 2, 3)
    more = t.host.allocate(4)
    assert len(more) == 0
    assert t.fetch("s", 3)
    assert t.step() == []
    t.host.release(busy)


def test_no_more_is_fetched_than_allowed() -> None:
    t = Tier(max_fetched_blocks=5)
    t.store(1, 2, 3)
    t.store(4, 5, 6, 7)
    assert not t.fetch("a", 1, 2, 3)
    first = one(t.step(), READ, 1, 2, 3)
    assert not t.fetch("b", 4, 5, 6, 7)
    second = one(t.step(), READ, 4, 5)
    assert t.fetch("c", 6)
    assert not t.fetch("d", 1, 6)  # what others read costs nothing
    assert t.step() == []
    t.answer(first)
    t.answer(second)
    assert t.fetch("e", 6)  # they are still kept
    t.tier.release("a")
    assert not t.fetch("f", 6)
    t.answer(one(t.step(), READ, 6))
    for request in "abcdef":
        t.tier.finish(request)
    t.check_idle()


# ---- reads that fail ----


@pytest.mark.parametrize("reason", [*FAILURES, Failure.CORRUPT])
def test_a_read_that_fails_is_a_miss(reason: Failure) -> None:
    t = Tier()
    slots = t.store(1, 2, 3)
    assert not t.fetch("r", 1, 2, 3)
    operation = one(t.step(), READ, 1, 2, 3)
    t.answer(operation, 0, failed=[1], reason=reason)
    t.answer(operation, 1)
    assert t.fetch("r", 1, 2, 3)
    assert t.in_host(1, 2, 3) == [1, 3]
    assert t.stats.failures == {(READ, reason): 1}
    assert t.stats.read_blocks == 2
    forgotten = reason >= Failure.ERROR
    assert t.on_disk(1, 2, 3) == ([1, 3] if forgotten else [1, 2, 3])
    t.step()
    assert t.forgotten == ([slots[1]] if forgotten else [])
    t.tier.finish("r")
    t.check_idle()
    assert t.fetch("s", 1, 2, 3) == forgotten
    assert len(t.step()) == (not forgotten)


def test_who_waits_for_what_comes_after_a_lost_block_goes_on() -> None:
    t = Tier(max_batch_blocks=1)
    t.store(1, 2, 3)
    assert not t.fetch("r", 1, 2, 3)
    first, second, third = t.step()
    t.fail(second)
    assert not t.fetch("r", 1, 2, 3)
    t.answer(first)
    assert t.fetch("r", 1, 2, 3)
    assert t.in_host(1, 2, 3) == [1]
    t.answer(third)
    t.tier.finish("r")
    t.check_idle()


def test_a_record_that_is_damaged_for_two_readers() -> None:
    t = Tier()
    slots = t.store(1)
    assert not t.fetch("a", 1)
    first = one(t.step(), READ, 1)
    t.answer(first, 0, failed=[0], reason=Failure.TIMEOUT, quiesced=False)
    assert not t.fetch("b", 1)
    second = one(t.step(), READ, 1)
    assert first.host_slots.tolist() != second.host_slots.tolist()
    t.fail(second, Failure.CORRUPT)
    assert t.on_disk(1) == []
    t.hold(1)
    writing = one(t.step(), WRITE, 1)
    assert writing.disk_slots.tolist() != slots  # which the first may still read
    t.answer(writing)
    t.fail(first, Failure.CORRUPT)
    assert t.on_disk(1) == [1]
    t.step()
    assert t.forgotten == slots
    for request in "ab":
        t.tier.finish(request)
    t.check_idle()


def test_ids_are_never_used_twice() -> None:
    t = Tier(max_batch_blocks=1)
    t.hold(1, 2, 3)
    ids = [operation.id for operation in t.step()]
    assert all(a < b for a, b in pairwise(ids))
