"""Traces of requests: what `kvbm simulate` replays. Hashes and lengths only, no text and no tokens.

A line is a request, in the format of the traces that Mooncake published (FAST '25):

    {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [one for each block]}

Mooncake's blocks have 512 tokens, and the last hash_id may be of a block that is not full. A trace that we
record says so in a first line, `{"kvbm_trace": 1, "block_size": ...}`. Its hash_ids are 53 bits of the
sequence hashes, so that every JSON reader keeps them exact; they are of full blocks only, those of the reply
included; its timestamps count from `started`, in seconds since 1970.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from kvbm.errors import TraceError
from kvbm.logic.hashing import Hashes
from kvbm.logic.simulation import Request, hashes_of

logger = logging.getLogger(__name__)

MOONCAKE_BLOCK_SIZE = 512
VERSION = 1

_Tokens = Annotated[int, Meta(ge=0)]
_HASH_SHIFT = np.uint64(64 - 53)
_MAX_QUEUED_REQUESTS = 4096
_MAX_QUEUED_BLOCKS = 1 << 20  # 8 MB
_MAX_NUMBER = 100  # of files with one name, one for each engine
_CLOSE_TIMEOUT_S = 5.0
_MAX_HEADER_BYTES = 4096
_TAIL_BYTES = 1 << 16


class _Header(msgspec.Struct, kw_only=True, omit_defaults=True):
    kvbm_trace: int
    block_size: Annotated[int, Meta(ge=1)]
    block_bytes: Annotated[int, Meta(ge=1)] | None = None  # in the host tier, all ranks together
    started: float = 0.0


class _Line(msgspec.Struct):
    timestamp: float
    input_length: _Tokens
    output_length: _Tokens
    hash_ids: list[Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]]


_read_header = msgspec.json.Decoder(_Header).decode
_read_line = msgspec.json.Decoder(_Line).decode


# ---- reading ----


def read_trace(path: str | os.PathLike[str], block_size: int | None = None) -> "Trace":
    """Open a trace. block_size: tokens, where the trace does not say; Mooncake's otherwise.

    TraceError if the file can't be read.
    """
    return Trace(Path(path), block_size)


class Trace:
    """The requests of a file in the order of its lines, read anew by each iteration.

    block_bytes: what a block took where the trace was recorded, if that is known.
    """

    def __init__(self, path: Path, block_size: int | None = None) -> None:
        self.path = path
        self.block_size = block_size or MOONCAKE_BLOCK_SIZE
        self.block_bytes: int | None = None
        self._recorded = False  # by us
        self._started = 0.0
        first = next(self._lines(), (0, b""))[1]
        if b'"kvbm_trace"' in first:
            header = self._header(1, first)
            if block_size not in (None, header.block_size):
                raise TraceError(
                    f"{path} was recorded with blocks of {header.block_size} tokens, not {block_size}: don't "
                    f"give a block size for it."
                )
            self._recorded = True
            self.block_size = header.block_size
            self.block_bytes = header.block_bytes
            self._started = header.started

    def __iter__(self) -> Iterator[Request]:
        """TraceError names the first line that is broken; one that is still being written is left out."""
        later_s = 0.0
        for number, line in self._lines():
            if self._recorded and b'"kvbm_trace"' in line:  # again, where traces were joined
                later_s = self._header(number, line).started - self._started
                continue
            if line.isspace():
                continue
            try:
                parsed = _read_line(line)
            except msgspec.MsgspecError as error:
                if self._recorded and not line.endswith(b"\n"):
                    return
                raise self._broken(number, error) from None
            yield self._request(number, parsed, later_s)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with open(self.path, "rb") as file:
                yield from enumerate(file, 1)
        except OSError as error:
            raise TraceError(
                f"{self.path} can't be read: {error.strerror}. Give the path of a trace that was recorded "
                f"with DYN_KVBM_ENABLE_RECORD=1, or of one in Mooncake's format."
            ) from None

    def _header(self, number: int, line: bytes) -> _Header:
        try:
            header = _read_header(line)
        except msgspec.MsgspecError as error:
            raise self._broken(number, error) from None
        if header.kvbm_trace != VERSION:
            raise TraceError(
                f"{self.path}, line {number}: version {header.kvbm_trace} of the format, this KVBM reads "
                f"version {VERSION}. Use the KVBM that recorded it."
            )
        if self._recorded and header.block_size != self.block_size:
            raise TraceError(
                f"{self.path}, line {number}: blocks of {header.block_size} tokens follow blocks of "
                f"{self.block_size}. Split the file there: a replay has one block size."
            )
        return header

    def _request(self, number: int, line: _Line, later_s: float) -> Request:
        known = len(line.hash_ids)
        if not self._recorded:
            full, rest = divmod(line.input_length, self.block_size)
            if known not in (full, full + (rest > 0)):
                raise TraceError(
                    f"{self.path}, line {number}: {known} hash_ids for {line.input_length} tokens of input, "
                    f"which are {full} full blocks of {self.block_size}. Say with --block-size how many "
                    f"tokens its blocks have, or correct or delete the line."
                )
            known = full  # what is not full can't be matched
        if len(set(line.hash_ids)) < len(line.hash_ids):
            raise TraceError(
                f"{self.path}, line {number}: a hash_id occurs twice. Each names a block and all that comes "
                f"before it, so it can't: correct or delete the line."
            )
        hashes = hashes_of(np.array(line.hash_ids[:known], np.uint64))
        return Request(later_s + line.timestamp / 1e3, line.input_length, line.output_length, hashes)

    def _broken(self, number: int, error: msgspec.MsgspecError) -> TraceError:
        return TraceError(
            f"{self.path}, line {number} is no request: {error}. A line has to be JSON with timestamp, "
            f"input_length, output_length and hash_ids; correct or delete it."
        )


# ---- writing ----


class TraceWriter:
    """Records the requests of one engine.

    The file is continued if it is a trace of blocks of the same size that nobody else writes to; otherwise
    its name gets a number: .1, .2, ... `request` is for one thread, the engine's scheduler: it takes some
    microseconds, never waits and never raises. A thread of the writer's own writes.

    max_bytes: the size at which the file ends. block_bytes: what a block takes in the host tier, on all ranks
    together, so that a simulation can be asked in GB. TraceError if no file can be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        block_size: int,
        max_bytes: int,
        *,
        block_bytes: int | None = None,
    ) -> None:
        self.written = 0  # requests
        self.dropped = 0  # requests that came faster than they could be written
        self.ended = False  # nothing is recorded any more: closed, max_bytes reached, or the disk failed
        self._max_bytes = max_bytes
        self._queue: SimpleQueue[tuple[int, int, int, NDArray[np.uint64]] | None] = SimpleQueue()
        # Blocks given by the engine's thread and taken by the writer's: each counts what is its own.
        self._given = self._taken = 0
        self.path, self._fd, self._started = _claim_file(Path(path), block_size, block_bytes)
        self._size = os.fstat(self._fd).st_size
        self._thread = threading.Thread(target=self._run, name="kvbm-trace", daemon=True)
        self._thread.start()

    def request(self, at_s: float, input_tokens: int, output_tokens: int, hashes: Hashes) -> None:
        """A request that has ended. at_s: its arrival in seconds since 1970. hashes: of its full blocks."""
        if self.ended:
            return
        try:
            if (
                self._queue.qsize() >= _MAX_QUEUED_REQUESTS
                or self._given - self._taken + len(hashes) > _MAX_QUEUED_BLOCKS
            ):
                self.dropped += 1
                return
            timestamp = max(0, round((at_s - self._started) * 1e3))
            ids = hashes[:, 0] >> _HASH_SHIFT
            self._given += len(ids)
            self._queue.put((timestamp, input_tokens, output_tokens, ids))
        except Exception:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, at most for some seconds, and end."""
        self.ended = True
        self._queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                timestamp, input_tokens, output_tokens, ids = item
                self._taken += len(ids)
                line = _Line(timestamp, input_tokens, output_tokens, ids.tolist())
                if not self._write(msgspec.json.encode(line) + b"\n"):
                    break
        except Exception as error:
            logger.warning("KVBM: recording of requests ends: %s", error)
        self.ended = True
        if self.dropped:
            logger.warning("KVBM: %s lacks %d requests that came too fast", self.path, self.dropped)
        os.close(self._fd)  # and with it the lock

    def _write(self, line: bytes) -> bool:
        if self._size + len(line) > self._max_bytes:
            logger.warning("KVBM: %s has reached its size, recording ends (KVBM_RECORD_MAX_MB)", self.path)
            return False
        try:
            if os.pwrite(self._fd, line, self._size) < len(line):
                raise OSError("no space left")
        except OSError:
            os.ftruncate(self._fd, self._size)  # half a line would make the file unreadable
            raise
        self._size += len(line)
        self.written += 1
        return True


def _claim_file(path: Path, block_size: int, block_bytes: int | None) -> tuple[Path, int, float]:
    """The first of path, path.1, ... that can be had, its descriptor, locked, and when the trace started."""
    for number in range(_MAX_NUMBER):
        candidate = path.with_name(f"{path.name}.{number}") if number else path
        try:
            # A link in a folder that all may write to could lead to any file of this user.
            fd = os.open(candidate, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            if isinstance(error, PermissionError) and candidate.exists():  # another user's
                continue
            raise _unwritable(path, error) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            started = _prepare(fd, block_size, block_bytes)
            if started is not None:
                return candidate, fd, started
        except BlockingIOError:
            pass  # another engine's
        except OSError as error:
            os.close(fd)
            raise _unwritable(path, error) from None
        os.close(fd)
    raise TraceError(f"{path} and {_MAX_NUMBER - 1} numbered ones are taken: delete some, or name another.")


def _prepare(fd: int, block_size: int, block_bytes: int | None) -> float | None:
    """Make the file ready for the next line. None if it is something else than a trace of these blocks."""
    size = os.fstat(fd).st_size
    if not size:
        header = _Header(
            kvbm_trace=VERSION, block_size=block_size, block_bytes=block_bytes, started=time.time()
        )
        os.pwrite(fd, msgspec.json.encode(header) + b"\n", 0)
        return header.started
    try:
        header = _read_header(os.pread(fd, _MAX_HEADER_BYTES, 0).partition(b"\n")[0])
    except msgspec.MsgspecError:
        return None
    if (header.kvbm_trace, header.block_size, header.block_bytes) != (VERSION, block_size, block_bytes):
        return None
    # An engine that was killed may have left half a line.
    end = size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            os.ftruncate(fd, start + newline + 1)
            return header.started
        end = start
    return None


def _unwritable(path: Path, error: OSError) -> TraceError:
    return TraceError(
        f"{path} can't be written: {error.strerror}. Set KVBM_RECORD_FILE to a file in a directory that "
        f"exists and may be written to."
    )
