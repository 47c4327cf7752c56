"""What a leader tells its observer of the requests of an engine, and what the observer makes of it."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm.logic.operations import Failure
from kvbm.observe.requests import Miss
from kvbm.runtime.leader import Leader
from kvbm.runtime.observer import Observer
from tests.unit.observed_engine import BLOCK, READ, Engine, tokens_of

PROMPT = [*tokens_of(4), 7]


# ---- where the tokens of a request come from


def test_device_host_and_computed() -> None:
    e = Engine()
    first = e.serve("a", PROMPT)
    assert (first.device_tokens, first.host_tokens, first.disk_tokens, first.computed_tokens) == (0, 0, 0, 17)
    assert (first.wanted_tokens, first.finished) == (16, True)
    second = e.serve("b", [*PROMPT[:16], *tokens_of(2, 800), 7], device=1)
    assert (second.device_tokens, second.host_tokens, second.computed_tokens) == (4, 12, 25 - 16)
    assert second.wanted_tokens == 5 * BLOCK
    log = e.observer.log
    assert (log.host_rate.hits, log.host_rate.wanted) == (3, 4 + 5)
    assert log.totals.requests == 2
    assert (log.totals.prompt_tokens, log.totals.device_tokens, log.totals.host_tokens) == (17 + 25, 4, 12)


def test_host_and_disk_in_one_load() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT)
    e.lose_host()
    e.serve("head", PROMPT[: 2 * BLOCK + 1])
    record = e.serve("b", PROMPT)
    assert (e.record("head").host_tokens, e.record("head").disk_tokens) == (0, 8)
    assert (record.host_tokens, record.disk_tokens, record.computed_tokens) == (8, 8, 1)
    log = e.observer.log
    assert (log.totals.host_blocks, log.totals.disk_blocks) == (2, 4)
    assert (log.host_rate.hits, log.host_rate.wanted) == (2, 4 + 2 + 4)
    assert (log.disk_rate.hits, log.disk_rate.wanted) == (4, 4 + 2 + 2)


@pytest.mark.parametrize("failed", [0, 1, 2, 3])
def test_of_a_load_that_fails_what_lies_before_the_failure_counts(failed: int) -> None:
    """The engine computes from the first block that failed on. Two are from the host, two from the disk."""
    e = Engine(disk=32)
    e.serve("a", PROMPT)
    e.lose_host()
    e.serve("head", PROMPT[: 2 * BLOCK + 1])
    before = e.observer.log.totals.saved_tokens
    e.arrive("b", PROMPT)
    assert e.admit("b") is None
    e.settle()
    e.admit("b")
    (load,) = e.step().operations
    e.done(load, failed=[failed], reason=Failure.CORRUPT)
    record = e.record("b")
    host, disk = min(failed, 2), max(0, failed - 2)
    assert (record.host_tokens, record.disk_tokens) == (host * BLOCK, disk * BLOCK)
    assert record.failed_tokens == BLOCK
    assert record.computed_tokens == 17 - failed * BLOCK
    assert e.observer.log.totals.saved_tokens - before == failed * BLOCK
    assert record.miss is not None
    assert (record.miss.block, record.miss.reason) == (failed, Miss.FAILED_CHECK)


def test_seconds_that_were_saved() -> None:
    e = Engine()
    assert e.serve("a", PROMPT).saved_s == 0.0
    assert e.serve("b", PROMPT).saved_s == 0.0  # it is not known yet how fast the engine computes
    e.step(tokens=1000)
    e.now += 2.0
    e.report(0, timed=True)
    record = e.serve("c", PROMPT)
    assert record.saved_s == pytest.approx(16 / 500)
    assert e.observer.log.totals.saved_s == record.saved_s


def test_a_request_that_is_preempted_and_resumed_counts_once() -> None:
    e = Engine()
    e.serve("a", PROMPT)
    e.arrive("b", [*PROMPT[:16], *tokens_of(2, 800), 7])
    assert e.admit("b", device=1) == 3
    e.settle()
    e.compute("b")
    e.settle()
    first = e.record("b")
    seen = (first.device_tokens, first.host_tokens, first.wanted_tokens, first.miss, first.clock)
    assert seen[:3] == (4, 12, 20)
    e.leader.preempt("b")
    e.step(seconds=1.0)
    assert e.admit("b") == 6  # what it has computed itself
    e.settle()
    e.end("b")
    record = e.record("b")
    assert (record.device_tokens, record.host_tokens, record.wanted_tokens, record.miss, record.clock) == seen
    assert record.computed_tokens == 9
    log = e.observer.log
    assert log.totals.requests == 2
    assert (log.host_rate.hits, log.host_rate.wanted) == (3, 4 + 5)
    assert log.totals.host_blocks == 3 + 6


def test_a_request_that_was_preempted_before_it_hit_anything() -> None:
    e = Engine()
    e.arrive("a", PROMPT)
    assert e.admit("a") == 0
    e.compute("a")
    e.settle()
    e.leader.preempt("a")
    assert e.admit("a") == 4
    e.settle()
    e.end("a")
    assert e.record("a").host_tokens == 0
    assert e.observer.log.host_rate.value == 0.0


def test_a_request_that_is_aborted_while_it_waits() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT)
    e.lose_host()
    e.arrive("b", PROMPT)
    assert e.admit("b") is None
    e.end("b", computed=0)
    record = e.record("b")
    assert (record.finished, record.answered) == (True, False)
    assert e.observer.log.host_rate.wanted == 4  # of the first
    e.settle()
    e.check_idle()


def test_a_request_that_is_aborted_in_its_load() -> None:
    e = Engine()
    e.serve("a", PROMPT)
    e.arrive("b", PROMPT)
    e.admit("b")
    orders = e.step()
    e.end("b", computed=0)
    e.done(*orders.operations)
    assert e.record("b").host_tokens == 0
    assert e.observer.log.totals.host_blocks == 4
    assert not e.observer._loads
    e.settle()
    e.check_idle()


def test_refused_requests() -> None:
    e = Engine()
    for id_ in ("a", "b"):
        e.leader.refuse("pooling request", id_, 20)
        e.leader.ended(id_)
    assert e.observer.log.totals.requests == 2
    assert e.observer.log.host_rate.wanted == 0
    assert e.record("a").finished
    assert e.leader.not_cached == {"pooling request": 2}


def test_a_request_that_the_device_has_wants_nothing() -> None:
    e = Engine()
    record = e.serve("a", PROMPT, device=4)
    assert (record.device_tokens, record.wanted_tokens, record.computed_tokens) == (16, 0, 1)
    assert e.observer.log.host_rate.wanted == 0


# ---- an observer has no influence


class Raises(Observer):
    """Everything that it is told is too much for it."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("log", "history"):
            raise RuntimeError("injected")
        return super().__getattribute__(name)


