"""Host records: blocks in an arena, each with the checksum it was written with.

xxh3 (64 bits) reads a record at 14 GB/s on one core of the machine we measured, without the GIL. It finds
damage, not forgery: the arena is this process's own memory.
"""

import numpy as np
from numpy.typing import NDArray

from kvbm.digest import digest
from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CopyEngine


class HostRecords:
    """Records of `arena`, copied by `engine`. Threads may use disjoint slots at once."""

    def __init__(self, arena: HostArena, engine: CopyEngine | None = None, *, checksum: bool = True) -> None:
        self.arena = arena
        self._engine = engine
        self._checksums = arena.checksums if checksum else None

    @property
    def ready_slots(self) -> int:
        """Slots that can be used already: the first so many."""
        ready = self._engine.ready_slots if self._engine is not None else None
        return self.arena.num_slots if ready is None else ready

    @property
    def device_engine(self) -> CopyEngine | None:
        """The engine, if it copies by itself and nothing has to be done before or after: no checksums."""
        engine = self._engine
        return engine if engine is not None and engine.copies_by_itself and self._checksums is None else None

    def without_engine(self) -> "HostRecords":
        """The same records, for one who copies none of them from or to a device."""
        return HostRecords(self.arena, checksum=self._checksums is not None)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def fence(self) -> object:
        """See `CopyEngine.fence`."""
        return self._engine.fence() if self._engine is not None else None

    def offload(
        self, device_blocks: NDArray[np.integer], slots: NDArray[np.integer], after: object = None
    ) -> None:
        """Copy blocks into slots and seal them."""
        if self._engine is not None and len(slots):
            self._engine.offload(device_blocks, slots, after)
        self.seal(slots)

    def onboard(
        self, device_blocks: NDArray[np.integer], slots: NDArray[np.integer], after: object = None
    ) -> NDArray[np.bool_]:
        """Copy intact records into blocks; returns which were intact. The others' blocks are not touched."""
        intact = self.intact(slots)
        if self._engine is not None and intact.any():
            self._engine.onboard(device_blocks[intact], slots[intact], after)
        return intact

    def seal(self, slots: NDArray[np.integer]) -> None:
        """The records are complete: remember their checksums."""
        if self._checksums is not None:
            self._checksums[slots] = self._digests(slots)

    def checksums(self, slots: NDArray[np.integer]) -> NDArray[np.uint64] | None:
        """What records were sealed with, for a tier below to compare; None without checksums."""
        return self._checksums[slots] if self._checksums is not None else None

    def adopt(self, slots: NDArray[np.integer], checksums: NDArray[np.uint64]) -> None:
        """The records came, complete, from a tier below that has verified these checksums."""
        if self._checksums is not None:
            self._checksums[slots] = checksums

    def intact(self, slots: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which records still have the checksum they were sealed with."""
        if self._checksums is None:
            return np.ones(len(slots), bool)
        return self._digests(slots) == self._checksums[slots]

    def _digests(self, slots: NDArray[np.integer]) -> NDArray[np.uint64]:
        records = self.arena.records()
        return np.fromiter((digest(records[slot]) for slot in slots), np.uint64, len(slots))
