"""kill -9 at random moments, of I/O processes, of engines and of both, with writes under way."""

import mmap
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvbm.storage import client
from kvbm.storage.disk_store import DiskStore
from kvbm.storage.messages import Status
from tests.storage.harness import Host, Opened, identity
from tests.storage.rank import DISK_SLOTS, RECORD_BYTES, Rank, numbers, rank, wait_gone

IO_KILLS = 120
ENGINE_KILLS = 80


def test_io_processes_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_BACKOFF_S", (0.0, 0.0))
    chance = random.Random(1)
    number = 0
    with rank(tmp_path) as it:
        certain: dict[int, int] = {}  # written without an error since
        possible: dict[int, int] = {}  # what the last write, that failed, may have left
        for _ in range(IO_KILLS):
            slots = chance.sample(range(DISK_SLOTS), 48)
            writes: dict[int, dict[int, int]] = {}
            for at in range(0, len(slots), 4):
                batch = {}
                for slot in slots[at : at + 4]:
                    number += 1
                    batch[slot] = number
                writes[it.write(batch)] = batch
            time.sleep(chance.random() * 0.006)
            old = it.pid
            os.kill(old, signal.SIGKILL)
            for id_, batch in writes.items():
                result = it.result(id_)
                for i, (slot, written) in enumerate(batch.items()):
                    (possible if i in result.failed else certain)[slot] = written
                    (certain if i in result.failed else possible).pop(slot, None)
            it.wait(lambda old=old: it.client.pid not in (None, old) and it.client.ready)
            assert it.held(certain) == certain
            it.held(possible)  # those or none: wrong bytes fail by themselves
            it.results.clear()


class Progress:
    """What an engine has begun and done, in memory that outlives it: two numbers a slot, and a process's."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 4096)
        words = np.frombuffer(self._shared, np.int64)
        self.begun = words[:DISK_SLOTS]
        self.done = words[DISK_SLOTS : 2 * DISK_SLOTS]
        self.io_pid = words[-1:]


def engine(folder: Path, progress: Progress, first: int) -> None:
    """Writes until it is killed."""
    chance = random.Random(first)
    it = Rank(folder)
    it.wait_ready()
    progress.io_pid[0] = it.pid
    number = first
    under_way: dict[int, dict[int, int]] = {}
    busy: set[int] = set()
    while True:
        free = [slot for slot in range(DISK_SLOTS) if slot not in busy]
        if len(free) > 16:
            batch = {}
            for slot in chance.sample(free, 4):
                number += 1
                batch[slot] = number
                progress.begun[slot] = number
            busy.update(batch)
            under_way[it.write(batch)] = batch
        it.poll()
        for id_ in list(it.results):
            result, batch = it.results.pop(id_), under_way.pop(id_)
            busy.difference_update(batch)
            if result.status == Status.DONE:
                for slot, written in batch.items():
                    progress.done[slot] = written


def kill_io(engine_pid: int, io_pid: int) -> None:
    os.kill(io_pid, signal.SIGKILL)


def kill_engine(engine_pid: int, io_pid: int) -> None:
    os.kill(engine_pid, signal.SIGKILL)


Kill = Callable[[int, int], None]
KILLS: list[list[Kill]] = [
    [kill_engine],
    [kill_engine, kill_io],
    [kill_io, kill_engine],
]


def test_engines_killed_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(2)
    host = Host(DISK_SLOTS, RECORD_BYTES)
    progress = Progress()
    found_in_all = 0
    for attempt in range(ENGINE_KILLS):
        progress.io_pid[0] = 0
        # Forked: to start a Python takes longer than all the rest.
        process = multiprocessing.get_context("fork").Process(
            target=engine, args=(tmp_path, progress, 1_000_000 * (attempt + 1))
        )
        process.start()
        end = time.monotonic() + 20
        while not progress.io_pid[0] and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        io_pid = int(progress.io_pid[0])
        assert io_pid, "the engine did not start"
        for how in chance.choice(KILLS):
            how(process.pid or 0, io_pid)
        process.join(10)
        wait_gone(io_pid, 10.0)
        store = DiskStore(
            [tmp_path], identity(), DISK_SLOTS, host.memory, slot_bytes=host.slot_bytes, patience_s=5.0
        )  # threads of a killed process may be in the kernel yet
        it = Opened(store, host)
        found = it.recover()
        found_in_all += len(found)
        for slot in range(DISK_SLOTS):
            begun, done = int(progress.begun[slot]), int(progress.done[slot])
            if slot in found:
                assert it.holds(slot, found[slot])
                # An engine whose I/O process was killed first may have begun others since, all in vain.
                assert done <= found[slot] <= begun
            if begun == done and done:
                assert found.get(slot) == done
            # What is on disk counts from here on, as for an engine that starts on it.
            progress.begun[slot] = progress.done[slot] = found.get(slot, 0)
        store.close()
    assert found_in_all > 20 * ENGINE_KILLS


def _engine_with_a_fork(folder: Path, pids: "multiprocessing.queues.Queue[int]") -> None:  # type: ignore[name-defined]
    it = Rank(folder).wait_ready()
    assert it.wrote(numbers(range(8)))
    holder = os.fork()
    if not holder:
        time.sleep(30)
        os._exit(0)
    pids.put(it.pid)
    pids.put(holder)
    time.sleep(30)


def test_an_io_process_ends_with_its_engine(tmp_path: Path) -> None:
    """Also where another process, forked off the engine, keeps the engine's end of the socket open."""
    context = multiprocessing.get_context("spawn")
    pids = context.Queue()
    process = context.Process(target=_engine_with_a_fork, args=(tmp_path, pids))
    process.start()
    io_pid, holder = pids.get(timeout=20), pids.get(timeout=20)
    process.kill()
    process.join()
    try:
        assert wait_gone(io_pid, 10.0) < 5.0
    finally:
        os.kill(holder, signal.SIGKILL)
    with rank(tmp_path) as it:
        assert it.found_records() == numbers(range(8))


def test_an_io_process_that_hangs_with_its_engine_gone_is_no_obstacle(tmp_path: Path) -> None:
    """A new engine waits for the lock some seconds; a process that never ends keeps it."""
    with rank(tmp_path) as it:
        assert it.wrote(numbers(range(8)))
        os.kill(it.pid, signal.SIGSTOP)
        pid = it.pid
        second = Rank(tmp_path)
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        second.wait_ready()
        assert second.held(numbers(range(8))) == numbers(range(8))
        second.close()
