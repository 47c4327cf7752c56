"""The worker's end of its I/O process: starts it, hands it batches, and lives on when it dies.

Every call comes from the engine's forward thread and returns at once. What an I/O process had not answered
when it died has failed, and not before it is gone: until then it may write to the arena.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

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
from kvbm.storage.store import Found

logger = logging.getLogger(__name__)

_BACKOFF_S = (1.0, 60.0)  # first and longest pause before a dead process is started again
_LIVED_LONG_S = 120.0  # after which its death counts as the first again
_MAX_UNSENT = 1000
_CLOSING_S = 5.0
_LOOK_EVERY = 8  # calls of `poll`: whether the process is alive and in time
_OVERDUE = 2.0  # times its timeout, after which a batch shows that the process hangs, and it is killed


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of a batch. checksums: uint64, of what was read. seconds: see `Done`."""

    id: int
    failed: NDArray[np.int32]
    status: Status
    checksums: NDArray[np.uint64]
    seconds: float = 0.0


@dataclass(slots=True)
class Replies:
    """What the I/O process said since the last `poll`."""

    results: list[BatchResult] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)


class StorageClient:
    """Batches for one rank's I/O process, which shares the arena behind `arena_fd`.

    `ready`: the store is open and all that an earlier run stored was found. `refused`: it can't be used, and
    why; then every batch fails.
    """

    def __init__(
        self, options: Options, arena_fd: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ready = False
        self.refused: str | None = None
        self._options = options
        self._arena_fd = arena_fd
        self._clock = clock
        self._replies = msgspec.msgpack.Decoder(Reply)
        self._encode = msgspec.msgpack.Encoder().encode
        self._batches: dict[int, tuple[Batch, float]] = {}  # with the time when it shows that all hangs
        self._lost: list[int] = []  # could not be sent
        self._clear_due = False  # a process has to be told to clear
        self._clearing = 0  # clears that it was told and has not confirmed
        self._discards: list[Discard] = []  # not sent yet
        self._found: list[Found] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._sent_to_us: ReplyCount | None = None
        self._polls = 0
        self._starting: threading.Thread | None = None
        self._restart_at = 0.0
        self._buffer = bytearray(MAX_MESSAGE)  # kept: an engine asks in every step
        self._backoff_s = _BACKOFF_S[0]
        self._started_at = 0.0
        self._first = True
        self._closed = False
        self._start()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def submit(self, batch: Batch) -> None:
        """Have a batch carried out. Its result comes with a later `poll`, in any case.

        It fails while the process is not ready: there it would wait, and look as if the process hung.
        """
        self._batches[batch.id] = (batch, self._clock() + _OVERDUE * batch.timeout_s)
        # Not before what was to be discarded: that may be the same slot.
        if not (self.ready and self._send_due() and self._send(batch)):
            self._lost.append(batch.id)

    def discard(self, disk_slots: NDArray[np.int32]) -> None:
        """Kept until it can be sent. What a lost one names is found out when it is read."""
        if len(self._discards) < _MAX_UNSENT:
            self._discards.append(Discard(disk_slots.tobytes()))
        self._send_due()

    def clear(self) -> None:
        """Comes about in any case, unless this process is killed while there is no I/O process."""
        self._clear_due = True
        self._discards = []
        self._send_due()

    def poll(self) -> Replies:
        replies = Replies()
        self._polls += 1
        look = self._process is None or self._polls % _LOOK_EVERY == 0
        count = self._sent_to_us
        if look or self._lost or self._clear_due or self._discards or count is None or count.is_due:
            self._send_due()
            for id_ in self._lost:
                self._fail(id_, replies)
            self._lost = []
            self._receive(replies, until_empty=look)
        if look:
            self._check(replies)
        return replies

    def close(self) -> None:
        """Let the process end by itself: it commits what it has written. A clearing is waited for."""
        end = time.monotonic() + _CLOSING_S
        self._restart_at = 0.0
        while (self._clear_due or self._clearing) and self.refused is None and time.monotonic() < end:
            self.poll()
            time.sleep(0.005)
        self._closed = True
        if self._starting is not None:
            self._starting.join()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_CLOSING_S)

    # ---- inside ----

    def _send(self, request: Request) -> bool:
        if self._socket is None or self.refused is not None:
            return False
        try:
            self._socket.send(self._encode(request))
        except OSError:  # dead, or so busy that its socket is full
            return False
        return True

    def _send_due(self) -> bool:
        """Send what has to be sent before anything else; whether that is done."""
        if self._clear_due:
            if not self._send(Clear()):
                return False
            self._clear_due = False
            self._clearing += 1
        while self._discards:
            if not self._send(self._discards[0]):
                return False
            del self._discards[0]
        return True

    def _receive(self, replies: Replies, until_empty: bool) -> None:
        """until_empty: of what is there, and to see the end of a process."""
        count = self._sent_to_us
        while self._socket is not None and count is not None and (until_empty or count.is_due):
            try:
                size = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if not size:
                self._socket.close()
                self._socket = None
                return
            count.add_received()
            self._take(self._replies.decode(memoryview(self._buffer)[:size]), replies)

    def _take(self, reply: Reply, replies: Replies) -> None:
        match reply:
            case Done():
                if self._batches.pop(reply.id, None) is not None:
                    failed = np.frombuffer(reply.failed, np.int32)
                    checksums = np.frombuffer(reply.checksums, np.uint64)
                    replies.results.append(
                        BatchResult(reply.id, failed, Status(reply.status), checksums, reply.seconds)
                    )
            case FoundRecords():
                self._found.append(
                    Found(
                        np.frombuffer(reply.slots, np.int32),
                        np.frombuffer(reply.hashes, np.uint64).reshape(-1, 2),
                        np.frombuffer(reply.groups, np.uint8),
                        reply.foreign,
                    )
                )
                if reply.last:
                    if self._first:  # what a later process finds is known here, or was withdrawn
                        replies.found = self._found
                    self._found = []
                    self.ready, self._first = True, False
            case Cleared():
                self._clearing -= 1
            case Refused():
                if self._first:
                    self.refused = reply.reason
                logger.error("KVBM: the disk tier can't be used: %s", reply.reason)
            case LogLine():
                logger.log(reply.level, "KVBM disk: %s", reply.text)

    def _check(self, replies: Replies) -> None:
        """See whether the process lives and works; if not, fail its batches and start another in time."""
        now = self._clock()
        process = self._process
        if process is not None:
            if any(overdue <= now for _, overdue in self._batches.values()):
                process.kill()
            if self._socket is None and process.poll() is not None:
                self._process = None
                self.ready = False
                self._found = []
                self._clear_due |= self._clearing > 0
                self._clearing = 0
                if self.refused is None and not self._closed:
                    self._plan_restart(now, process.returncode)
        if self._process is None:
            # Nobody can touch the arena on their behalf any more.
            for id_ in list(self._batches):
                self._fail(id_, replies)
            if (
                not self._closed
                and self.refused is None
                and self._starting is None
                and now >= self._restart_at
            ):
                # Some milliseconds that the forward thread has better use for.
                self._starting = threading.Thread(target=self._start, name="kvbm-start-io", daemon=True)
                self._starting.start()
        if self._starting is not None and not self._starting.is_alive():
            self._starting = None

    def _plan_restart(self, now: float, code: int) -> None:
        if now - self._started_at > _LIVED_LONG_S:
            self._backoff_s = _BACKOFF_S[0]
        self._restart_at = now + self._backoff_s
        logger.warning(
            "KVBM: the I/O process has ended (%d); the engine goes on, it is started again in %.0f s",
            code,
            self._backoff_s,
        )
        self._backoff_s = min(2 * self._backoff_s, _BACKOFF_S[1])

    def _fail(self, id_: int, replies: Replies) -> None:
        known = self._batches.pop(id_, None)
        if known is not None:
            count = len(known[0].host_slots) // 4
            failed = np.arange(count, dtype=np.int32)
            replies.results.append(BatchResult(id_, failed, Status.UNAVAILABLE, np.zeros(count, np.uint64)))

    def _start(self) -> None:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            count = ReplyCount()
            with theirs, contextlib.closing(count):
                ours.setblocking(False)
                ours.send(self._encode(self._options))
                fds = (self._arena_fd, theirs.fileno(), count.fd)
                process = subprocess.Popen(
                    # -P: the current directory must not shadow modules
                    [sys.executable, "-P", "-m", "kvbm.storage.process", *map(str, fds)],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    env=_environment(),
                )
        except OSError as error:
            logger.warning("KVBM: the I/O process can't be started: %s", error)
            self._restart_at = self._clock() + self._backoff_s
            return
        self._started_at = self._clock()
        self._sent_to_us, self._socket, self._process = count, ours, process


def _environment() -> dict[str, str]:
    """Ours, with the place where this package was imported from."""
    source = str(Path(__file__).parents[2])
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{path}" if path else source}
