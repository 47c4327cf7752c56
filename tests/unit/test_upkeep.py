"""What users ask of running tiers: clear and resize, in the midst of everything."""

from typing import Any

import numpy as np
import pytest

from kvbm.logic.hashing import salt_tag
from kvbm.logic.operations import Direction, Failure, Operation
from kvbm.logic.pool import UNKNOWN_TAG
from tests.unit.observed_engine import (
    OFFLOAD,
    ONBOARD,
    READ,
    WRITE,
    Engine,
    check_pool,
    tokens_of,
)

A, B = tokens_of(4), tokens_of(4, 500)
PROMPT_A, PROMPT_B = [*A, 7], [*B, 7]


def kinds(operations: list[Operation]) -> list[Direction]:
    return [operation.direction for operation in operations]


# ---- clear


def test_clear_of_everything() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT_A)
    e.serve("b", PROMPT_B, salt="x")
    assert e.admin.clear() == 16
    assert (e.in_host(A), e.on_disk(A), e.in_host(B, "x"), e.on_disk(B, "x")) == (0, 0, 0, 0)
    assert e.leader.has_work, "the ranks have to be told"
    e.step()
    assert (e.forgot_all, e.store) == (1, {})
    assert e.step().forget_all is False
    e.check_idle()
    assert e.restart().on_disk(A) == 0


def test_clear_of_the_host_tier_leaves_the_disk() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT_A)
    assert e.admin.clear("host") == 4
    assert (e.in_host(A), e.on_disk(A)) == (0, 4)
    assert e.serve("b", PROMPT_A).disk_tokens == 16
    assert (e.forgotten, e.forgot_all) == ([], 0)


def test_clear_of_the_disk_leaves_the_host_tier() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT_A)
    assert e.admin.clear("disk") == 4
    assert (e.in_host(A), e.on_disk(A)) == (4, 0)
    e.settle()
    assert (e.forgot_all, e.store) == (1, {})
    assert e.serve("b", PROMPT_A).host_tokens == 16
    assert e.restart().on_disk(A) == 4, "used again, and so written again"


def test_clear_of_a_salt_leaves_the_others() -> None:
    e = Engine(disk=64, host=32)
    for salt in (None, "x", "y", ""):
        e.serve(f"a {salt}", PROMPT_A, salt=salt)
    assert e.admin.clear(salt="x") == 8
    assert e.leader.has_work, "the ranks have to be told"
    e.settle()
    assert (e.in_host(A, "x"), e.on_disk(A, "x")) == (0, 0)
    for salt in (None, "y", ""):
        assert (e.in_host(A, salt), e.on_disk(A, salt)) == (4, 4)
    assert len(e.forgotten) == 4
    assert not e.forgot_all
    other = e.restart()
    assert [other.on_disk(A, salt) for salt in (None, "x", "y", "")] == [4, 0, 4, 4]
    e.check_idle()


def test_of_an_earlier_run_the_salts_are_not_known() -> None:
    """A salt is cleared for sure: with it goes what may be of it."""
    e = Engine(disk=32)
    e.serve("a", PROMPT_A, salt="x")
    e.serve("b", PROMPT_B)
    e = e.restart()
    assert (e.pool.tags(np.arange(8)) == UNKNOWN_TAG).all(), "the host tier was warmed up with it"
    assert e.serve("b", PROMPT_B).host_tokens == 16  # so it is known of these
    assert e.admin.clear(salt="x") == 8
    e.settle()
    assert (e.in_host(A, "x"), e.on_disk(A, "x")) == (0, 0)
    assert (e.in_host(B), e.on_disk(B)) == (4, 4)
    assert e.restart().on_disk(A, "x") == 0


@pytest.mark.parametrize("found", [0, 1])
def test_clear_of_a_salt_before_it_is_known_what_lies_on_disk(found: int) -> None:
    first = Engine(disk=32)
    first.serve("a", PROMPT_A, salt="x")
    e = Engine(disk=32, ready=False)
    e.store = dict(first.store)
    records = np.array(list(e.store), np.int32), np.array(list(e.store.values()), np.uint64)
    for rank in range(found):
        e.report(rank, found=records, found_all=True)
    e.step()
    assert e.admin.clear(salt="x") == 0
    e.step()
    assert (e.forgot_all, e.store) == (1, {})
    e.find(records)
    e.settle()
    assert e.disk.ready
    assert (e.in_host(A, "x"), e.on_disk(A, "x")) == (0, 0)
    e.serve("b", PROMPT_B)
    assert e.on_disk(B) == 4


CLEARINGS: list[dict[str, Any]] = [{}, {"salt": "x"}]


