"""What is worth writing to disk, and how much of it: flash wears, and most blocks are never wanted again."""

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.hashing import Hashes
from kvbm.logic.index import HashIndex
from kvbm.logic.policies import SlotQueue

_MOST = np.uint32(1 << 20)  # a frequency grows no further: it has to decay again one day


class FrequencyFilter:
    """Admits a block whose frequency is at least 2, the rule of NVIDIA's KVBM.

    It starts at 1 when the block is first seen, doubles each time it is seen again and loses 1 per decay
    step, so a scan, which sees each block once, writes nothing. Remembers the `capacity` blocks seen last.
    """

    THRESHOLD = 2

    def __init__(self, capacity: int, decay_s: float = 600.0) -> None:
        self._capacity = capacity
        self._decay_s = decay_s
        self._decayed_at: float | None = None
        self._index = HashIndex(capacity)
        self._counts = np.zeros(capacity, np.uint32)
        self._recency = SlotQueue(capacity)
        self._free = np.arange(capacity - 1, -1, -1)
        self._num_free = capacity

    def admit(self, hashes: Hashes) -> NDArray[np.bool_]:
        """See distinct blocks once more; which of them may be written."""
        admitted = np.zeros(len(hashes), bool)
        hashes = hashes[: self._capacity]
        entries = self._index.find(hashes)
        known = entries[entries >= 0]
        self._counts[known] = np.minimum(self._counts[known] * np.uint32(2), _MOST)
        self._recency.remove(known)
        self._recency.push(known)
        missing = np.flatnonzero(entries < 0)
        if len(missing) > self._num_free:
            # Never one of those that were just seen: they are the last in the queue.
            self._forget(self._recency.pop(len(missing) - self._num_free))
        new = self._free[self._num_free - len(missing) : self._num_free].copy()
        self._num_free -= len(missing)
        self._index.insert(hashes[missing], new)
        self._counts[new] = 1
        self._recency.push(new)
        entries[missing] = new
        admitted[: len(hashes)] = self._counts[entries] >= self.THRESHOLD
        return admitted

    def decay(self, now: float) -> None:
        """Let time pass. Cheap when no step is due."""
        if self._decayed_at is None:
            self._decayed_at = now
        steps = int((now - self._decayed_at) // self._decay_s)
        if steps > 0:
            self._decayed_at += steps * self._decay_s
            in_use = np.flatnonzero(self._counts)
            self._counts[in_use] -= np.minimum(self._counts[in_use], np.uint32(min(steps, int(_MOST))))
            gone = in_use[self._counts[in_use] == 0]
            self._recency.remove(gone)
            self._forget(gone)

    def _forget(self, entries: NDArray[np.int64]) -> None:
        self._index.remove(entries)
        self._counts[entries] = 0
        self._free[self._num_free : self._num_free + len(entries)] = entries
        self._num_free += len(entries)


class WriteBudget:
    """At most `blocks` writes in any 24 hours."""

    _HOUR_S = 3600.0

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._by_hour = np.zeros(25, np.int64)  # 24 hours always lie within 25 hours of the clock
        self._hour: int | None = None

    def take(self, wanted: int, now: float) -> int:
        """How many of `wanted` writes may be made now; they count as made."""
        hour = int(now // self._HOUR_S)
        if self._hour is None:
            self._hour = hour
        for passed in range(self._hour + 1, min(hour, self._hour + 25) + 1):
            self._by_hour[passed % 25] = 0
        self._hour = max(hour, self._hour)
        granted = max(0, min(wanted, self._blocks - int(self._by_hour.sum())))
        self._by_hour[self._hour % 25] += granted
        return granted
