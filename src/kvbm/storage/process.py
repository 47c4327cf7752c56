"""The I/O process of one rank: python -m kvbm.storage.process ARENA_FD SOCKET_FD REPLY_COUNT_FD

It shares the rank's host arena and does all reading and writing of records, so that neither the GIL of the
engine nor its threads have anything to do with a disk. It ends when the engine does, however that ends: its
socket is closed then.
"""

import contextlib
import logging
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm.errors import DamagedRecordError, StorageError
from kvbm.memory import map_shared
from kvbm.storage.backends import open_store
from kvbm.storage.messages import (
    MAX_MESSAGE,
    Batch,
    Clear,
    Cleared,
    Discard,
    Done,
    FoundRecords,
    LogLine,
    Options,
    Refused,
    Reply,
    Request,
    Status,
)
from kvbm.storage.reply_count import ReplyCount
from kvbm.storage.store import Found, Key, RecordStore

_FOUND_AT_ONCE = 4096  # records a message: it has to fit a socket's buffer
_COMMIT_EVERY_S = 1.0
_SAME_ERROR_EVERY_S = 10.0

logger = logging.getLogger("kvbm.storage")


class Channel:
    """The socket to the worker. Threads may send at once."""

    def __init__(self, sock: socket.socket, replies: ReplyCount) -> None:
        self._sock = sock
        self._replies = replies
        self._lock = threading.Lock()
        self._parent = os.getppid()
        self._requests = msgspec.msgpack.Decoder(Request)

    def send(self, reply: Reply) -> None:
        with self._lock, contextlib.suppress(OSError):  # nobody listens any more: `receive` ends
            self._sock.send(msgspec.msgpack.encode(reply))
            self._replies.add_sent()

    def options(self) -> Options:
        return msgspec.msgpack.decode(self._sock.recv(MAX_MESSAGE), type=Options)

    def is_open(self) -> bool:
        """Whether the worker is there; any thread may ask."""
        poll = select.poll()
        poll.register(self._sock, 0)
        return os.getppid() == self._parent and not poll.poll(0)

    def receive(self) -> Request | None:
        """The next request; None when the worker is gone."""
        try:
            # A process forked off the worker may hold its end open: the parent's number tells as well.
            while not select.select([self._sock], [], [], 1.0)[0]:
                if os.getppid() != self._parent:
                    return None
            data = self._sock.recv(MAX_MESSAGE)
        except OSError:
            return None
        return self._requests.decode(data) if data else None


@dataclass(slots=True)
class _Batch:
    """A batch under way: a record is one piece of work."""

    request: Batch
    received: float
    deadline: float
    host_slots: NDArray[np.int32]
    disk_slots: NDArray[np.int32]
    expected: NDArray[np.uint64] | None
    checksums: NDArray[np.uint64]
    left: int
    clears: int  # that came before it
    failed: list[int] = field(default_factory=list)
    status: Status = Status.DONE


