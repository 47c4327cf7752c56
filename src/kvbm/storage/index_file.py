"""The index of a disk store: which record lies in which slot, in one small file, read at once at start.

The records' own headers are the truth, this is their summary: an entry of 40 bytes a slot. An entry is
PENDING from before its record is written until the record is known to be safe, then STORED. So after a crash
the few pending records are read and checked, and the stored ones are believed until they are read. Where the
file is missing or damaged, the headers are read instead: all of them, or those of the damaged entries.
"""

import os
import struct
import threading
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvbm.storage.file_io import FileIo
from kvbm.storage.record import FORMAT, Header
from kvbm.storage.store import Identity

PAGE = 4096
_MAGIC = b"KVBMINDX"
_TITLE = struct.Struct("<8sIIIQQ16sQ")  # magic, format, rank, ranks, record bytes, slots, namespace, epoch
_CHECK = struct.Struct("<Q")

ENTRY = np.dtype(
    [
        ("low", "<u8"),  # the sequence hash
        ("high", "<u8"),
        ("sequence", "<u8"),  # of the write
        ("written_at", "<u4"),
        ("state", "u1"),
        ("group", "u1"),
        ("unused", "<u2"),
        ("check", "<u8"),
    ]
)
# The same, for one entry: filling a numpy record field by field costs ten times as much.
_ENTRY = struct.Struct("<QQQIBBHQ")
_NO_ENTRY = bytes(ENTRY.itemsize)
_AT_ONCE = 1 << 22  # entries a write: the kernel takes less than 2 GiB
_NEAR = 100  # entries no further apart are written together, with those between: 4 KB
_WORD = 0xFFFFFFFFFFFFFFFF
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)


class State(IntEnum):
    FREE = 0
    PENDING = 1
    STORED = 2


