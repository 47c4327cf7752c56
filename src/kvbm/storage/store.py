"""What every kind of storage does: keep the records of one rank, find them again, and never give wrong bytes.

`tests/storage/conformance.py` holds what this promises against every implementation.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Key:
    """A block's name: its 16-byte sequence hash and its KV group."""

    hash: bytes
    group: int = 0


@dataclass(frozen=True, slots=True)
class Identity:
    """What all records of a store have in common. Records of another identity are not there."""

    namespace: bytes  # 16 bytes: model, weights, dtypes, geometry, layout
    record_bytes: int
    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Found:
    """Records that survived, those first that are to be evicted first. Shapes (n,), (n, 2), (n,).

    foreign: the store was of another identity, and holds nothing now.
    """

    slots: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    groups: NDArray[np.uint8]
    foreign: bool = False

    def __len__(self) -> int:
        return len(self.slots)


class RecordStore(ABC):
    """Records in slots 0 .. num_slots-1, each with its key.

    All calls wait for their I/O and come from threads of an I/O process, several at once, never two with the
    same slot. `record` is the record's place in the host arena, aligned to 4096 bytes and a multiple of that
    long; its first `record_bytes` count. Raises StorageError, and DamagedRecordError where the bytes that are
    there are not those that were written.
    """

    num_slots: int

    @abstractmethod
    def recover(self) -> Found:
        """What an earlier run stored safely. Called once, before anything else."""

    @abstractmethod
    def write(self, slot: int, key: Key, record: Bytes, checksum: int | None = None) -> None:
        """Store a record in place of what the slot held; after an error the slot holds that or nothing.

        checksum: xxh3-64 that the bytes must have; DamagedRecordError where they have another.
        """

    @abstractmethod
    def read(self, slot: int, key: Key, record: Bytes) -> int:
        """Fill `record` with the bytes stored under `key` and return their xxh3-64, or raise.

        After an error the contents of `record` are undefined.
        """

    @abstractmethod
    def discard(self, slot: int) -> None:
        """The slot holds nothing any more, also after a restart."""

    @abstractmethod
    def clear(self) -> None:
        """The same for all slots, and for writes under way. After an error the store is to be opened anew."""

    @abstractmethod
    def commit(self) -> None:
        """What was written before this call survives a power cut after it."""

    @abstractmethod
    def close(self) -> None:
        """Commit and release everything. No call is under way."""