def life(e: Engine) -> list[Any]:
    """Some requests over small tiers: all that is ordered, and what comes of it."""
    seen: list[Any] = []

    def settle() -> None:
        for o in e.settle():
            seen.append((o.id, o.direction, o.request_id, o.device_blocks.tolist(), o.host_slots.tolist()))

    for i, first in enumerate([0, 0, 100, 0, 100]):
        e.arrive(f"a{i}", [*tokens_of(4, first), 7])
        for _ in range(3):
            seen.append(e.admit(f"a{i}"))
            if seen[-1] is not None:
                break
            settle()
        settle()
        e.compute(f"a{i}")
        settle()
        e.end(f"a{i}")
        settle()
        e.lose_host()
    e.leader.refuse("pooling request", "r", 20)
    e.leader.ended("r")
    e.leader.reset()
    e.step(seconds=10.0)
    seen.append((e.leader.stats.offloaded_blocks, e.leader.stats.onboarded_blocks, e.leader.off_reason))
    return seen


def test_an_observer_that_raises_does_not_touch_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    expected = life(Engine(host=4, disk=32))
    e = Engine(host=4, disk=32)
    e.observer.__class__ = Raises
    with caplog.at_level(logging.ERROR):
        assert life(e) == expected
    assert caplog.text.count("internal error in observing requests") == 1
    assert e.leader.off_reason is None


@pytest.mark.parametrize(
    "method",
    [
        "arrived",
        "answered",
        "load_ordered",
        "loaded",
        "finished",
        "refused",
        "not_taken",
        "tick",
        "block_event",
    ],
)
def test_an_observer_that_raises_in_one_thing(method: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = life(Engine(host=4, disk=32))
    e = Engine(host=4, disk=32)

    def broken(self: Observer, *args: Any) -> None:
        raise RuntimeError("injected")

    with caplog.at_level(logging.ERROR), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, method, broken)
        assert life(e) == expected
    assert e.leader.off_reason is None
    assert "injected" in caplog.text