class IndexFile:
    """Entries of all slots, in memory and in the file. Threads may call at once.

    `fresh`: the file was missing, damaged or of another identity, and starts empty. `unknown`: missing or
    damaged, so the headers of the containers have to be scanned; until `restore` the file stays as it is.
    `torn`: slots whose entries are damaged, and free until it is known what lies there.
    """

    def __init__(self, path: Path, identity: Identity, num_slots: int, io: FileIo) -> None:
        self._io = io
        self._identity = identity
        self._lock = threading.Lock()
        self.epoch = 0
        self.unknown = False
        self.fresh = True
        self.torn: NDArray[np.int64] = np.zeros(0, np.int64)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.entries = np.zeros(num_slots, ENTRY)
            self._load()
            self._bytes = self.entries.view(np.uint8)
            if self.fresh and not self.unknown:
                self._write_all()
                self._write_title()
        except BaseException:
            os.close(self._fd)
            raise

    def pending(self, slot: int, header: Header) -> None:
        """A record is about to be written to the slot."""
        self._set(slot, _entry(header, State.PENDING))

    def stored(self, slots: NDArray[np.int64], sequences: NDArray[np.int64]) -> None:
        """These pending records are safe. Those whose slot has been written again are passed over."""
        with self._lock:
            entries = self.entries[slots]
            safe = entries["sequence"] == sequences
            entries, slots = entries[safe], slots[safe]
            entries["state"] = State.STORED
            entries["check"] = checks(entries)
            self.entries[slots] = entries
        slots = np.sort(slots)
        firsts = slots[np.diff(slots, prepend=-1 - _NEAR) > _NEAR]
        lasts = slots[np.diff(slots, append=len(self.entries) + _NEAR) > _NEAR]
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            with self._lock:  # not for all parts: records that are about to be written wait for it
                self._write_entries(first, last + 1)

    def adopt(self, headers: list[Header]) -> None:
        """These records are safe, whatever the entries of their slots said."""
        with self._lock:
            for header in headers:
                self._put(header.slot, _entry(header, State.STORED))

    def free(self, slot: int) -> None:
        self._set(slot, _NO_ENTRY)

    def restore(self, headers: list[Header], epoch: int) -> None:
        """Enter what a scan found, and nothing else."""
        with self._lock:
            self.epoch = epoch
            self.torn = self.torn[:0]
            self.entries[:] = 0
            for header in headers:
                self.entries[header.slot] = np.frombuffer(_entry(header, State.STORED), ENTRY)[0]
            self._write_all()
            self._write_title()

    def sync(self) -> None:
        self._io.sync(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    # ---- inside ----

    def _load(self) -> None:
        if not os.fstat(self._fd).st_size:
            self.unknown = True  # perhaps it was deleted to have the headers scanned
            return
        title = _read_title(self._fd)
        if title is None:
            self.unknown = True
            return
        identity, num_slots, self.epoch = title
        if identity != self._identity or num_slots != len(self.entries):
            return
        entries = _read_entries(self._fd, num_slots)
        if entries is None:
            self.unknown = True
            return
        self.entries, self.torn = entries
        self.fresh = False

    def _write_title(self) -> None:
        identity = self._identity
        title = np.zeros(PAGE, np.uint8)
        _TITLE.pack_into(
            title.data,
            0,
            _MAGIC,
            FORMAT,
            identity.rank,
            identity.ranks,
            identity.record_bytes,
            len(self.entries),
            identity.namespace,
            self.epoch,
        )
        size = _TITLE.size
        _CHECK.pack_into(title.data, size, xxhash.xxh3_64_intdigest(title[:size].data))
        self._io.write(self._fd, 0, [title])
        self._io.sync(self._fd)

    def _write_all(self) -> None:
        for first in range(0, len(self.entries), _AT_ONCE):
            self._write_entries(first, min(first + _AT_ONCE, len(self.entries)))
        os.ftruncate(self._fd, PAGE + len(self._bytes))
        self._io.sync(self._fd)

    def _set(self, slot: int, entry: bytes) -> None:
        with self._lock:
            self._put(slot, entry)

    def _put(self, slot: int, entry: bytes) -> None:
        # As bytes: assigning a numpy record takes ten times as long.
        self._bytes.data[slot * ENTRY.itemsize : (slot + 1) * ENTRY.itemsize] = entry
        self._write_entries(slot, slot + 1)

    def _write_entries(self, first: int, end: int) -> None:
        start, stop = first * ENTRY.itemsize, end * ENTRY.itemsize
        self._io.write(self._fd, PAGE + start, [self._bytes[start:stop]])


@dataclass(frozen=True, slots=True)
class SavedIndex:
    """The index of a store that is not open, as far as it is whole."""

    identity: Identity
    epoch: int
    entries: NDArray[np.void]


def read_index(path: Path) -> SavedIndex | None:
    """None where there is none, or it is damaged."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        title = _read_title(fd)
        entries = _read_entries(fd, title[1]) if title is not None else None
    finally:
        os.close(fd)
    if title is None or entries is None or title[0] is None:
        return None
    return SavedIndex(title[0], title[2], entries[0])


def _read_title(fd: int) -> tuple[Identity | None, int, int] | None:
    """Identity (None where the format is another), slots and epoch; None where the title is damaged."""
    title = os.pread(fd, PAGE, 0)
    size = _TITLE.size
    if len(title) < PAGE or xxhash.xxh3_64_intdigest(title[:size]) != _CHECK.unpack_from(title, size)[0]:
        return None
    magic, form, rank, ranks, record_bytes, num_slots, namespace, epoch = _TITLE.unpack_from(title)
    known = (magic, form) == (_MAGIC, FORMAT)
    return Identity(namespace, record_bytes, rank, ranks) if known else None, num_slots, epoch


def _read_entries(fd: int, num_slots: int) -> tuple[NDArray[np.void], NDArray[np.int64]] | None:
    """The entries, and the slots of damaged ones, which are empty now; None where some are missing."""
    wanted = num_slots * ENTRY.itemsize
    data = os.pread(fd, wanted, PAGE)
    while len(data) < wanted and (more := os.pread(fd, 1 << 30, PAGE + len(data))):
        data += more  # the kernel reads at most 2 GiB at once
    if len(data) < wanted:
        return None
    entries = np.frombuffer(data, ENTRY, num_slots).copy()
    torn = np.flatnonzero(entries["check"] != checks(entries))
    entries[torn] = 0
    return entries, torn


def _entry(header: Header, state: State) -> bytes:
    low, high = struct.unpack("<QQ", header.key.hash)
    written_at, kind, group = min(header.written_at, 0xFFFFFFFF), int(state), header.key.group
    mixed = low * _MIX[0] & _WORD
    for word in (high, header.sequence, written_at, kind | group << 8):
        mixed = (mixed ^ (mixed >> 29) ^ word) * _MIX[1] & _WORD
    return _ENTRY.pack(low, high, header.sequence, written_at, kind, group, 0, mixed ^ (mixed >> 32))


def checks(entries: NDArray[np.void]) -> NDArray[np.uint64]:
    """What `check` of intact entries is. 0 for an empty one, so that a file of zeros is an empty index.

    A multiply-and-shift mix: a million entries in 30 ms. It finds entries that a power cut tore; what it
    lets pass is found when the record is read.
    """
    mixed = entries["low"] * np.uint64(_MIX[0])
    state = entries["state"].astype(np.uint64) | entries["group"].astype(np.uint64) << np.uint64(8)
    for word in (entries["high"], entries["sequence"], entries["written_at"].astype(np.uint64), state):
        mixed = (mixed ^ (mixed >> np.uint64(29)) ^ word) * np.uint64(_MIX[1])
    return mixed ^ (mixed >> np.uint64(32))
