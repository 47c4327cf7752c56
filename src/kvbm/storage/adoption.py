"""Records that another number of ranks stored in the same directories, made records of this rank.

Slot i of theirs becomes slot i of ours, where ours is free: so ranks that do this each for itself agree, even
if a record can't be had on one of them. Theirs are only read, and only while no engine has them open.
"""

import contextlib
import fcntl
import logging
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvbm.errors import StorageError
from kvbm.storage.containers import Allocation, Containers, numbers_of_ranks, rank_folder
from kvbm.storage.file_io import PosixFileIo
from kvbm.storage.index_file import State, read_index
from kvbm.storage.record import HEADER_BYTES, check_record
from kvbm.storage.split import Split
from kvbm.storage.store import Bytes, Identity, Key

logger = logging.getLogger(__name__)

_HASH = struct.Struct("<QQ")
_PATIENCE_S = 60.0  # the tier is not used meanwhile; the next start goes on
_THREADS = 4
_COMMIT_EVERY = 256  # records
_NICE = 10  # the engine's threads come first; the kernel derives the priority of reads and writes from it


@dataclass(frozen=True, slots=True)
class Target:
    """The store that records are made for. entries: of its index, as they are at any time.

    since: records written up to then, in seconds since 1970, are not wanted. write: slot, key, number and
    time of the write as the source has them, and the record.
    """

    folders: Sequence[Path]
    identity: Identity
    how: Allocation
    slot_bytes: int
    entries: NDArray[np.void]
    since: int
    write: Callable[[int, Key, int, int, Bytes], None]
    commit: Callable[[], None]


class Adoption:
    """alive: whether there is still an engine to do this for; asked by several threads."""

    def __init__(self, split: Split, alive: Callable[[], bool]) -> None:
        self._split = split
        self._alive = alive
        self._end = 0.0

    def run(self, target: Target) -> None:
        """The last written first, for a minute at most."""
        self._end = time.monotonic() + _PATIENCE_S
        for ranks in numbers_of_ranks(target.folders[0]):
            if ranks == target.identity.ranks:
                continue
            try:
                self._adopt(ranks, target)
            except (StorageError, OSError) as error:
                logger.info("what %d ranks have stored here stays theirs: %s", ranks, error)
            except Exception:  # the tier has to get ready
                logger.exception("internal error with what %d ranks have stored here", ranks)

    def _adopt(self, ranks: int, target: Target) -> None:
        split, own = self._split, target.identity
        if not split.allows(ranks):
            raise StorageError(f"{split.heads} KV heads are not shared out over {ranks} ranks")
        with contextlib.ExitStack() as opened:
            # All of them on every rank, so that all ranks choose the same.
            sources = {
                rank: opened.enter_context(_Source(rank, ranks, split, target))
                for rank in split.holders(ranks)
            }
            wanted = choose([source.entries for source in sources.values()], target.entries, target.since)
            if not len(wanted):
                return
            shares = split.shares(own.rank, own.ranks, ranks)
            chosen = [sources[share.rank] for share in shares]
            entries = next(iter(sources.values())).entries
            buffers: SimpleQueue[_Buffers] = SimpleQueue()
            for _ in range(_THREADS):
                buffers.put(_Buffers([source.slot_bytes for source in chosen], target.slot_bytes))

            def take(slot: int) -> bool:
                """Whether the record is ours now."""
                if self._over:
                    return False
                entry = entries[slot]
                key = Key(_HASH.pack(int(entry["low"]), int(entry["high"])), int(entry["group"]))
                buffer = buffers.get()
                try:
                    for source, page, record in zip(chosen, buffer.pages, buffer.records, strict=True):
                        source.read(slot, key, page, record)
                except (StorageError, OSError):
                    return False
                else:
                    split.recut(shares, buffer.records, ranks, buffer.out, own.ranks)
                    target.write(slot, key, int(entry["sequence"]), int(entry["written_at"]), buffer.out)
                    return True
                finally:
                    buffers.put(buffer)

            taken = 0
            with ThreadPoolExecutor(_THREADS, "kvbm-adopt", _be_nice) as pool:
                for at in range(0, len(wanted), _COMMIT_EVERY):
                    if not self._over:
                        taken += sum(pool.map(take, wanted[at : at + _COMMIT_EVERY].tolist()))
                        target.commit()
            logger.info("%d of %d records that %d ranks had stored are taken over", taken, len(wanted), ranks)

    @property
    def _over(self) -> bool:
        return time.monotonic() > self._end or not self._alive()


def choose(theirs: Sequence[NDArray[np.void]], ours: NDArray[np.void], since: int) -> NDArray[np.int64]:
    """Slots whose records are to be taken, the last written first, sequences head first.

    theirs: entries of the ranks that together have all heads. All must have the record, or have been writing
    it: what is read is checked in any case.
    """
    count = min(map(len, [*theirs, ours]))
    first, own = theirs[0][:count], ours[:count]
    wanted = (first["state"] != State.FREE) & (first["written_at"] > since) & (own["state"] == State.FREE)
    for entries in theirs[1:]:
        other = entries[:count]
        wanted &= other["state"] != State.FREE
        for name in ("low", "high", "group"):
            wanted &= other[name] == first[name]
    slots = np.flatnonzero(wanted)
    slots = slots[~np.isin(first["low"][slots], ours["low"][ours["state"] != State.FREE])]
    minutes = first["written_at"][slots].astype(np.int64) // 60
    return slots[np.lexsort((first["sequence"][slots], -minutes))]


class _Source:
    """Records of one rank of another number of ranks; StorageError where they can't be used."""

    def __init__(self, rank: int, ranks: int, split: Split, target: Target) -> None:
        folders = [rank_folder(folder.parent, rank, ranks) for folder in target.folders]
        self._identity = Identity(target.identity.namespace, split.record_bytes(ranks), rank, ranks)
        self.slot_bytes = -(-self._identity.record_bytes // HEADER_BYTES) * HEADER_BYTES
        self._io = PosixFileIo()
        with contextlib.ExitStack() as opened:
            for folder in dict.fromkeys(folders):
                opened.callback(os.close, _share_folder(folder))
            index = read_index(folders[0] / "index.kvbm")
            if index is None:
                raise StorageError(f"the index in {folders[0]} is missing or damaged")
            if index.identity != self._identity:
                raise StorageError("it is of another model, geometry or engine")
            self.entries = index.entries
            how = target.how
            self._files = Containers(folders, len(index.entries), self.slot_bytes, how, read_only=True)
            opened.callback(self._files.close)
            self._epoch = index.epoch
            if self._files.epoch > index.epoch:
                raise StorageError(f"{folders[0]} was being cleared")
            self._opened = opened.pop_all()

    def read(self, slot: int, key: Key, page: Bytes, record: Bytes) -> None:
        fd, offset = self._files.place(slot)
        self._io.read(fd, offset, [page, record])
        check_record(page, record, self._identity, key, slot, self._epoch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


class _Buffers:
    """Aligned memory of one thread: a page and a record of each source, and what is made of them."""

    def __init__(self, slot_bytes: Sequence[int], own_bytes: int) -> None:
        self.pages = [_memory(HEADER_BYTES) for _ in slot_bytes]
        self.records = [_memory(size) for size in slot_bytes]
        self.out = _memory(own_bytes)


def _memory(size: int) -> Bytes:
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def _share_folder(folder: Path) -> int:
    """The descriptor of a lock that keeps engines out, but not other ranks that read."""
    fd = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise StorageError(f"an engine has {folder} open") from error
    return fd


def _be_nice() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
