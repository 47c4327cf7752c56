"""What users ask of running tiers: pins, which keep blocks, and prefetches."""

from typing import Any

import numpy as np
import pytest

from kvbm.logic.operations import Failure
from kvbm.runtime import upkeep
from tests.unit.observed_engine import BLOCK, READ, TIMEOUT_S, Engine, check_pool, tokens_of

A = tokens_of(4)
PROMPT_A = [*A, 7]
CLEARINGS: list[dict[str, Any]] = [{}, {"salt": "x"}]


# ---- pin


def pressure(e: Engine, times: int = 10) -> None:
    for i in range(times):
        e.serve(f"pressure {e.now} {i}", tokens_of(8, 10_000 + 100 * i + 7 * int(e.now)))


def test_a_pin_keeps_blocks_through_pressure_until_it_expires() -> None:
    e = Engine()
    e.serve("a", PROMPT_A)
    name, blocks = e.admin.pin(A, ttl_s=60.0)
    assert (blocks, e.leader.upkeep.pinned_blocks, e.admin.measure().pinned) == (4, 4, 4)
    pressure(e)
    assert e.in_host(A) == 4
    e.step(seconds=59.0)
    pressure(e)
    assert e.in_host(A) == 4
    e.step(seconds=1.0)
    assert e.leader.upkeep.pinned_blocks == 0
    pressure(e)
    assert e.in_host(A) == 0
    with pytest.raises(Exception, match="no pin"):
        e.admin.unpin(name)
    e.check_idle()


def test_unpinned_blocks_may_go() -> None:
    e = Engine()
    e.serve("a", PROMPT_A)
    name, _ = e.admin.pin(A, ttl_s=60.0)
    assert e.admin.unpin(name) == 4
    pressure(e)
    assert e.in_host(A) == 0
    e.check_idle()


def test_half_the_tier_can_be_pinned() -> None:
    e = Engine(host=10)
    e.serve("a", tokens_of(4))
    e.serve("b", tokens_of(4, 500))
    assert e.admin.pin(tokens_of(4), 60.0)[1] == 4
    name, blocks = e.admin.pin(tokens_of(4, 500), 60.0)
    assert blocks == 1, "its head"
    with pytest.raises(Exception, match="half of the tier is pinned already"):
        e.admin.pin(tokens_of(4, 500), 60.0)
    pressure(e)
    assert (e.in_host(tokens_of(4)), e.in_host(tokens_of(4, 500))) == (4, 1)
    e.admin.unpin(name)
    e.serve("b again", tokens_of(4, 500))
    assert e.admin.pin(tokens_of(4, 500), 60.0)[1] == 1


def test_two_pins_of_one_prefix() -> None:
    e = Engine()
    e.serve("a", PROMPT_A)
    one, two = e.admin.pin(A, 60.0)[0], e.admin.pin(A, 100.0)[0]
    assert one != two
    e.admin.unpin(one)
    pressure(e)
    assert e.in_host(A) == 4
    e.admin.unpin(two)
    pressure(e)
    assert e.in_host(A) == 0
    e.check_idle()


@pytest.mark.parametrize("clearing", [*CLEARINGS, {"tier": "host"}, None])
def test_a_clear_ends_pins(clearing: dict[str, Any] | None) -> None:
    """Otherwise they would keep the memory of what is gone."""
    e = Engine()
    e.serve("a", PROMPT_A, salt="x")
    name, _ = e.admin.pin(A, 60.0, salt="x")
    if clearing is None:
        e.leader.reset()
    else:
        e.admin.clear(**clearing)
    assert e.in_host(A, "x") == 0
    assert e.leader.upkeep.pinned_blocks == 0
    e.step()
    e.check_idle()
    assert e.pool.num_free == 16
    with pytest.raises(Exception, match="no pin"):
        e.admin.unpin(name)


def test_a_clear_of_another_salt_leaves_a_pin() -> None:
    e = Engine()
    e.serve("a", PROMPT_A)
    e.admin.pin(A, 60.0)
    e.admin.clear(salt="x")
    pressure(e)
    assert e.in_host(A) == 4


