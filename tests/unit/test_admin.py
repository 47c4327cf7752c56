"""What people and programs may ask of a running leader: numbers that agree with what was done; refusals."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvbm.errors import StateError, UsageError
from kvbm.logic.operations import Failure
from kvbm.observe.measurements import EdgeState, TierState
from kvbm.runtime.admin import Admin
from kvbm.runtime.messages import WorkerReport
from tests.unit.observed_engine import BLOCK, BLOCK_BYTES, DISK_BLOCK_BYTES, Engine, tokens_of

PROMPT = [*tokens_of(4), 7]


def edges_of(e: Engine) -> dict[str, EdgeState]:
    return {edge.edge: edge for edge in e.admin.measure().edges}


def tiers_of(e: Engine) -> dict[str, TierState]:
    return {tier.tier: tier for tier in e.admin.measure().tiers}


def test_measurements_of_a_host_tier() -> None:
    e = Engine(host=8)
    e.serve("a", PROMPT)
    e.serve("b", PROMPT)
    e.serve("c", tokens_of(6, 500))
    e.leader.refuse("pooling request", "d", 10)
    seen = e.admin.measure()
    assert (seen.engine, seen.block_size, seen.ready, seen.off_reason) == ("e1", BLOCK, True, None)
    assert seen.tiers == [TierState("host", 8, 8, 8, 0, 2, BLOCK_BYTES)]
    assert [edge.edge for edge in seen.edges] == ["offload", "onboard"]
    edges = edges_of(e)
    assert (edges["offload"].done.operations, edges["offload"].done.blocks) == (2, 10)
    assert (edges["onboard"].done.operations, edges["onboard"].done.blocks) == (1, 4)
    assert {edge.queued for edge in seen.edges} == {0}
    assert {edge.block_bytes for edge in seen.edges} == {BLOCK_BYTES}
    assert (seen.totals.requests, seen.totals.host_tokens, seen.totals.disk_tokens) == (4, 16, 0)
    assert (seen.host_rate.hits, seen.host_rate.wanted) == (4, 4 + 4 + 5)
    assert seen.requests_not_cached == {"pooling request": 1}
    assert (seen.disk_off_reason, seen.not_admitted, seen.pinned) == (None, 0, 0)


def test_measurements_of_a_disk_tier() -> None:
    e = Engine(disk=32, disk__disable_filter=False)
    e.serve("a", PROMPT)
    e.serve("a again", PROMPT)
    e.lose_host()
    e.serve("b", PROMPT)
    seen, edges, tiers = e.admin.measure(), edges_of(e), tiers_of(e)
    assert list(tiers) == ["host", "disk"]
    assert tiers["disk"] == TierState("disk", 32, 32, 4, 28, 0, DISK_BLOCK_BYTES)
    assert list(edges) == ["offload", "onboard", "write", "read"]
    assert edges["write"].done.blocks == edges["read"].done.blocks == 4
    assert edges["read"].block_bytes == DISK_BLOCK_BYTES
    assert seen.not_admitted == 4
    assert (seen.not_written, seen.declined, seen.recovered) == (0, 0, 0)
    assert (seen.disk_rate.hits, seen.disk_rate.wanted) == (4, 4 + 4)
    assert e.restart().admin.measure().recovered == 4


def test_measurements_of_what_is_under_way_and_of_what_failed() -> None:
    e = Engine(disk=32)
    e.arrive("a", PROMPT)
    e.admit("a")
    e.compute("a")
    offloads = e.step().operations
    assert edges_of(e)["offload"].queued == 4
    e.done(*offloads, failed=[3], reason=Failure.ERROR)
    e.done(*e.step().operations, failed=[1, 2], reason=Failure.UNAVAILABLE)
    e.end("a")
    e.settle()
    e.serve("b", PROMPT[: BLOCK + 1])
    e.arrive("c", PROMPT)
    assert e.admit("c") == 4
    load, write = e.step().operations
    assert (edges_of(e)["onboard"].queued, edges_of(e)["write"].queued) == (4, 2)
    e.done(load, failed=[0], reason=Failure.CORRUPT)
    e.done(write)
    edges = edges_of(e)
    assert {name: edge.queued for name, edge in edges.items()} == dict.fromkeys(edges, 0)
    assert edges["offload"].failures == {"error": 1}
    assert edges["write"].failures == {"unavailable": 2}
    assert edges["onboard"].failures == {"corrupt": 1}
    assert edges["read"].failures == {}
    assert edges["offload"].done.failed == 1


def test_measurements_are_those_of_their_moment() -> None:
    e = Engine()
    e.serve("a", PROMPT)
    seen = e.admin.measure()
    e.serve("b", PROMPT)
    e.leader.refuse("pooling request", "c", 10)
    assert (seen.totals.requests, seen.host_rate.wanted, seen.requests_not_cached) == (1, 4, {})
    assert seen.edges[1].done.operations == 0
    assert sum(seen.edges[1].done.buckets) == 0


def test_measurements_of_a_leader_that_is_off() -> None:
    e = Engine(disk=32)
    e.report(0, disk_refused="the drive is gone")
    assert e.admin.measure().disk_off_reason == "the drive is gone"
    e.leader.receive([WorkerReport(1, refused="layout unknown")])
    seen = e.admin.measure()
    assert (seen.ready, seen.off_reason) == (False, "layout unknown")


def test_the_last_requests_the_newest_first() -> None:
    e = Engine()
    for i in range(5):
        e.serve(f"cmpl-{i}", PROMPT)
    assert [told["id"] for told in e.admin.requests(3)] == ["cmpl-4", "cmpl-3", "cmpl-2"]
    assert len(e.admin.requests(100)) == 5
    assert e.admin.requests(1)[0] == e.admin.request("cmpl-4")
    assert e.admin.request("nobody") is None


def test_misses_are_counted_by_reason() -> None:
    e = Engine(observe__max_requests=4)
    assert e.admin.misses() == {}
    e.serve("a", PROMPT)
    e.serve("b", PROMPT)
    e.serve("c", PROMPT, salt="x")
    e.leader.refuse("pooling request", "d", 10)
    e.arrive("waits", PROMPT)
    assert e.admin.misses() == {"never seen": 1, "other salt or adapter": 1}, "of those that have finished"
    e.leader.ended("d")
    assert e.admin.misses() == {"never seen": 1, "other salt or adapter": 1, "feature not supported": 1}
    e.end("waits", computed=0)
    e.serve("e", PROMPT)
    assert e.admin.misses() == {"other salt or adapter": 1, "feature not supported": 1}, "of the last four"


def test_a_request_that_still_runs_explains_others() -> None:
    e = Engine()
    e.arrive("runs", PROMPT)
    e.admit("runs")
    e.serve("a", PROMPT, salt="x")
    assert e.admin.misses() == {"other salt or adapter": 1}


def test_misses_do_not_keep_the_engine_waiting() -> None:
    """The leader's lock is free while reasons are looked for: another thread gets it at any time."""
    e = Engine()
    for i in range(50):
        e.serve(str(i), tokens_of(2, 100 * i))
    held = []
    find = e.observer.history.find

    def slow_find(word: int) -> Any:
        def take() -> None:
            held.append(not e.leader.lock.acquire(blocking=False))
            if not held[-1]:
                e.leader.lock.release()

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        return find(word)

    e.observer.history.find = slow_find
    e.admin.misses()
    assert held == [False] * 50


