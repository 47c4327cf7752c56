"""What the ranks found on disk at start, and which of it can be used."""

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.hashing import Hashes
from kvbm.logic.index import Slots
from kvbm.logic.operations import BlockIds

_NO_SLOTS = np.empty(0, np.int64)
_WARM_UP_BLOCKS = 64  # read into the host tier at start, which measures the tier as well


class Restore:
    """Records that the ranks found at start, until it is known which of them all ranks have."""

    def __init__(self, capacity: int, ranks: int) -> None:
        self._ranks = ranks
        self._reported: set[int] = set()
        self._hashes = np.zeros((capacity, 2), np.uint64)
        self._votes = np.zeros(capacity, np.int32)
        self._order: list[NDArray[np.int64]] = []  # of rank 0
        self._agreed: Slots | None = None
        self._taken = 0

    def add(self, rank: int, slots: BlockIds, hashes: Hashes, last: bool) -> None:
        inside = (slots >= 0) & (slots < len(self._votes))
        own, hashes = slots[inside].astype(np.int64), hashes[inside]
        first = self._votes[own] == 0
        self._hashes[own[first]] = hashes[first]
        same = (self._hashes[own] == hashes).all(axis=1)
        self._votes[own[same]] += 1
        self._votes[own[~same]] = -(1 << 30)
        if rank == 0:
            self._order.append(own)
        if last:
            self._reported.add(rank)

    @property
    def complete(self) -> bool:
        return len(self._reported) == self._ranks

    def forget(self) -> None:
        """What was found, or will be, is not wanted."""
        self._agreed, self._taken = _NO_SLOTS, 0

    @property
    def newest(self) -> Slots:
        """The most recent of what all ranks have, at most _WARM_UP_BLOCKS, oldest first."""
        return self._agreed[-_WARM_UP_BLOCKS:] if self._agreed is not None else _NO_SLOTS

    def take(self, count: int) -> tuple[Slots, Hashes]:
        """The next of what all ranks have, oldest first."""
        if self._agreed is None:
            order = np.concatenate(self._order) if self._order else _NO_SLOTS
            self._agreed = order[self._votes[order] == self._ranks]
        slots = self._agreed[self._taken : self._taken + count]
        self._taken += len(slots)
        return slots, self._hashes[slots]
