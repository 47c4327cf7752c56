"""Pinning an arena in the background, with a fake of the driver that the test can stop."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvbm.transfer.arena import HostArena
from kvbm.transfer.cuda import pinning
from kvbm.transfer.cuda.pinning import PinnedArena, slots_per_chunk

PATIENCE_S = 20.0
SLOT_BYTES = 4096
PER_CHUNK = 3
SLOTS = 11  # 4 chunks, the last of 2 slots


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning, "_CHUNK_BYTES", PER_CHUNK * SLOT_BYTES + 100)


class Driver:
    """Registers in the test's pace: each registration but the first needs a permit."""

    def __init__(self, arena: HostArena, permits: int = 1000) -> None:
        self.arena = arena
        self.registered: dict[int, int] = {}
        self.history: list[tuple[int, int]] = []  # slots first, last
        self.unregistered: list[int] = []
        self.threads: list[str] = []
        self.permits = threading.Semaphore(permits + 1)
        self.fails_at: int | None = None  # number of the registration
        self.calls = 0

    def register(self, address: int, size: int) -> None:
        self.calls += 1
        assert self.permits.acquire(timeout=PATIENCE_S)
        if len(self.history) == self.fails_at:
            raise RuntimeError("out of locked memory")
        first, rest = divmod(address - self.arena.address, self.arena.slot_bytes)
        count, more = divmod(size, self.arena.slot_bytes)
        assert rest == more == 0, "chunks are whole slots"
        assert address not in self.registered
        self.registered[address] = size
        self.history.append((first, first + count))

    def unregister(self, address: int) -> None:
        del self.registered[address]
        self.unregistered.append(address)

    def enter_thread(self) -> None:
        self.threads.append(threading.current_thread().name)


@contextlib.contextmanager
def pinned(driver: Driver, **options: Any) -> Iterator[PinnedArena]:
    memory = PinnedArena(
        driver.arena,
        register=driver.register,
        unregister=driver.unregister,
        enter_thread=driver.enter_thread,
        **options,
    )
    try:
        yield memory
    finally:
        driver.permits.release(100)
        memory.close()


def new_driver(permits: int = 1000, slots: int = SLOTS) -> Driver:
    return Driver(HostArena(slots, SLOT_BYTES), permits)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


CHUNKS = [(0, 3), (3, 6), (6, 9), (9, 11)]


@pytest.mark.parametrize(
    ("slot_bytes", "slots"), [(1, 12388), (SLOT_BYTES, 3), (12388, 1), (12389, 1), (2**40, 1)]
)
def test_a_chunk_is_whole_slots(slot_bytes: int, slots: int) -> None:
    assert slots_per_chunk(slot_bytes) == slots


def test_the_first_chunk_is_ready_at_once_and_the_rest_follows_in_order() -> None:
    driver = new_driver(permits=0)
    with pinned(driver) as memory:
        assert memory.ready_slots == 3
        assert driver.history == CHUNKS[:1]
        assert not memory.wait(0.01)
        for chunks, ready in ((2, 6), (3, 9), (4, 11)):
            driver.permits.release()
            wait_for(lambda ready=ready: memory.ready_slots == ready)
            assert driver.history == CHUNKS[:chunks]
        assert memory.wait(PATIENCE_S)
        assert memory.ready_slots == SLOTS


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("slots", [1, 2, 3, 4, 6, SLOTS, 40])
def test_every_slot_once(slots: int, threads: int) -> None:
    driver = new_driver(slots=slots)
    with pinned(driver, threads=threads) as memory:
        assert memory.ready_slots >= min(3, slots)
        assert memory.wait(PATIENCE_S)
        assert memory.ready_slots == slots
        assert [slot for chunk in driver.history for slot in range(*chunk)] == list(range(slots))


def test_ready_slots_only_grow_and_are_registered() -> None:
    driver = new_driver(slots=120)
    with pinned(driver, threads=3) as memory:
        seen = [memory.ready_slots]
        while seen[-1] < 120:
            seen.append(memory.ready_slots)
            assert driver.history[-1][1] >= seen[-1]
        assert seen == sorted(seen)


