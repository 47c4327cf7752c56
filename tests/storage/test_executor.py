"""The I/O process's threads, in moments that a real process meets once in a thousand times."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

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
    """Its writes begin when they are let go."""

    arrived = threading.Event()
    let_go = threading.Event()

    def write(self, slot: int, key: Key, record: Bytes, checksum: int | None = None) -> None:
        self.arrived.set()
        assert self.let_go.wait(30)
        super().write(slot, key, record, checksum)


def test_a_clearing_counts_for_a_write_that_has_left_the_queue(tmp_path: Path) -> None:
    host = Host(4, identity().record_bytes)
    store = LateStore([tmp_path], identity(), 4, host.memory, slot_bytes=host.slot_bytes)
    it = Opened(store, host)
    it.recover()
    listener: Any = Listener()
    executor = Executor(store, host.slots, listener, threads=2)
    host.filled(1, 7)
    slot = np.array([1], np.int32).tobytes()
    executor.submit(Batch(5, True, slot, slot, key(7).hash, bytes(1), b"", 30.0))
    assert store.arrived.wait(10)
    executor.clear()
    assert listener.replies == [Cleared()]
    store.let_go.set()
    assert listener.over.wait(10)
    done = listener.replies[1]
    assert (done.id, done.status, np.frombuffer(done.failed, np.int32).tolist()) == (5, Status.ERROR, [0])
    assert not it.holds(1, 7)
    assert executor.close(10)
    store.close()
    again = DiskStore([tmp_path], identity(), 4, host.memory, slot_bytes=host.slot_bytes)
    assert len(again.recover()) == 0
    again.close()
