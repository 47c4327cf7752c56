"""The disk tier's logic: what takes too long, and what does not pay."""

import numpy as np
import pytest

from kvbm.logic.estimate import LoadEstimate
from kvbm.logic.operations import Direction, Failure
from tests.unit.disk_tier import TIMEOUT_S, Tier, names, one

WRITE, READ = Direction.WRITE, Direction.READ


# ---- what takes too long ----


def test_a_request_does_not_wait_for_ever() -> None:
    t = Tier()
    t.store(1)
    assert not t.fetch("r", 1)
    operation = one(t.step(), READ, 1)
    t.step(seconds=2 * TIMEOUT_S - 0.1)
    assert not t.fetch("r", 1)
    t.step(seconds=0.2)
    assert t.fetch("r", 1)
    assert t.in_host(1) == []
    assert not t.tier.has_work  # nobody waits for it
    t.tier.finish("r")
    taken = t.host.allocate(16)
    assert len(taken) == 15  # but the slot may still be written
    assert operation.host_slots[0] not in taken
    t.host.release(taken)
    t.answer(operation)
    assert t.in_host(1) == []
    assert t.on_disk(1) == [1]
    assert t.stats.failures == {(READ, Failure.TIMEOUT): 1}
    t.check_idle()


@pytest.mark.parametrize("direction", [WRITE, READ])
@pytest.mark.parametrize("late", [Failure.NONE, Failure.ERROR])
def test_slots_stay_out_of_use_until_the_late_report(direction: Direction, late: Failure) -> None:
    t = Tier(host=4, disk=2)
    if direction == WRITE:
        t.hold(1)
    else:
        t.store(1)
        assert not t.fetch("r", 1)
    operation = one(t.step(), direction, 1)
    t.answer(operation, 0)
    t.answer(operation, 1, failed=[0], reason=Failure.TIMEOUT, quiesced=False)
    assert t.fetch("r", 1)
    t.tier.finish("r")
    assert not t.tier.has_work
    (slot,), (disk_slot,) = operation.host_slots.tolist(), operation.disk_slots.tolist()
    if direction == WRITE:
        assert t.in_host(1) == [1]
        assert t.on_disk(1) == []
        t.lose(1)
    else:
        assert t.in_host(1) == []
        assert t.on_disk(1) == [1]
    taken = t.host.allocate(4)
    assert len(taken) == 3
    assert slot not in taken
    t.host.release(taken)
    t.hold(2, 3)  # others come and go meanwhile: one finds room on disk
    other = one(t.step(), WRITE, 2)
    assert disk_slot not in other.disk_slots.tolist()
    t.answer(other)
    if late:
        t.answer(operation, 1, failed=[0], reason=late)
    else:
        t.answer(operation, 1)
    t.step()
    assert t.in_host(1) == []
    assert t.on_disk(1) == ([1] if direction == READ and not late else [])
    t.check_idle()


def test_a_write_that_hangs_is_made_again_elsewhere() -> None:
    t = Tier()
    t.hold(1)
    first = one(t.step(), WRITE, 1)
    t.step(seconds=2 * TIMEOUT_S + 0.1)
    assert not t.tier.has_work
    t.hold(1)
    second = one(t.step(), WRITE, 1)
    assert first.disk_slots.tolist() != second.disk_slots.tolist()
    t.answer(first)
    assert t.on_disk(1) == []
    t.answer(second)
    assert t.on_disk(1) == [1]
    assert t.pool.find(names(1)).tolist() == second.disk_slots.tolist()
    assert t.stats.failures == {(WRITE, Failure.TIMEOUT): 1}
    t.check_idle()


def test_each_operation_has_its_own_deadline() -> None:
    t = Tier()
    t.hold(1)
    first = one(t.step(), WRITE, 1)
    t.step(seconds=TIMEOUT_S)
    t.hold(2)
    second = one(t.step(), WRITE, 2)
    t.step(seconds=TIMEOUT_S + 0.1)
    t.answer(second)
    t.answer(first)
    assert t.on_disk(1, 2) == [2]
    t.check_idle()


def test_time_that_has_passed_without_a_step_is_nobodys_fault() -> None:
    """An engine without requests makes no steps. The next request comes an hour later, before the step."""
    t = Tier()
    t.store(1)
    t.now += 3600.0
    t.tier.wake(t.now)
    assert not t.fetch("r", 1)
    operation = one(t.step(), READ, 1)
    assert not t.fetch("r", 1)
    t.step(seconds=TIMEOUT_S)
    assert not t.fetch("r", 1)
    t.answer(operation)
    assert t.in_host(1) == [1]
    assert not t.stats.failures


def test_reports_on_unknown_operations_are_ignored() -> None:
    t = Tier()
    t.hold(1)
    operation = one(t.step(), WRITE, 1)
    t.answer(operation)
    t.fail(operation)
    assert t.on_disk(1) == [1]
    t.check_idle()


# ---- what pays ----


def measured(reading: float, computing: float) -> LoadEstimate:
    """Blocks per second, both."""
    result = LoadEstimate(16)
    result.read(1000, 1000 / reading, 100.0)
    result.computed(16_000, 1000 / computing)
    return result


def test_what_is_sooner_computed_is_not_read() -> None:
    t = Tier(estimate=measured(reading=10, computing=1000))
    t.store(1, 2, 3)
    assert t.fetch("r", 1, 2, 3)
    assert t.step() == []
    assert t.stats.declined_blocks == 3
    t.hold(1)
    assert t.fetch("s", 1, 2, 3)  # what the host tier has is matched there
    assert t.stats.declined_blocks == 5


def test_a_part_may_pay() -> None:
    t = Tier(estimate=measured(reading=10, computing=25))
    t.store(1, 2, 3, 4, 5, 6)
    t.hold(2, 3, 4)
    assert not t.fetch("r", 1, 2, 3, 4, 5, 6)
    one(t.step(), READ, 1)
    assert t.stats.declined_blocks == 2


def test_what_others_wait_for_counts() -> None:
    t = Tier(host=64, estimate=measured(reading=100, computing=50))
    t.store(*range(20))
    t.store(30)
    assert not t.fetch("a", *range(20))
    assert t.fetch("b", 30)
    assert t.stats.declined_blocks == 1
    for operation in t.step():
        t.answer(operation)
    assert not t.fetch("c", 30)


def test_it_is_measured_what_reading_takes() -> None:
    estimate = LoadEstimate(16)
    t = Tier(estimate=estimate)
    t.store(1, 2, 3, 4)
    assert estimate.patience_s(1) == np.inf
    assert not t.fetch("r", 1, 2, 3, 4)
    operation = one(t.step(), READ, 1, 2, 3, 4)
    t.answer(operation, 0, seconds=2.0)
    t.answer(operation, 1, seconds=1.0)
    assert estimate.patience_s(4) == pytest.approx(LoadEstimate.PATIENCE_S + LoadEstimate.PATIENCE * 2.0)


def test_a_request_waits_as_long_as_it_should_take() -> None:
    t = Tier(estimate=measured(reading=2, computing=1))
    t.store(1, 2)
    assert not t.fetch("r", 1, 2)
    t.step(seconds=LoadEstimate.PATIENCE_S + LoadEstimate.PATIENCE * 1.0 - 0.1)
    assert not t.fetch("r", 1, 2)
    t.step(seconds=0.2)
    assert t.fetch("r", 1, 2)
    assert t.tier.has_work
