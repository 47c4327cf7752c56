"""What a worker and its I/O process say to each other: msgpack over a socket pair, one message a packet.

Arrays travel as the bytes of int32 slots, 16-byte hashes, uint8 groups and uint64 checksums.
"""

from enum import IntEnum

import msgspec

from kvbm.storage.split import Split

MAX_MESSAGE = 1 << 20  # bytes


class Status(IntEnum):
    """Worst of what befell the records of a batch; the order is that of kvbm.logic.operations.Failure."""

    DONE = 0
    TIMEOUT = 1
    UNAVAILABLE = 2  # nothing is known of the records: the I/O process is not there
    ERROR = 3
    DAMAGED = 4


class Batch(msgspec.Struct, frozen=True, tag=True):
    """Copy records, one at least: i between slot host_slots[i] of the arena and slot disk_slots[i]."""

    id: int
    write: bool
    host_slots: bytes
    disk_slots: bytes
    hashes: bytes
    groups: bytes
    checksums: bytes  # that the records must have when written; empty where unknown
    timeout_s: float


class Discard(msgspec.Struct, frozen=True, tag=True):
    disk_slots: bytes


class Clear(msgspec.Struct, frozen=True, tag=True):
    pass


Request = Batch | Discard | Clear


class Done(msgspec.Struct, frozen=True, tag=True):
    """The batch is over. failed: int32 positions. checksums: of what was read, uint64, 0 where it failed.

    seconds: that its reads took, counted from the end of the batch before if that was still being read.
    """

    id: int
    failed: bytes
    status: int
    checksums: bytes
    seconds: float


class FoundRecords(msgspec.Struct, frozen=True, tag=True):
    """Some of what an earlier run stored; `last` when that was all."""

    slots: bytes
    hashes: bytes
    groups: bytes
    last: bool
    foreign: bool = False


class Cleared(msgspec.Struct, frozen=True, tag=True):
    """A `Clear` is carried out, for good."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The store can't be used."""

    reason: str


class LogLine(msgspec.Struct, frozen=True, tag=True):
    level: int
    text: str


Reply = Done | FoundRecords | Cleared | Refused | LogLine


class Options(msgspec.Struct, frozen=True):
    """How the I/O process is started: its first message."""

    folders: list[str]
    namespace: bytes
    rank: int
    ranks: int
    record_bytes: int
    slot_bytes: int
    host_slots: int
    disk_slots: int
    backend: str
    threads: int
    zerofill_fallback: bool
    o_direct: bool
    open_direct: bool
    min_free_bytes: int
    split: Split | None = None  # with it records of other numbers of ranks are taken over
