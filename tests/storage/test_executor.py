"""The I/O process's threads, in moments that a real process meets once in a thousand times."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.storage.disk_store import DiskStore
from kvbm.storage.messages import Batch, Cleared, Done, Reply, Status
from kvbm.storage.process import Executor
from kvbm.storage.store import Bytes, Key
from tests.storage.harness import Host, Opened, identity, key


class Listener:
    """A channel whose other end is the test."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.over = threading.Event()

    def send(self, reply: Reply) -> None:
        self.replies.append(reply)
        if isinstance(reply, Done):
            self.over.set()


class LateStore(DiskStore):
    """Its writes begin when they are let go. `slots` are those of all reads and writes, as they begin."""

    def __init__(self, folder: Path, host: Host) -> None:
        super().__init__([folder], identity(), 8, host.memory, slot_bytes=host.slot_bytes)
        self.arrived = threading.Event()
        self.let_go = threading.Event()
        self.slots: list[int] = []

    def write(self, slot: int, key: Key, record: Bytes, checksum: int | None = None) -> None:
        self.slots.append(slot)
        self.arrived.set()
        assert self.let_go.wait(30)
        super().write(slot, key, record, checksum)

    def read(self, slot: int, key: Key, record: Bytes) -> int:
        self.slots.append(slot)
        return super().read(slot, key, record)


def batch(id_: int, slots: list[int], *, write: bool) -> Batch:
    places = np.array(slots, np.int32).tobytes()
    hashes = b"".join(key(slot).hash for slot in slots)
    return Batch(id_, write, places, places, hashes, bytes(len(slots)), b"", 30.0)


def test_a_clearing_counts_for_a_write_that_has_left_the_queue(tmp_path: Path) -> None:
    host = Host(8, identity().record_bytes)
    store = LateStore(tmp_path, host)
    it = Opened(store, host)
    it.recover()
    listener: Any = Listener()
    executor = Executor(store, host.slots, listener, threads=2)
    host.filled(1, 1)
    executor.submit(batch(5, [1], write=True))
    assert store.arrived.wait(10)
    executor.clear()
    assert listener.replies == [Cleared()]
    store.let_go.set()
    assert listener.over.wait(10)
    done = listener.replies[1]
    assert (done.id, done.status, np.frombuffer(done.failed, np.int32).tolist()) == (5, Status.ERROR, [0])
    assert not it.holds(1, 1)
    assert executor.close(10)
    store.close()
    again = DiskStore([tmp_path], identity(), 8, host.memory, slot_bytes=host.slot_bytes)
    assert len(again.recover()) == 0
    again.close()


@pytest.mark.parametrize(("threads", "writing"), [(1, 1), (2, 1), (4, 3), (8, 6)])
def test_reads_overtake_writes_that_wait(tmp_path: Path, threads: int, writing: int) -> None:
    host = Host(8, identity().record_bytes)
    store = LateStore(tmp_path, host)
    it = Opened(store, host)
    it.recover()
    store.let_go.set()
    it.write(0, 0)
    store.let_go.clear()
    store.slots.clear()
    listener: Any = Listener()
    executor = Executor(store, host.slots, listener, threads)
    executor.submit(batch(1, [1, 2, 3, 4, 5, 6, 7], write=True))
    end = time.monotonic() + 10
    while len(store.slots) < writing and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(0.05)  # for another that would write too
    executor.submit(batch(2, [0], write=False))
    if threads == 1:
        store.let_go.set()
    assert listener.over.wait(10)
    assert listener.replies[0].id == 2
    assert store.slots.index(0) == writing
    store.let_go.set()
    assert executor.close(10)
    store.close()
