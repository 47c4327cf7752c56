"""The disk tier at start, when it is cleared, and when it is turned off."""

import numpy as np
import pytest

from kvbm.logic import disk as disk_module
from kvbm.logic.admission import FrequencyFilter
from kvbm.logic.operations import Direction, Failure
from kvbm.logic.policies import Lru, SegmentedLru
from kvbm.logic.pool import BlockEvent, EventKind
from tests.unit.disk_tier import TIMEOUT_S, Tier, names, numbers_of, one

WRITE, READ = Direction.WRITE, Direction.READ
RECORDS = [(3, 1), (9, 2), (0, 3), (31, 4)]  # slot and block, those to be evicted first come first


def settle(t: Tier) -> list[int]:
    """Steps until the restored tier is ready; the blocks that are read into the host tier."""
    read = []
    for _ in range(10):
        for operation in t.step():
            read += numbers_of(operation.hashes) if operation.direction == READ else []
            t.answer(operation)
    return read


# ---- what was found ----


def test_what_all_ranks_have_is_there_again() -> None:
    t = Tier(ready=False)
    assert t.tier.restoring
    assert t.tier.has_work
    assert not t.tier.ready
    t.step()
    t.found(0, RECORDS)
    t.step()
    assert not t.fetch("r", 1)
    t.found(1, RECORDS)
    settle(t)
    assert t.tier.ready
    assert not t.tier.restoring
    assert t.on_disk(1, 2, 3, 4, 5) == [1, 2, 3, 4]
    assert t.pool.find(names(1, 2, 3, 4)).tolist() == [3, 9, 0, 31]
    assert t.stats.recovered_blocks == 4
    t.tier.finish("r")
    t.check_idle()


def test_what_was_stored_meanwhile_is_written_unless_it_was_found() -> None:
    t = Tier(ranks=1, ready=False)
    t.hold(1, 2, 3)
    t.found(0, [(0, 2)])
    orders = [operation for _ in range(3) for operation in t.step()]
    one(orders, WRITE, 1, 3)


def test_what_only_some_ranks_have_is_not() -> None:
    t = Tier(ranks=3, ready=False, host=4)
    t.found(0, [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)])
    t.found(1, [(5, 5), (1, 1), (2, 22), (4, 4), (6, 6)])
    t.found(2, [(1, 1), (2, 2), (3, 3), (4, 44), (5, 5), (6, 6)])
    settle(t)
    assert t.on_disk(1, 2, 3, 4, 5, 6, 22, 44) == [1, 5]
    assert t.stats.recovered_blocks == 2
    t.check_idle()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_rank_of_another_opinion_is_not_outvoted(order: tuple[int, ...]) -> None:
    t = Tier(ranks=3, ready=False)
    for rank in order:
        t.found(rank, [(1, 11 if rank == 1 else 1)])
    settle(t)
    assert t.on_disk(1, 11) == []
    assert t.pool.num_free == t.pool.capacity


def test_blocks_in_other_slots_are_not_the_same() -> None:
    t = Tier(ready=False)
    t.found(0, [(1, 1)])
    t.found(1, [(2, 1)])
    settle(t)
    assert t.on_disk(1) == []


def test_records_beyond_the_tier_are_passed_over() -> None:
    t = Tier(ready=False, disk=8)
    for rank in range(2):
        t.found(rank, [(7, 1), (8, 2), (1000, 3), (-1, 4)])
    settle(t)
    assert t.on_disk(1, 2, 3, 4) == [1]
    t.check_idle()


def test_nothing_found() -> None:
    t = Tier(ready=False)
    t.found(0)
    t.step()
    assert not t.tier.ready
    t.found(1)
    t.step()
    assert t.tier.ready
    assert t.pool.num_free == t.pool.capacity
    assert not t.tier.has_work


