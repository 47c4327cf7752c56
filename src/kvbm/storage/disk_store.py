"""Records on local disks: container files, an index, and checks of every byte that comes back.

The order of writes is what makes it safe to kill the process or cut the power at any moment: the entry is
marked pending, the record is written, and only when the drive has confirmed it (`commit`) is the entry marked
stored. Whatever the index says, a record is served only if its header names this store, this slot and this
block, and its bytes have the header's checksum.
"""

import contextlib
import fcntl
import logging
import mmap
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvbm.errors import DamagedRecordError, StorageError
from kvbm.storage.adoption import Adoption, Target
from kvbm.storage.containers import Allocation, Containers
from kvbm.storage.file_io import FileIo, PosixFileIo
from kvbm.storage.index_file import IndexFile, State
from kvbm.storage.record import (
    HEADER_BYTES,
    Header,
    check_record,
    decode_header,
    encode_header,
    record_digest,
)
from kvbm.storage.store import Bytes, Found, Identity, Key, RecordStore

logger = logging.getLogger(__name__)

_SCAN_AT_ONCE = 1024
_SCAN_THREADS = 32  # headers are 4 KiB reads: a drive answers many at once


class DiskStore(RecordStore):
    """Records in container files of `folders`, the first of which also has the index. Each has a lock.

    memory: the arena that records are read into and written from. patience_s: how long a lock that another
    process holds is waited for; then StorageError. adoption: of what other numbers of ranks have stored.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        identity: Identity,
        num_slots: int,
        memory: NDArray[np.uint8],
        *,
        slot_bytes: int,
        io: FileIo | None = None,
        how: Allocation | None = None,
        threads: int = 16,
        patience_s: float = 0.0,
        adoption: Adoption | None = None,
    ) -> None:
        self.num_slots = num_slots
        self._folders = folders
        self._adoption = adoption
        self._identity = identity
        self._io = io or PosixFileIo()
        self._how = how or Allocation()
        self._pages = _Pages(threads + _SCAN_THREADS)
        self._io.attach(memory)
        self._io.attach(self._pages.memory)
        self._lock = threading.Lock()
        self._committing = threading.Lock()
        self._written: list[tuple[int, int]] = []  # slots and sequences since the last commit
        self._sequence = 0
        self._room = True
        with contextlib.ExitStack() as opened:
            for folder in dict.fromkeys(folders):
                opened.callback(os.close, _lock_folder(folder, patience_s))
            self._containers = Containers(folders, num_slots, slot_bytes, self._how)
            opened.callback(self._containers.close)
            self._index = IndexFile(folders[0] / "index.kvbm", identity, num_slots, self._io)
            opened.callback(self._index.close)
            self._opened = opened.pop_all()
        self._epoch = max(self._containers.epoch, self._index.epoch)

    @property
    def direct(self) -> bool:
        """Whether records go by O_DIRECT."""
        return self._containers.direct

    # ---- RecordStore ----

    def recover(self) -> Found:
        index = self._index
        foreign = False
        for fd in self._containers.fds:  # what a killed process wrote may still be on its way
            self._io.sync(fd)
        if not self._containers.kept:
            foreign = self._containers.foreign
            self._begin_epoch(self._epoch + 1)
        elif index.unknown or index.epoch < self._epoch:  # the latter: the power went during a clearing
            logger.warning(
                "the index is missing or damaged: reading the headers of %d records", self.num_slots
            )
            headers = self._scan(range(self.num_slots))
            self._epoch = max([self._epoch, *(header.epoch for header in headers)])
            index.restore([header for header in headers if header.epoch == self._epoch], self._epoch)
        elif index.fresh:
            foreign = True
            logger.warning("the records here are of another model or geometry and will be overwritten")
        doubtful = np.append(index.torn, np.flatnonzero(index.entries["state"] == State.PENDING))
        if len(doubtful):
            self._resolve(doubtful)
        if self._adoption is not None:
            self._adopt(self._adoption)
        entries = index.entries
        self._sequence = int(entries["sequence"].max(initial=0)) + 1
        slots = np.flatnonzero(entries["state"] == State.STORED)
        entries = entries[slots]
        # Of one minute the last written first, as sequences are written head first and lose their tail first.
        order = np.lexsort((-entries["sequence"].astype(np.int64), entries["written_at"] // 60))
        entries, slots = entries[order], slots[order]
        hashes = np.stack([entries["low"], entries["high"]], axis=1)
        unique = _distinct(hashes, entries["group"])
        return Found(slots[unique].astype(np.int32), hashes[unique], entries["group"][unique], foreign)

    def write(self, slot: int, key: Key, record: Bytes, checksum: int | None = None) -> None:
        self._require_room()
        epoch = self._epoch  # a clearing from here on is one of this record too
        digest = record_digest(record, self._identity)
        if checksum is not None and digest != checksum:
            raise DamagedRecordError("the record changed in host memory since it was written there")
        with self._lock:
            self._sequence += 1
            header = Header(key, slot, epoch, self._sequence, int(time.time()), digest)
        self._write(header, record)

    def _write(self, header: Header, record: Bytes) -> None:
        slot = header.slot
        self._index.pending(slot, header)
        fd, offset = self._containers.place(slot)
        with self._pages.one() as page:
            encode_header(page, self._identity, header)
            self._io.write(fd, offset, [page, record])
        with self._lock:
            if header.epoch != self._epoch:
                raise StorageError("the store was cleared meanwhile")
            self._written.append((slot, header.sequence))

    def read(self, slot: int, key: Key, record: Bytes) -> int:
        fd, offset = self._containers.place(slot)
        with self._pages.one() as page:
            self._io.read(fd, offset, [page, record])
            return check_record(page, record, self._identity, key, slot, self._epoch).checksum

    def discard(self, slot: int) -> None:
        self._index.free(slot)
        fd, offset = self._containers.place(slot)
        with self._pages.one() as page:
            page[:] = 0
            self._io.write(fd, offset, [page])

    def clear(self) -> None:
        # At least the time: what was stored before must not come back from another number of ranks.
        self._begin_epoch(max(self._epoch + 1, int(time.time())))

    def _begin_epoch(self, epoch: int) -> None:
        with self._lock:
            self._epoch = epoch
            self._written = []
            # The moment when all that was there is gone, whatever the index says or is lost.
            with self._pages.one() as page:
                fd, offset = self._containers.encode_epoch(page, self._epoch)
                self._io.write(fd, offset, [page])
            self._io.sync(fd)
            self._index.restore([], self._epoch)

    def commit(self) -> None:
        with self._committing:
            with self._lock:
                written, self._written = self._written, []
            if written:
                for fd in {self._containers.place(slot)[0] for slot, _ in written}:
                    self._io.sync(fd)
                # What was cleared meanwhile has no entry any more, or that of another write.
                slots, sequences = np.array(written, np.int64).T
                self._index.stored(slots, sequences)
                self._index.sync()
        if self._containers.sparse:
            room = self._containers.free_bytes >= self._how.min_free_bytes
            if self._room and not room:
                logger.warning("the drive has reached its free-space floor: nothing more is written")
            self._room = room

    def close(self) -> None:
        with contextlib.suppress(StorageError, OSError):
            self.commit()
        self._io.close()
        self._opened.close()

    # ---- inside ----

    def _require_room(self) -> None:
        if not self._room:
            raise StorageError("the drive has reached its free-space floor")

    def _adopt(self, adoption: Adoption) -> None:
        def write(slot: int, key: Key, sequence: int, written_at: int, record: Bytes) -> None:
            self._require_room()
            digest = record_digest(record, self._identity)
            self._write(Header(key, slot, self._epoch, sequence, written_at, digest), record)

        slot_bytes = self._containers.stride - HEADER_BYTES
        adoption.run(
            Target(
                self._folders,
                self._identity,
                self._how,
                slot_bytes,
                self._index.entries,
                self._epoch,
                write,
                self.commit,
            )
        )

    def _scan(self, slots: Sequence[int]) -> list[Header]:
        """Headers of those slots that have a plausible one."""

        def scan(part: Sequence[int]) -> list[Header]:
            return [header for header in map(self._header, part) if header is not None]

        parts = [slots[at : at + _SCAN_AT_ONCE] for at in range(0, len(slots), _SCAN_AT_ONCE)]
        with ThreadPoolExecutor(_SCAN_THREADS, "kvbm-scan") as pool:
            return [header for headers in pool.map(scan, parts) for header in headers]

    def _header(self, slot: int) -> Header | None:
        fd, offset = self._containers.place(slot)
        try:
            with self._pages.one() as page:
                self._io.read(fd, offset, [page])
                header = decode_header(page, self._identity)
        except (StorageError, OSError):
            return None
        return header if header.slot == slot else None

    def _resolve(self, slots: NDArray[np.int64]) -> None:
        """Keep what was written whole in slots that were being written, or whose entries are damaged."""
        size = self._containers.stride - HEADER_BYTES
        whole = []
        with mmap.mmap(-1, size) as buffer:
            record = np.frombuffer(buffer, np.uint8)
            for slot in slots.tolist():
                header = self._header(slot)
                if header is not None:
                    with contextlib.suppress(StorageError, OSError):
                        self.read(slot, header.key, record)
                        whole.append(header)
                        continue
                self._index.free(slot)
            del record
        self._index.adopt(whole)
        self._index.sync()
        logger.info("of %d records that may have been torn %d are whole", len(slots), len(whole))


class _Pages:
    """Aligned header pages, one for each thread that may be at work."""

    def __init__(self, count: int) -> None:
        self.memory = np.frombuffer(mmap.mmap(-1, count * HEADER_BYTES), np.uint8)
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for page in self.memory.reshape(count, HEADER_BYTES):
            self._free.put(page)

    @contextlib.contextmanager
    def one(self) -> Iterator[Bytes]:
        page = self._free.get()
        try:
            yield page
        finally:
            self._free.put(page)


def _lock_folder(folder: Path, patience_s: float) -> int:
    """The descriptor whose lock says that the folder is in use; it goes with the process."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(fd, 0)
            os.pwrite(fd, f"{os.getppid()}\n".encode(), 0)
            return fd
        except OSError as error:
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
            owner = os.pread(fd, 20, 0).decode(errors="replace").strip()
            os.close(fd)
            if not isinstance(error, BlockingIOError):
                raise StorageError(f"{folder} can't be locked: {error}") from error
            raise StorageError(
                f"{folder} is in use by another engine (process {owner}): give each its own "
                f"DYN_KVBM_DISK_CACHE_DIR"
            ) from None


def _distinct(hashes: NDArray[np.uint64], groups: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions of one each of equal keys, ascending: a block may have been written to a second slot."""
    words = np.sort(hashes[:, 0])
    if (words[1:] != words[:-1]).all():  # nearly always, and twenty times faster than comparing whole keys
        return np.arange(len(hashes))
    keys = np.stack([hashes[:, 0], hashes[:, 1], groups.astype(np.uint64)], axis=1)
    return np.sort(np.unique(keys, axis=0, return_index=True)[1])
