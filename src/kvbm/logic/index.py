"""Where a sequence hash lives: an index from hash to slot, without one Python object per block.

A dict of a million 16-byte keys costs about 200 bytes an entry and stops the world for some 100 ms when it
grows. This is a set-associative table: a bucket is eight cells, a cell holds 32 tag bits of the key and the
slot. Looking up a whole prompt is a few numpy calls. Keys that find their bucket full (0.02 % at the load
chosen here) go to a small dict.

Not thread-safe.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.hashing import Hashes

Slots = NDArray[np.int64]

_WAYS = 8
_EMPTY = np.uint32(0)


class HashIndex:
    """Index of at most `capacity` slots, each with one hash as its key.

    Gathers use `take` and flat arrays: indexing rows with an array is ten times slower.
    """

    def __init__(self, capacity: int) -> None:
        buckets = 1 << max(0, (max(capacity, 1) - 1) // 3).bit_length()
        self._bucket_mask = np.uint64(buckets - 1)
        self._tags = np.zeros((buckets, _WAYS), np.uint32)
        self._slots = np.zeros(buckets * _WAYS, np.int32)
        self._overflow: dict[bytes, int] = {}
        self._spilled = np.zeros(buckets, np.uint16)  # keys of each bucket that are in the overflow
        self._low = np.zeros(capacity, np.uint64)  # the two words of each slot's key
        self._high = np.zeros(capacity, np.uint64)

    def find(self, hashes: Hashes) -> Slots:
        """Slot of each hash, -1 where there is none. Shape (n, 2) to (n,)."""
        low, high = hashes[:, 0], hashes[:, 1]
        buckets = self._buckets(low)
        rows = self._tags.take(buckets, axis=0)
        columns, matched = _first_true(rows == _tags_of(high)[:, None])
        slots = self._slots.take(buckets * _WAYS + columns).astype(np.int64)
        # A tag may agree by chance: only the whole key decides.
        found = matched & (self._low.take(slots) == low) & (self._high.take(slots) == high)
        slots[~found] = -1
        if self._overflow:
            for i in np.flatnonzero(~found & (self._spilled.take(buckets) > 0)):
                slots[i] = self._overflow.get(_overflow_key(low[i], high[i]), -1)
        return slots

    def insert(self, hashes: Hashes, slots: Slots) -> None:
        """Enter keys that the index does not hold, distinct, at distinct slots that have no key."""
        low, high = hashes[:, 0], hashes[:, 1]
        self._low[slots] = low
        self._high[slots] = high
        buckets = self._buckets(low)
        tags = _tags_of(high)
        flat_tags = self._tags.reshape(-1)
        while len(slots):
            rows = self._tags.take(buckets, axis=0)
            columns, has_room = _first_true(rows == _EMPTY)
            # `find` looks at one cell of a tag: a second key with that tag goes to the overflow.
            has_room &= ~_first_true(rows == tags[:, None])[1]
            if not has_room.all():
                for i in np.flatnonzero(~has_room):
                    self._spilled[buckets[i]] += 1
                    self._overflow[_overflow_key(self._low[slots[i]], self._high[slots[i]])] = int(slots[i])
                slots, buckets = slots[has_room], buckets[has_room]
                tags, columns = tags[has_room], columns[has_room]
            cells = buckets * _WAYS + columns
            self._slots[cells] = slots
            # Keys of one batch may have chosen the same cell: the last writer has it, the others go on.
            won = self._slots.take(cells) == slots
            flat_tags[cells[won]] = tags[won]
            slots, buckets, tags = slots[~won], buckets[~won], tags[~won]

    def remove(self, slots: Slots) -> None:
        """Remove the keys of distinct slots that have one."""
        low, high = self._low.take(slots), self._high.take(slots)
        buckets = self._buckets(low)
        # An empty cell may still name a slot: the tag decides whether the cell counts.
        names_slot = self._slots.reshape(-1, _WAYS).take(buckets, axis=0) == slots[:, None]
        columns, present = _first_true(
            names_slot & (self._tags.take(buckets, axis=0) == _tags_of(high)[:, None])
        )
        self._tags.reshape(-1)[(buckets * _WAYS + columns)[present]] = _EMPTY
        for i in np.flatnonzero(~present):
            self._spilled[buckets[i]] -= 1
            del self._overflow[_overflow_key(low[i], high[i])]

    def hashes(self, slots: Slots) -> Hashes:
        """Hashes of slots that have a key."""
        keys = np.empty((len(slots), 2), np.uint64)
        keys[:, 0], keys[:, 1] = self._low.take(slots), self._high.take(slots)
        return keys

    def _buckets(self, low: NDArray[np.uint64]) -> NDArray[np.int64]:
        return (low & self._bucket_mask).astype(np.int64)


def _overflow_key(low: Any, high: Any) -> bytes:
    return low.tobytes() + high.tobytes()


def _tags_of(high: NDArray[np.uint64]) -> NDArray[np.uint32]:
    # Never 0, which is the tag of an empty cell.
    return (high >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def _first_true(cells: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Column of the first True of each row of eight, and whether there is one. 4 times faster than argmax."""
    bits = cells.view(np.uint64).reshape(-1)
    lowest = bits & (~bits + np.uint64(1))
    columns = np.bitwise_count(lowest - np.uint64(1)) >> 3
    return (columns & 7).astype(np.int64), bits != 0