def writers(threads: int) -> int:
    """How many of an executor's threads may write at once; the others are kept for reads.

    Half, and two more, as a sixth of each thread's time goes to checksums, Python and the GIL: of 8 threads
    5 that write gave a drive 97 % of what 4 of bare calls give it, and 6 107 %.
    """
    return max(1, min(threads - 1, threads // 2 + 2))


class Executor:
    """Threads that carry out batches, record by record; reads first, and at most `writers` of them write."""

    def __init__(self, store: RecordStore, slots: NDArray[np.uint8], channel: Channel, threads: int) -> None:
        self._store = store
        self._slots = slots
        self._channel = channel
        self._max_writing = writers(threads)
        self._writing = 0
        self._clears = 0
        self._reads: deque[tuple[_Batch, int]] = deque()
        self._writes: deque[tuple[_Batch, int]] = deque()
        self._work = threading.Condition()
        self._closed = False
        self._read_until = 0.0  # when the last batch of reads was over
        self._reported: dict[str, float] = {}
        self._threads = [
            threading.Thread(target=self._run, name=f"kvbm-io-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Batch) -> None:
        host_slots = np.frombuffer(request.host_slots, np.int32)
        now = time.monotonic()
        batch = _Batch(
            request,
            now,
            now + request.timeout_s,
            host_slots,
            np.frombuffer(request.disk_slots, np.int32),
            np.frombuffer(request.checksums, np.uint64) if request.checksums else None,
            np.zeros(len(host_slots), np.uint64),
            len(host_slots),
            self._clears,
        )
        with self._work:
            queue = self._writes if request.write else self._reads
            queue.extend((batch, i) for i in range(len(host_slots)))
            self._work.notify(len(host_slots))

    def clear(self) -> None:
        """Clear the store; the writes that wait fail."""
        with self._work:
            self._clears += 1
            waiting, self._writes = self._writes, deque()
            replies = [self._settle(batch, i, Status.ERROR) for batch, i in waiting]
        for reply in replies:
            if reply is not None:
                self._channel.send(reply)
        self._store.clear()
        self._channel.send(Cleared())

    def close(self, patience_s: float) -> bool:
        """Let what is under way end, start nothing more; whether it ended in time."""
        with self._work:
            self._closed = True
            self._work.notify_all()
        end = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # ---- in the threads ----

    def _run(self) -> None:
        work = self._next()
        while work is not None:
            batch, i = work
            status = self._execute(batch, i)
            with self._work:
                if batch.request.write:
                    self._writing -= 1
                reply = self._settle(batch, i, status)
                # At once, rather than by another thread that would have to be woken for it.
                work = self._take()
                if self._writes and self._writing < self._max_writing:  # this one reads now
                    self._work.notify()
            if reply is not None:
                self._channel.send(reply)
            if work is None:
                work = self._next()

    def _next(self) -> tuple[_Batch, int] | None:
        """Waits for work; None when closed."""
        with self._work:
            while (work := self._take()) is None and not self._closed:
                self._work.wait()
            return work

    def _take(self) -> tuple[_Batch, int] | None:
        if self._closed:
            return None
        if self._reads:
            return self._reads.popleft()
        if self._writes and self._writing < self._max_writing:
            self._writing += 1
            return self._writes.popleft()
        return None

    def _execute(self, batch: _Batch, i: int) -> Status:
        if time.monotonic() > batch.deadline:
            return Status.TIMEOUT
        request = batch.request
        key = Key(request.hashes[16 * i : 16 * i + 16], request.groups[i])
        slot, record = int(batch.disk_slots[i]), self._slots[batch.host_slots[i]]
        try:
            if request.write:
                expected = int(batch.expected[i]) if batch.expected is not None else None
                self._store.write(slot, key, record, expected)
                if batch.clears != self._clears:  # it may have begun after the clearing that came after it
                    self._store.discard(slot)
                    return Status.ERROR
            else:
                batch.checksums[i] = self._store.read(slot, key, record)
        except DamagedRecordError as error:
            self._report(f"record {slot} is dropped: {error}", str(error))
            return Status.DAMAGED
        except (StorageError, OSError) as error:
            what = "written" if request.write else "read"
            self._report(f"record {slot} can't be {what}: {error}", f"{what} {type(error)}")
            return Status.ERROR
        except Exception:
            logger.exception("internal error with record %d", slot)
            return Status.ERROR
        return Status.DONE

    def _settle(self, batch: _Batch, i: int, status: Status) -> Done | None:
        """Under the lock: what became of a record; the reply if it was the last of its batch."""
        if status:
            batch.failed.append(i)
            batch.status = max(batch.status, status)
        batch.left -= 1
        if batch.left:
            return None
        now = time.monotonic()
        seconds = now - max(batch.received, self._read_until)
        if not batch.request.write:
            self._read_until = now
        failed = np.array(sorted(batch.failed), np.int32)
        return Done(batch.request.id, failed.tobytes(), int(batch.status), batch.checksums.tobytes(), seconds)

    def _report(self, text: str, kind: str) -> None:
        """One line for errors of a kind in ten seconds: a dead drive has thousands."""
        now = time.monotonic()
        if now - self._reported.get(kind, -_SAME_ERROR_EVERY_S) >= _SAME_ERROR_EVERY_S:
            self._reported[kind] = now
            logger.warning("%s (further ones of this kind are not reported for a while)", text)


class _Forward(logging.Handler):
    """Log lines appear in the engine's log."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(LogLine(record.levelno, self.format(record)))


def serve(arena_fd: int, channel: Channel) -> None:
    """Until the worker is gone."""
    options = channel.options()
    size = options.host_slots * options.slot_bytes
    memory = map_shared(arena_fd, size)
    try:
        for folder in options.folders:
            Path(folder).mkdir(parents=True, exist_ok=True)
        store = open_store(options, memory, channel.is_open)
        found = store.recover()
    except (StorageError, OSError) as error:
        channel.send(Refused(str(error)))
        return
    _announce(channel, found)
    executor = Executor(
        store, memory.reshape(options.host_slots, options.slot_bytes), channel, options.threads
    )
    threading.Thread(target=_commit_for_ever, args=(store,), name="kvbm-commit", daemon=True).start()
    while (request := channel.receive()) is not None:
        match request:
            case Batch():
                executor.submit(request)
            case Discard():
                _discard(store, np.frombuffer(request.disk_slots, np.int32))
            case Clear():
                executor.clear()
    if executor.close(patience_s=5.0):
        store.close()


def _announce(channel: Channel, found: Found) -> None:
    for start in range(0, max(1, len(found)), _FOUND_AT_ONCE):
        part = slice(start, start + _FOUND_AT_ONCE)
        channel.send(
            FoundRecords(
                found.slots[part].tobytes(),
                np.ascontiguousarray(found.hashes[part]).tobytes(),
                found.groups[part].tobytes(),
                last=start + _FOUND_AT_ONCE >= len(found),
                foreign=found.foreign,
            )
        )


def _commit_for_ever(store: RecordStore) -> None:
    while True:
        time.sleep(_COMMIT_EVERY_S)
        try:
            store.commit()
        except (StorageError, OSError) as error:
            logger.warning("written records could not be made safe against a power cut: %s", error)


def _discard(store: RecordStore, slots: NDArray[np.int32]) -> None:
    for slot in slots.tolist():
        with contextlib.suppress(StorageError, OSError):  # it is damaged in any case
            store.discard(slot)


def main() -> None:
    arena_fd, socket_fd, replies_fd = map(int, sys.argv[1:4])
    channel = Channel(socket.socket(fileno=socket_fd), ReplyCount(replies_fd))
    logger.addHandler(_Forward(channel))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    code = 0
    try:
        serve(arena_fd, channel)
    except Exception:  # a clearing that failed, for one: the next process gets to do it again
        logger.exception("the I/O process can't go on")
        code = 1
    # Threads that hang in a system call must not keep the process.
    os._exit(code)


if __name__ == "__main__":
    main()