def test_pieces() -> None:
    t = Tier(ready=False)
    t.found(0, RECORDS[:1], last=False)
    t.found(1, RECORDS[:3], last=False)
    t.found(0, RECORDS[1:2], last=False)
    t.found(1, RECORDS[3:])
    assert t.step() == []
    assert t.tier.restoring
    t.found(0, RECORDS[2:], last=False)
    t.step()
    assert not t.tier.ready
    t.found(0)
    settle(t)
    assert t.on_disk(1, 2, 3, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_a_step_takes_in_only_so_many(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_ADOPT_AT_ONCE", at_once)
    t = Tier(ready=False)
    t.found(0, RECORDS)
    t.found(1, RECORDS)
    known, operations = [], []
    while not t.tier.ready:
        assert t.tier.restoring
        operations = t.step()
        known.append(len(t.on_disk(1, 2, 3, 4)))
    assert known == [*range(at_once, 4, at_once), 4, 4]
    t.answer(one(operations, READ, 4, 3, 2, 1))
    t.check_idle()


@pytest.mark.parametrize("policy", [Lru, SegmentedLru])
def test_the_order_of_eviction_is_kept(policy: type[Lru] | type[SegmentedLru]) -> None:
    t = Tier(ready=False, disk=4, host=16, disk_policy=policy)
    busy = t.host.allocate(16)  # nothing is read into the host tier
    order = [(2, 1), (0, 2), (3, 3), (1, 4)]
    t.found(1, order[::-1])
    t.found(0, order)
    settle(t)
    t.host.release(busy)
    for number in range(4):
        t.store(10 + number)
        assert t.on_disk(1, 2, 3, 4) == [1, 2, 3, 4][number + 1 :]


def test_the_rest_of_the_tier_is_free() -> None:
    t = Tier(ready=False, disk=6)
    for rank in range(2):
        t.found(rank, [(1, 1), (4, 2)])
    settle(t)
    slots = t.store(10, 11, 12, 13)
    assert sorted(slots) == [0, 2, 3, 5]
    assert t.on_disk(1, 2) == [1, 2]
    t.check_idle()


def test_subscribers_hear_of_what_was_found() -> None:
    t = Tier(ready=False)
    heard: list[int] = []

    def hear(event: BlockEvent) -> None:
        assert (event.kind, event.tier) == (EventKind.STORED, "disk")
        heard.extend(numbers_of(event.hashes))

    t.pool.subscribe(hear)
    for rank in range(2):
        t.found(rank, RECORDS)
    settle(t)
    assert heard == [1, 2, 3, 4]


def test_what_is_found_later_is_ignored() -> None:
    """A rank's I/O process was started again."""
    t = Tier()
    t.store(1)
    t.found(0, [(5, 7)])
    t.found(1, [(5, 7)])
    t.step()
    assert t.on_disk(1, 7) == [1]
    assert t.tier.ready


# ---- warming up ----


def test_the_newest_are_read_into_the_host_tier() -> None:
    t = Tier(ready=False, host=8)
    for rank in range(2):
        t.found(rank, [(slot, slot) for slot in range(20)])
    assert settle(t) == [19, 18, 17, 16]  # half of the free host tier; heads, which are evicted last, first
    assert t.in_host(*range(20)) == [16, 17, 18, 19]
    assert t.stats.read_blocks == 4
    for left in ([17, 18, 19], [18, 19], [19]):
        t.host.allocate(t.host.num_free + 1)
        assert t.in_host(*range(20)) == left


def test_no_more_than_may_be_fetched() -> None:
    t = Tier(ready=False, host=16, max_fetched_blocks=3)
    for rank in range(2):
        t.found(rank, RECORDS)
    assert settle(t) == [4, 3, 2]
    t.check_idle()


def test_what_the_host_tier_has_already_is_not_read() -> None:
    t = Tier(ready=False)
    t.hold(2, 4)
    for rank in range(2):
        t.found(rank, RECORDS)
    assert settle(t) == [3, 1]
    assert t.in_host(1, 2, 3, 4) == [1, 2, 3, 4]
    t.check_idle()


def test_warming_up_may_fail() -> None:
    t = Tier(ready=False)
    for rank in range(2):
        t.found(rank, RECORDS)
    operations = []
    while not operations:
        operations = t.step()
    t.answer(operations[0], 0, failed=[1], reason=Failure.CORRUPT)
    t.answer(operations[0], 1)
    assert t.in_host(1, 2, 3, 4) == [1, 2, 4]
    assert t.on_disk(1, 2, 3, 4) == [1, 2, 4]
    t.check_idle()


def test_a_request_that_wants_what_is_being_read_waits_for_that() -> None:
    t = Tier(ready=False)
    for rank in range(2):
        t.found(rank, RECORDS)
    operations = []
    while not operations:
        operations = t.step()
    assert not t.fetch("r", 1, 2)
    assert t.step() == []
    t.answer(operations[0])
    assert t.fetch("r", 1, 2)


# ---- patience ----


def test_requests_wait_for_what_may_be_found() -> None:
    t = Tier(ready=False, patience_s=5.0)
    assert not t.fetch("a", 1)
    t.step()
    t.found(0, RECORDS)
    t.step(seconds=4.9)
    assert not t.fetch("a", 1)
    assert t.tier.has_work
    t.step(seconds=0.2)
    assert t.fetch("a", 1)
    assert not t.tier.has_work
    t.hold(5)
    assert t.step() == []
    t.found(1, RECORDS)
    settle(t)
    assert t.tier.ready
    assert t.on_disk(1) == [1]
    assert t.fetch("a", 1)  # it has got its answer
    t.lose(1)
    assert not t.fetch("b", 1)


def test_patience_is_counted_from_the_first_step() -> None:
    t = Tier(ready=False, patience_s=5.0)
    t.step(seconds=1000.0)
    assert t.tier.restoring
    t.step(seconds=5.0)
    assert not t.tier.restoring


def test_nothing_is_written_before_it_is_known_what_is_there() -> None:
    t = Tier(ready=False)
    t.hold(1, 2)
    assert t.step() == []
    t.found(0)
    assert t.step() == []
    t.found(1)
    one(t.step(), WRITE, 1, 2)


# ---- off ----


def test_turned_off() -> None:
    t = Tier(admission=FrequencyFilter(10))
    t.tier.turn_off("first")
    t.tier.turn_off("second")
    assert t.tier.off_reason == "first"
    assert not t.tier.ready
    t.hold(1)
    t.hold(1)
    assert t.fetch("r", 1)
    assert t.step() == []
    t.tier.finish("r")
    t.check_idle()


def test_turned_off_while_restoring() -> None:
    t = Tier(ready=False)
    assert not t.fetch("r", 1)
    t.tier.turn_off("no drive")
    assert not t.tier.restoring
    assert not t.tier.has_work
    assert t.fetch("r", 1)


# ---- clearing ----


def test_clear() -> None:
    t = Tier()
    t.store(1, 2)
    t.tier.clear()
    assert t.on_disk(1, 2) == []
    assert t.fetch("r", 1, 2)
    t.tier.finish("r")
    t.store(1, 3)
    t.check_idle()


def test_clear_while_a_write_is_under_way() -> None:
    t = Tier(disk=4)
    t.hold(1)
    operation = one(t.step(), WRITE, 1)
    t.tier.clear()
    t.hold(2, 3, 4, 5)
    later = one(t.step(), WRITE, 2, 3, 4)  # the first one's slot may still be written
    assert not set(later.disk_slots.tolist()) & set(operation.disk_slots.tolist())
    t.answer(operation)
    assert t.on_disk(1) == []
    t.answer(later)
    assert t.on_disk(2, 3, 4) == [2, 3, 4]
    t.check_idle()


def test_what_no_rank_has_heard_of_is_not_written() -> None:
    t = Tier(max_batch_blocks=1)
    t.store(9)
    t.hold(1, 2)
    assert not t.fetch("r", 9)
    t.tier.clear()
    read = one(t.step(), READ, 9)
    t.fail(read)
    t.tier.finish("r")
    t.check_idle()
    assert t.on_disk(1, 2) == []
    assert t.stats.written_blocks == 1


@pytest.mark.parametrize("host_too", [True, False])
def test_clear_while_a_request_waits(host_too: bool) -> None:
    t = Tier()
    t.store(1, 2)
    assert not t.fetch("r", 1, 2)
    operation = one(t.step(), READ, 1, 2)
    if host_too:
        t.host.clear()
    t.tier.clear()
    assert t.fetch("r", 1, 2) == host_too
    taken = t.host.allocate(16)
    assert len(taken) == 14
    t.host.release(taken)
    t.answer(operation)
    assert t.in_host(1, 2) == ([] if host_too else [1, 2])
    assert t.on_disk(1, 2) == []
    t.tier.finish("r")
    t.check_idle()


def test_a_damaged_record_of_before_the_clearing_is_not_forgotten_twice() -> None:
    """Its slot may hold another block by then."""
    t = Tier(disk=2)
    t.store(1)
    assert not t.fetch("r", 1)
    operation = one(t.step(), READ, 1)
    t.tier.clear()
    t.store(3)
    t.fail(operation, Failure.CORRUPT)
    t.step()
    assert t.forgotten == []
    assert t.on_disk(3) == [3]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("all_found", [True, False])
def test_clear_while_restoring(steps: int, all_found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_ADOPT_AT_ONCE", 1)
    t = Tier(ready=False)
    t.found(0, RECORDS)
    t.found(1, RECORDS[:2], last=False)
    if all_found:
        t.found(1, RECORDS[2:])
    operations = [operation for _ in range(steps) for operation in t.step()]
    t.host.clear()
    t.tier.clear()
    assert t.on_disk(1, 2, 3, 4) == []
    if not all_found:
        t.found(1, RECORDS[2:])
    for _ in range(10):
        operations += t.step()
    for operation in operations:
        t.fail(operation)
    assert t.tier.ready
    assert t.on_disk(1, 2, 3, 4) == []
    assert t.pool.num_free == t.pool.capacity == len(set(t.pool.allocate(100).tolist()))


def test_clear_before_anything_is_known() -> None:
    t = Tier(ready=False)
    t.tier.clear()
    t.step()
    for rank in range(2):
        t.found(rank, RECORDS)
    assert settle(t) == []
    assert t.tier.ready
    assert t.on_disk(1, 2, 3, 4) == []
    t.check_idle()


def test_clear_while_late_reports_are_due() -> None:
    t = Tier(disk=2)
    t.store(1)
    t.hold(2)
    writing = one(t.step(), WRITE, 2)
    assert not t.fetch("r", 1)
    reading = one(t.step(), READ, 1)
    t.step(seconds=2 * TIMEOUT_S + 1)
    t.tier.finish("r")
    t.host.clear()
    t.tier.clear()
    assert len(t.pool.allocate(2)) == 0
    assert len(t.host.allocate(16)) == 14
    t.answer(writing)
    t.answer(reading)
    assert len(t.pool.allocate(2)) == 2
    assert t.tier.stats.written_blocks == 1


def test_states_of_slots_beyond_are_not_touched() -> None:
    t = Tier(ready=False)
    for rank in range(2):
        t.found(rank, RECORDS)
    t.step()
    assert not t.tier.ready  # taken in, not in use yet
    t.tier.clear()
    assert len(t.pool.allocate(5)) == 0
    t.step()
    taken = t.pool.allocate(100)
    assert sorted(taken.tolist()) == list(np.arange(t.pool.capacity))