def test_others_may_look_while_the_engine_works() -> None:
    """From another thread: dictionaries must not change while somebody goes through them."""
    e = Engine()
    over, errors = threading.Event(), []

    def look() -> None:
        try:
            while not over.is_set():
                e.admin.requests(100)
                e.admin.misses()
                e.admin.measure()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for i in range(300):
        e.leader.refuse(f"reason {i}", f"r{i}", 10)
        e.serve(f"a{i}", tokens_of(3, 4 * i))
    over.set()
    thread.join()
    assert errors == []


@pytest.mark.parametrize(
    "call",
    [
        lambda leader: leader.refuse("pooling request", "r", 10),
        lambda leader: leader.answered("a", 0, 0, 3),
        lambda leader: leader.ended("a"),
        lambda leader: leader.start("b"),
        lambda leader: leader.tick(),
    ],
)
def test_what_is_told_is_told_under_the_lock(call: Callable[[Leader], Any]) -> None:
    e = Engine()
    e.arrive("a", PROMPT)
    with e.leader.lock:
        thread = threading.Thread(target=call, args=(e.leader,))
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    thread.join(5)
    assert not thread.is_alive()


# ---- the hit rates in the log


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [message for message in caplog.messages if "Cache Hit Rates" in message]
    caplog.clear()
    return found


def test_the_hit_rates_are_logged_at_an_interval_when_there_is_something_new(
    caplog: pytest.LogCaptureFixture,
) -> None:
    e = Engine(disk=32, observe__log_interval_s=5.0)
    with caplog.at_level(logging.INFO):
        e.step(seconds=6.0)
        assert lines(caplog) == [], "no request has come"
        e.serve("a", PROMPT)
        e.serve("b", PROMPT)
        assert lines(caplog) == [], "the interval is not over"
        e.step(seconds=5.1)
        assert lines(caplog) == ["KVBM [e1] Cache Hit Rates - Host: 50.0% (4/8), Disk: 0.0% (0/4)"]
        e.step(seconds=5.1)
        assert lines(caplog) == [], "nothing new"
        e.arrive("c", PROMPT)
        e.step(seconds=5.1)
        assert lines(caplog) == [], "it has not finished"
        e.admit("c")
        e.settle()
        e.end("c")
        e.step(seconds=5.1)
        assert lines(caplog) == ["KVBM [e1] Cache Hit Rates - Host: 66.7% (8/12), Disk: 0.0% (0/4)"]


def test_the_log_goes_on_when_rates_stay_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """The last request takes the place of one that was like it."""
    e = Engine(observe__max_requests=2, observe__log_interval_s=1.0)
    with caplog.at_level(logging.INFO):
        for i in range(6):
            e.serve(str(i), tokens_of(2, 100 * i))
            e.step(seconds=1.1)
            assert len(lines(caplog)) == 1


def test_requests_too_short_for_a_block_are_not_worth_a_line(caplog: pytest.LogCaptureFixture) -> None:
    e = Engine()
    with caplog.at_level(logging.INFO):
        e.serve("a", [1, 2])
        e.step(seconds=100.0)
    assert lines(caplog) == []


# ---- how long transfers take


def test_edges_measure_from_the_order_to_the_last_report() -> None:
    e = Engine(disk=32)
    e.arrive("a", PROMPT)
    e.admit("a")
    e.compute("a")
    (offload,) = e.step().operations
    e.now += 0.5
    e.done(offload)
    stats, disk = e.leader.stats, e.disk.stats
    assert (stats.offload.operations, stats.offload.blocks, stats.offload.seconds) == (1, 4, 0.5)
    (write,) = e.step().operations
    e.now += 0.25
    e.done(write)
    e.end("a")
    assert (disk.write.operations, disk.write.blocks) == (1, 4)
    assert disk.write.seconds == pytest.approx(0.25)
    e.lose_host()
    e.arrive("b", PROMPT)
    e.admit("b")
    (read,) = e.step().operations
    assert read.direction == READ
    e.now += 0.125
    e.done(read, failed=[3], reason=Failure.CORRUPT)
    assert (disk.read.operations, disk.read.blocks, disk.read.failed) == (1, 3, 1)
    assert disk.read.seconds == pytest.approx(0.125)
    e.admit("b")
    (load,) = e.step().operations
    e.now += 0.0625
    e.done(load)
    assert (stats.onboard.operations, stats.onboard.blocks) == (1, 3)
    assert stats.onboard.seconds == pytest.approx(0.0625)
    assert not np.any(
        [sum(edge.buckets) != 1 for edge in (stats.offload, stats.onboard, disk.write, disk.read)]
    )
