"""Where a sequence hash lives: an index from (hash, KV group) to slot, without one Python object per block.

A dict of a million 16-byte keys costs about 200 bytes an entry and stops the world for some 100 ms when it
grows. This is a set-associative table: a bucket is eight cells, a cell holds 32 tag bits of the key and the
slot. Looking up a whole prompt is a few numpy calls. Keys that find their bucket full (0.02 % at the load
chosen here) go to a small dict.

Not thread-safe.
"""

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.hashing import Hashes

Slots = NDArray[np.int64]

_WAYS = 8
_EMPTY = np.uint32(0)
# Odd 64-bit constants (from the golden ratio) that tell the groups of one hash apart.
_GROUP_MIX = np.array([0x9E3779B97F4A7C15, 0xF39CC0605CEDC835], np.uint64)


class HashIndex:
    """Index of at most `capacity` slots, each with one (hash, group) key."""

    def __init__(self, capacity: int) -> None:
        buckets = 1 << max(0, (max(capacity, 1) - 1) // 3).bit_length()
        self._bucket_mask = np.uint64(buckets - 1)
        self._tags = np.zeros((buckets, _WAYS), np.uint32)
        self._slots = np.zeros((buckets, _WAYS), np.int32)
        self._overflow: dict[bytes, int] = {}
        self._keys: Hashes = np.zeros((capacity, 2), np.uint64)

    def find(self, hashes: Hashes, group: int = 0) -> Slots:
        """Slot of each hash, -1 where there is none. Shape (n, 2) to (n,)."""
        keys = _group_keys(hashes, group)
        buckets = self._buckets(keys)
        rows = self._tags[buckets]
        columns, matched = _first_true(rows == _tags_of(keys)[:, None])
        slots = self._slots[buckets, columns].astype(np.int64)
        # A tag may agree by chance: only the whole key decides.
        stored = self._keys[slots]
        found = matched & (stored[:, 0] == keys[:, 0]) & (stored[:, 1] == keys[:, 1])
        slots[~found] = -1
        if self._overflow:
            for i in np.flatnonzero(~found & (rows[:, -1] != _EMPTY)):
                slots[i] = self._overflow.get(keys[i].tobytes(), -1)
        return slots

    def insert(self, hashes: Hashes, slots: Slots, group: int = 0) -> None:
        """Enter keys that the index does not hold, distinct, at distinct slots that have no key."""
        keys = _group_keys(hashes, group)
        self._keys[slots] = keys
        buckets = self._buckets(keys)
        tags = _tags_of(keys)
        pending = np.arange(len(slots))
        while len(pending):
            columns, has_room = _first_true(self._tags[buckets[pending]] == _EMPTY)
            for i in pending[~has_room]:
                self._overflow[keys[i].tobytes()] = int(slots[i])
            pending, columns = pending[has_room], columns[has_room]
            target = buckets[pending], columns
            self._slots[target] = slots[pending]
            # Keys of one batch may have chosen the same cell: the last writer has it, the others go on.
            won = self._slots[target] == slots[pending]
            self._tags[buckets[pending[won]], columns[won]] = tags[pending[won]]
            pending = pending[~won]

    def remove(self, slots: Slots) -> None:
        """Remove the keys of distinct slots that have one."""
        keys = self._keys[slots]
        buckets = self._buckets(keys)
        # An empty cell may still name a slot: the tag decides whether the cell counts.
        cells = (self._slots[buckets] == slots[:, None]) & (self._tags[buckets] == _tags_of(keys)[:, None])
        columns, present = _first_true(cells)
        self._tags[buckets[present], columns[present]] = _EMPTY
        for i in np.flatnonzero(~present):
            del self._overflow[keys[i].tobytes()]

    def hashes(self, slots: Slots, group: int = 0) -> Hashes:
        """Hashes of slots that have a key in `group`."""
        return _group_keys(self._keys[slots], group)

    def _buckets(self, keys: Hashes) -> NDArray[np.int64]:
        return (keys[:, 0] & self._bucket_mask).astype(np.int64)


def _group_keys(hashes: Hashes, group: int) -> Hashes:
    # Its own inverse. Group 0, all there is in most models, costs nothing.
    return hashes ^ (_GROUP_MIX * np.uint64(group)) if group else hashes


def _tags_of(keys: Hashes) -> NDArray[np.uint32]:
    # Never 0, which is the tag of an empty cell.
    return (keys[:, 1] >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def _first_true(cells: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Column of the first True of each row of eight, and whether there is one. 4 times faster than argmax."""
    bits = cells.view(np.uint64).reshape(-1)
    lowest = bits & (~bits + np.uint64(1))
    columns = np.bitwise_count(lowest - np.uint64(1)) >> 3
    return (columns & 7).astype(np.int64), bits != 0