# ---- refusals


Call = Callable[[Admin], Any]

CHANGES: dict[str, Call] = {
    "clear": lambda admin: admin.clear(),
    "clear a tier": lambda admin: admin.clear("host"),
    "clear a salt": lambda admin: admin.clear(salt="x"),
    "resize": lambda admin: admin.resize("host", 3),
    "pin": lambda admin: admin.pin(PROMPT, 10.0),
    "unpin": lambda admin: admin.unpin("pin-1"),
    "prefetch": lambda admin: admin.prefetch(PROMPT),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_leader_that_is_off_refuses_changes_and_says_why(change: str) -> None:
    e = Engine(disk=32)
    e.leader.receive([WorkerReport(1, refused="layout unknown")])
    with pytest.raises(StateError, match=r"Caching is off: layout unknown\."):
        CHANGES[change](e.admin)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda admin: admin.clear("remote"), r"no tier 'remote' here: give one of host, disk\."),
        (lambda admin: admin.clear("host", "x"), "either tier or salt"),
        (lambda admin: admin.resize("remote", 3), r"no tier 'remote' here: give one of host, disk\."),
        (lambda admin: admin.resize("host", 0), r"The host tier was started with 16 blocks: give from 1"),
        (lambda admin: admin.resize("host", 17), r"The host tier was started with 16 blocks: give from 1"),
        (lambda admin: admin.resize("disk", 33), r"The disk tier was started with 32 blocks: give from 1"),
        (lambda admin: admin.pin([1, 2, 3], 10.0), "needs a whole block, 4 tokens, at least"),
        (lambda admin: admin.pin(tokens_of(2, 900), 10.0), "The host tier holds nothing of this prefix"),
        (lambda admin: admin.unpin("pin-7"), r"There is no pin 'pin-7', or it has expired\."),
        (lambda admin: admin.prefetch([]), "needs a whole block"),
        (lambda admin: admin.prefetch([1, 2, 3, -4]), "Tokens are numbers from 0 to 4294967295"),
        (lambda admin: admin.pin([1, 2, 3, 1 << 32], 9.0), "Tokens are numbers from 0 to 4294967295"),
        (lambda admin: admin.pin(["a", "b", "c", "d"], 9.0), "Tokens are numbers from 0 to 4294967295"),
    ],
)
def test_what_can_not_be_done_is_refused_with_what_to_do(call: Call, text: str) -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT)
    with pytest.raises(UsageError, match=text):
        call(e.admin)
    assert e.leader.off_reason is None
    assert e.in_host(PROMPT) == 4
    e.check_idle()


def test_without_a_disk_tier() -> None:
    e = Engine()
    with pytest.raises(StateError, match="no disk tier to prefetch from: set DYN_KVBM_DISK_CACHE_GB"):
        e.admin.prefetch(PROMPT)
    for call in (lambda: e.admin.clear("disk"), lambda: e.admin.resize("disk", 3)):
        with pytest.raises(UsageError, match=r"no tier 'disk' here: give one of host\."):
            call()


def test_tokens_of_a_salt_are_others() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT, salt="x")
    with pytest.raises(StateError):
        e.admin.pin(PROMPT, 10.0)
    assert e.admin.pin(PROMPT, 10.0, salt="x")[1] == 4
    e.lose_host()
    assert e.admin.prefetch(PROMPT) == (0, 0)
    assert e.admin.prefetch(PROMPT, salt="x") == (4, 0)