def test_a_smaller_tier_keeps_of_the_pins_what_fits() -> None:
    e = Engine(host=16)
    e.serve("a", tokens_of(4))
    e.serve("b", tokens_of(4, 500))
    e.admin.pin(tokens_of(4), 60.0)
    e.admin.pin(tokens_of(4, 500), 60.0)
    e.admin.resize("host", 6)
    assert e.leader.upkeep.pinned_blocks <= 3
    check_pool(e.pool)
    e.step(seconds=61.0)
    e.check_idle()


# ---- prefetch


def test_prefetch() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT_A)
    e.lose_host()
    e.serve("head", PROMPT_A[: BLOCK + 1])
    assert e.in_host(A) == 1
    assert e.admin.prefetch(A) == (1, 3)
    assert e.in_host(A) == 1
    (read,) = e.step().operations
    assert read.direction == READ
    assert len(read.host_slots) == 3
    e.step()
    e.done(read)
    e.step()
    assert e.in_host(A) == 4
    assert e.admin.prefetch(A) == (4, 0)
    record = e.serve("b", PROMPT_A)
    assert record.host_tokens == 16
    assert e.admin.prefetch(tokens_of(4, 9000)) == (0, 0)
    e.settle()
    e.check_idle()


def test_a_prefetch_of_an_idle_engine_begins_with_its_next_step() -> None:
    """However long that takes: nothing is late then, and the disk has not failed."""
    e = Engine(disk=32)
    e.serve("a", PROMPT_A)
    e.lose_host()
    for _ in range(5):
        assert e.admin.prefetch(A) == (0, 4)
    e.now += 100 * TIMEOUT_S
    (read,) = e.step().operations
    e.done(read)
    e.step()
    assert e.in_host(A) == 4
    assert not e.disk.stats.failures
    e.settle()
    e.check_idle()


def test_a_request_that_comes_before_its_prefetch_waits_for_it() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT_A)
    e.lose_host()
    e.admin.prefetch(A)
    (read,) = e.step().operations
    e.arrive("b", PROMPT_A)
    assert e.admit("b") is None
    e.done(read)
    assert e.admit("b") == 4
    e.settle()
    e.end("b")
    e.settle()
    e.check_idle()


def test_what_was_prefetched_may_be_evicted() -> None:
    e = Engine(disk=64)
    e.serve("a", PROMPT_A)
    e.lose_host()
    e.admin.prefetch(A)
    e.settle()
    assert e.in_host(A) == 4
    pressure(e)
    assert e.in_host(A) == 0
    e.check_idle()


def test_a_prefetch_before_the_disk_is_ready_waits_for_it() -> None:
    first = Engine(disk=32)
    first.serve("a", PROMPT_A)
    e = Engine(disk=32, host=16, ready=False)
    e.step()
    assert e.admin.prefetch(A) == (0, 0)
    e.step()
    e.find((np.array(list(first.store), np.int32), np.array(list(first.store.values()), np.uint64)))
    e.settle()
    assert e.in_host(A) == 4
    assert not e.leader.upkeep._prefetches
    e.check_idle()


@pytest.mark.parametrize("clearing", CLEARINGS)
def test_clear_in_the_midst_of_a_prefetch(clearing: dict[str, Any]) -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT_A, salt="x")
    e.lose_host()
    e.admin.prefetch(A, salt="x")
    reads = e.step().operations
    e.admin.clear(**clearing)
    e.done(*reads)
    e.settle()
    assert (e.in_host(A, "x"), e.on_disk(A, "x")) == (0, 0)
    assert not e.leader.upkeep._prefetches
    e.check_idle()


def test_a_prefetch_that_fails() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT_A)
    e.lose_host()
    e.admin.prefetch(A)
    (read,) = e.step().operations
    e.done(read, failed=[1], reason=Failure.CORRUPT)
    e.settle()
    assert e.in_host(A) == 1
    assert not e.leader.upkeep._prefetches
    e.check_idle()


def test_prefetches_that_wait_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "MAX_PREFETCHES", 3)
    e = Engine(disk=32)
    e.serve("a", PROMPT_A)
    e.lose_host()
    for _ in range(3):
        e.admin.prefetch(A)
    with pytest.raises(Exception, match="Too many prefetches"):
        e.admin.prefetch(A)
    e.settle()
    assert e.admin.prefetch(A) == (4, 0)