@pytest.mark.parametrize("clearing", CLEARINGS)
@pytest.mark.parametrize("moment", ["computed", "offload ordered", "offloaded", "write ordered", "written"])
def test_nothing_that_is_cleared_comes_back(moment: str, clearing: dict[str, Any]) -> None:
    """Cleared while a request runs, whose blocks are on their way: also not when the request goes on."""
    e = Engine(disk=32)
    e.arrive("a", PROMPT_A, salt="x")
    assert e.admit("a") == 0
    pending: list[Operation] = []
    e.leader.store([("a", 3)])
    if moment != "computed":
        pending = e.step().operations
        assert kinds(pending) == [OFFLOAD]
    if moment in ("offloaded", "write ordered", "written"):
        e.done(*pending)
        pending = []
    if moment in ("write ordered", "written"):
        pending = e.step().operations
        assert kinds(pending) == [WRITE]
    if moment == "written":
        e.done(*pending)
        pending = []
        assert e.on_disk(A, "x") == 3
    e.admin.clear(**clearing)

    def nothing() -> None:
        assert (e.in_host(A, "x"), e.on_disk(A, "x")) == (0, 0)
        check_pool(e.pool)
        check_pool(e.disk.pool)

    nothing()
    e.done(*pending)
    nothing()
    e.settle()
    nothing()
    e.compute("a")  # it goes on, and is not cached any more
    e.settle()
    nothing()
    e.end("a")
    e.settle()
    nothing()
    e.check_idle()
    assert e.store == {}
    other = e.restart()
    assert other.on_disk(A, "x") == 0
    # A new request starts anew.
    e.serve("b", PROMPT_A, salt="x")
    assert (e.in_host(A, "x"), e.on_disk(A, "x")) == (4, 4)


@pytest.mark.parametrize("clearing", [*CLEARINGS, {"tier": "host"}, {"tier": "disk"}])
def test_clear_while_blocks_come_from_disk(clearing: dict[str, Any]) -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT_A, salt="x")
    e.lose_host()
    e.arrive("b", PROMPT_A, salt="x")
    assert e.admit("b") is None
    reads = e.step().operations
    assert kinds(reads) == [READ]
    e.admin.clear(**clearing)
    e.done(*reads)
    if clearing == {"tier": "disk"}:
        assert e.admit("b") == 4, "on their way to the host tier, they are of it"
    else:
        assert e.admit("b") == 0
    assert e.on_disk(A, "x") == (4 if clearing == {"tier": "host"} else 0)
    e.settle()
    e.end("b", computed=0)
    e.settle()
    assert e.in_host(A, "x") == (4 if clearing == {"tier": "disk"} else 0)
    e.check_idle()


@pytest.mark.parametrize("clearing", CLEARINGS)
def test_clear_while_blocks_are_loaded(clearing: dict[str, Any]) -> None:
    """The load goes on: its memory is pinned. The request is not matched with them again."""
    e = Engine()
    e.serve("a", PROMPT_A, salt="x")
    e.arrive("b", PROMPT_A, salt="x")
    assert e.admit("b") == 4
    (load,) = e.step().operations
    assert load.direction == ONBOARD
    e.admin.clear(**clearing)
    e.serve("other", tokens_of(16, 2000))
    assert not set(load.host_slots.tolist()) & set(np.flatnonzero(e.pool.states(np.arange(16)) == 3).tolist())
    e.done(load)
    e.compute("b")
    e.end("b")
    e.settle()
    assert e.in_host(A, "x") == 0
    e.check_idle()


@pytest.mark.parametrize("reason", [Failure.TIMEOUT, Failure.ERROR])
def test_a_write_that_fails_on_one_rank_after_a_clear_is_forgotten_on_the_others(reason: Failure) -> None:
    e = Engine(disk=32)
    e.arrive("a", PROMPT_A, salt="x")
    e.admit("a")
    e.compute("a")
    e.done(*e.step().operations)
    (write,) = e.step().operations
    e.admin.clear(salt="x")
    e.forgotten.clear()
    e.step()
    assert sorted(e.forgotten) == sorted(write.disk_slots.tolist()), "at once, should all end now"
    e.forgotten.clear()
    e.done(write, failed=[0, 1, 2, 3], reason=reason)
    e.step()
    assert sorted(e.forgotten) == sorted(write.disk_slots.tolist()), "and when the write is over"


def test_requests_of_other_salts_are_cached_as_before() -> None:
    e = Engine()
    e.arrive("a", PROMPT_A)
    e.admit("a")
    e.leader.store([("a", 2)])
    e.settle()
    e.admin.clear(salt="x")
    e.compute("a")
    e.settle()
    e.end("a")
    assert e.in_host(A) == 4


@pytest.mark.parametrize("salt", ["", "x", "\ud800 is half a character", "ü" * 5000])
def test_every_salt_has_a_tag(salt: str) -> None:
    assert 0 < salt_tag(salt) < UNKNOWN_TAG
    assert salt_tag(None) == 0
    e = Engine()
    e.serve("a", PROMPT_A, salt=salt)
    assert e.leader.off_reason is None
    assert e.admin.clear(salt=salt) == 4


# ---- resize


def test_a_smaller_host_tier_and_a_larger_one_again() -> None:
    e = Engine(host=16)
    e.serve("a", tokens_of(12))
    assert e.admin.resize("host", 5) == 5
    assert e.pool.usable == 5
    assert e.pool.num_registered <= 5
    e.check_idle()
    e.serve("b", tokens_of(12, 900))
    assert e.pool.num_registered == 5
    e.check_idle()
    assert e.admin.resize("host", 16) == 16
    assert (e.pool.usable, e.pool.num_free) == (16, 11)
    e.serve("c", tokens_of(11, 2000))
    assert e.in_host(tokens_of(11, 2000)) == 11
    e.check_idle()


