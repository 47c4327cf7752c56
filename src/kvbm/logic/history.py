"""What became of blocks that a tier has no longer, or never took in: the last ones, in a ring."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kvbm.logic.hashing import Hashes


class Fate(IntEnum):
    """Why a block is not in a tier."""

    EVICTED = 0  # its slot was wanted for another block
    DAMAGED = 1  # its bytes were not those that had been stored
    LOST = 2  # a copy, a read or a write failed or was given up
    CLEARED = 3
    NO_ROOM = 4  # not taken in: all slots in use, the queue full, the budget spent
    NOT_ADMITTED = 5  # not taken in: the filter had not seen it often enough


@dataclass(frozen=True, slots=True)
class Entry:
    """at: seconds, on the clock of `add`. wanted: blocks that the tier had to make room for together."""

    tier: str
    fate: Fate
    at: float
    wanted: int


class BlockHistory:
    """The last `capacity` fates, 22 bytes each. Blocks are told apart by the first word of their hash."""

    def __init__(self, capacity: int, tiers: tuple[str, ...] = ("host", "disk")) -> None:
        self._tiers = tiers
        self._words = np.zeros(capacity, np.uint64)
        self._at = np.zeros(capacity, np.float64)
        self._wanted = np.zeros(capacity, np.int32)
        self._tier = np.zeros(capacity, np.uint8)
        self._fate = np.zeros(capacity, np.uint8)
        self._next = 0  # position, counted on for ever

    def add(self, hashes: Hashes, tier: str, fate: Fate, at: float, wanted: int = 0) -> None:
        """hashes: shape (n, 2)."""
        capacity = len(self._words)
        words = hashes[-capacity:, 0]
        start = self._next % capacity
        self._next += len(words)
        first = min(len(words), capacity - start)
        for begin, part in ((start, words[:first]), (0, words[first:])):
            place = slice(begin, begin + len(part))
            self._at[place] = at
            self._wanted[place] = wanted
            self._tier[place] = self._tiers.index(tier)
            self._fate[place] = fate
            self._words[place] = part  # last: another thread may be in `find`

    def find(self, word: int) -> list[Entry]:
        """All that is remembered of a block, the newest first."""
        used = min(self._next, len(self._words))
        places = np.flatnonzero(self._words[:used] == np.uint64(word))
        # As old as their distance from where the next entry goes.
        age = (self._next - 1 - places) % len(self._words)
        return [
            Entry(
                self._tiers[self._tier[i]], Fate(int(self._fate[i])), float(self._at[i]), int(self._wanted[i])
            )
            for i in places[np.argsort(age, kind="stable")]
        ]