def test_memory_is_touched_before_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registration would take it from the system in the driver, on one core and any node."""
    driver = new_driver()
    touched: list[tuple[int, int]] = []
    untouched: list[tuple[int, int]] = []
    real = driver.arena.touch

    def touch(first: int, last: int) -> None:
        time.sleep(0.01)
        real(first, last)
        touched.append((first, last))

    def register(address: int, size: int) -> None:
        driver.register(address, size)
        if driver.history[-1] not in touched:
            untouched.append(driver.history[-1])

    monkeypatch.setattr(driver.arena, "touch", touch)
    memory = PinnedArena(driver.arena, register=register, unregister=driver.unregister, threads=3)
    assert memory.wait(PATIENCE_S)
    assert not untouched
    assert sorted(touched) == CHUNKS
    memory.close()


def test_registrations_are_made_by_one_thread_that_has_entered() -> None:
    driver = new_driver()
    with pinned(driver) as memory:
        memory.wait(PATIENCE_S)
        assert driver.threads.count("kvbm-pin") == 1


@pytest.mark.parametrize("cpus", [{0}, set()])
def test_threads_run_near_the_device(cpus: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[tuple[str, int, set[int]]] = []
    monkeypatch.setattr(
        os,
        "sched_setaffinity",
        lambda pid, where: placed.append((threading.current_thread().name, pid, set(where))),
    )
    driver = new_driver()
    with pinned(driver, cpus=cpus, threads=2) as memory:
        memory.wait(PATIENCE_S)
    expected = [("kvbm-touch-0", 0, cpus), ("kvbm-touch-1", 0, cpus)] if cpus else []
    assert sorted(placed) == expected


def test_the_callers_thread_stays_where_it_is() -> None:
    before = os.sched_getaffinity(0)
    driver = new_driver()
    with pinned(driver, cpus={min(before)}) as memory:
        memory.wait(PATIENCE_S)
    assert os.sched_getaffinity(0) == before


# ---- trouble ----


def test_memory_that_cannot_be_pinned_at_all() -> None:
    driver = new_driver()
    driver.fails_at = 0
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of locked memory"):
        PinnedArena(driver.arena, register=driver.register, unregister=driver.unregister)
    assert threading.active_count() == before
    assert driver.registered == {}


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_memory_that_cannot_be_pinned_to_the_end(fails_at: int, caplog: pytest.LogCaptureFixture) -> None:
    driver = new_driver()
    driver.fails_at = fails_at
    with caplog.at_level(logging.DEBUG, "kvbm"):
        with pinned(driver) as memory:
            assert memory.wait(PATIENCE_S)
            assert memory.ready_slots == 3 * fails_at
            assert driver.history == CHUNKS[:fails_at]
        assert driver.registered == {}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert f"only {3 * fails_at} of 11 blocks" in message
    assert "out of locked memory" in message
    assert "ulimit -l" in message
    assert "DYN_KVBM_CPU_CACHE_GB" in message


def test_cpus_that_may_not_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory elsewhere is better than none."""

    def refuse(pid: int, cpus: object) -> None:
        raise OSError("invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    driver = new_driver()
    with pinned(driver, cpus={0}) as memory:
        memory.wait(2.0)
        assert memory.ready_slots == SLOTS


def test_memory_that_cannot_be_touched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is ready stays usable, the user hears of it, and nobody waits for ever."""
    driver = new_driver()
    real = driver.arena.touch

    def touch(first: int, last: int) -> None:
        if first >= 6:
            raise MemoryError
        real(first, last)

    monkeypatch.setattr(driver.arena, "touch", touch)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with pinned(driver, threads=1) as memory:
        assert memory.wait(2.0)
        assert memory.ready_slots == 6
    assert "only 6 of 11" in caplog.text


# ---- the end ----


def test_close_unregisters_what_was_registered() -> None:
    driver = new_driver()
    with pinned(driver) as memory:
        memory.wait(PATIENCE_S)
        starts = [driver.arena.address + first * SLOT_BYTES for first, _ in CHUNKS]
        assert sorted(driver.registered) == starts
        memory.close()
        assert driver.registered == {}
        assert sorted(driver.unregistered) == starts
        memory.close()
        assert len(driver.unregistered) == len(starts)


@pytest.mark.parametrize("permits", [0, 1, 2])
def test_close_midway(permits: int) -> None:
    driver = new_driver(permits, slots=40)
    with pinned(driver) as memory:
        wait_for(lambda: driver.calls == permits + 2)
        assert memory.ready_slots == 3 * (1 + permits)
        threading.Timer(0.05, driver.permits.release).start()  # the one that is being made ends
        memory.close()
        assert not any(thread.is_alive() for thread in memory._threads)
        assert len(driver.history) == permits + 2
        assert driver.registered == {}
        assert len(driver.unregistered) == permits + 2


def slow_touch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each chunk takes a while; returns the first slots of those that were touched."""
    real = driver.arena.touch
    touched: list[int] = []

    def touch(first: int, last: int) -> None:
        time.sleep(0.01)
        touched.append(first)
        real(first, last)

    monkeypatch.setattr(driver.arena, "touch", touch)
    return touched


def test_close_while_memory_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = new_driver(slots=1200)
    touched = slow_touch(driver, monkeypatch)
    with pinned(driver, threads=2) as memory:
        time.sleep(0.03)
        memory.close()
        assert not any(thread.is_alive() for thread in memory._threads)
        assert len(touched) < 200, "goes on only with what was begun"
        assert memory.ready_slots < 600
        assert driver.registered == {}
        assert len(driver.unregistered) == len(driver.history)


def test_memory_that_cannot_be_pinned_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = new_driver(slots=1200)
    driver.fails_at = 2
    touched = slow_touch(driver, monkeypatch)
    with pinned(driver, threads=2) as memory:
        assert memory.wait(PATIENCE_S)
        assert len(touched) < 200


def test_close_goes_on_when_one_cannot_be_unregistered() -> None:
    driver = new_driver()
    calls: list[int] = []

    def unregister(address: int) -> None:
        calls.append(address)
        if len(calls) == 2:
            raise RuntimeError("device lost")
        driver.unregister(address)

    memory = PinnedArena(driver.arena, register=driver.register, unregister=unregister)
    memory.wait(PATIENCE_S)
    with contextlib.suppress(RuntimeError):
        memory.close()
    assert len(calls) == len(CHUNKS)
    assert len(driver.registered) == 1