def test_a_smaller_host_tier_in_the_midst_of_everything() -> None:
    """Loads, offloads and a running request keep their memory until they are over, and lose their blocks."""
    e = Engine(host=16)
    e.serve("a", PROMPT_A)
    e.arrive("b", [*A, *B, 7])
    assert e.admit("b") == 4
    orders = e.step().operations
    assert kinds(orders) == [ONBOARD]
    e.compute("b")
    offloads = e.step().operations
    assert kinds(offloads) == [OFFLOAD]
    e.admin.resize("host", 3)
    check_pool(e.pool)
    assert e.in_host(A) <= 3
    busy = {slot for o in (*orders, *offloads) for slot in o.host_slots.tolist()}
    e.arrive("c", tokens_of(8, 3000))
    e.admit("c")
    e.compute("c")
    for operation in e.step().operations:
        assert not set(operation.host_slots.tolist()) & busy
        assert (operation.host_slots < 3).all()
        e.done(operation)
    e.done(*orders, *offloads)
    check_pool(e.pool)
    e.compute("b")
    e.settle()
    for id_ in "bc":
        e.end(id_)
    e.settle()
    e.check_idle()
    assert e.pool.num_registered + e.pool.num_free == 3
    assert e.leader.stats.failures == {}


def test_grown_while_what_was_given_up_is_still_in_use() -> None:
    e = Engine(host=8)
    e.arrive("a", tokens_of(8))
    e.admit("a")
    e.compute("a")
    offloads = e.step().operations
    e.admin.resize("host", 2)
    e.admin.resize("host", 8)
    check_pool(e.pool)
    assert e.pool.num_free == 0
    e.done(*offloads)
    check_pool(e.pool)
    assert e.in_host(tokens_of(8)) <= 2
    e.end("a", computed=0)
    e.check_idle()
    e.serve("b", tokens_of(8, 700))
    assert e.in_host(tokens_of(8, 700)) == 8


def test_the_limit_holds_while_memory_is_pinned() -> None:
    """The tier grows with the ranks' memory, and no further than it was told."""
    e = Engine(host=16)
    e.admin.resize("host", 6)
    e.leader.upkeep.host_has(16)
    assert e.pool.usable == 6
    e.admin.resize("host", 12)
    assert e.pool.usable == 12
    e.leader.upkeep._ready = 9
    e.admin.resize("host", 4)
    e.admin.resize("host", 16)
    assert e.pool.usable == 9
    check_pool(e.pool)


def test_a_smaller_disk_tier_is_forgotten_beyond() -> None:
    e = Engine(disk=32)
    for i in range(4):
        e.serve(str(i), tokens_of(6, 100 * i))
    assert e.disk.pool.num_registered == 24
    e.admin.resize("disk", 10)
    e.step()
    assert sorted(e.store) == list(range(10))
    assert e.disk.pool.num_registered == 10
    e.check_idle()
    other = e.restart()
    assert other.disk.pool.num_registered == 10
    e.serve("b", tokens_of(6, 900))
    assert e.disk.pool.num_registered == 10
    assert max(e.store) == 9
    e.admin.resize("disk", 32)
    e.serve("c", tokens_of(6, 2000))
    assert e.on_disk(tokens_of(6, 2000)) == 6
    assert e.disk.pool.num_registered == 16
    e.check_idle()


def test_a_smaller_disk_tier_while_it_is_read_and_written() -> None:
    e = Engine(disk=8)
    e.serve("a", PROMPT_A)
    e.lose_host()
    e.arrive("b", PROMPT_A)
    assert e.admit("b") is None
    reads = e.step().operations
    e.arrive("c", tokens_of(4, 900))
    e.admit("c")
    e.compute("c")
    e.done(*e.step().operations)
    writes = e.step().operations
    assert kinds(reads + writes) == [READ, WRITE]
    e.admin.resize("disk", 1)
    check_pool(e.disk.pool)
    e.done(*reads, *writes)
    check_pool(e.disk.pool)
    assert e.admit("b") == 4, "what was read is there"
    e.settle()
    for id_ in "bc":
        e.end(id_)
    e.settle()
    e.check_idle()
    assert set(e.store) <= {0}
    assert len(e.store) == e.disk.pool.num_registered


def test_a_disk_tier_that_is_made_smaller_before_it_is_ready() -> None:
    first = Engine(disk=32)
    first.serve("a", tokens_of(6))
    e = Engine(disk=32, ready=False)
    e.store = dict(first.store)
    assert e.admin.resize("disk", 4) == 4
    e.find((np.array(list(e.store), np.int32), np.array(list(e.store.values()), np.uint64)))
    e.settle()
    assert e.disk.pool.usable == 4
    assert e.disk.pool.num_registered == 4
    assert sorted(e.store) == [0, 1, 2, 3]
    assert e.pool.num_registered == 4, "the host tier is warmed up with what is left"
    assert not e.disk.stats.failures
    e.check_idle()
