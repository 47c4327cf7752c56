"""Which block goes when a pool is full.

A policy orders the slots that may be evicted: registered and pinned by nobody. The pool tells it of every
change with arrays of distinct slots and asks for victims; a policy holds no bytes, hashes or clock.
Name your own with the settings `host.policy` and `disk.policy`, as "package.module:Class".
"""

import importlib
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from kvbm.errors import ConfigError

Slots = NDArray[np.int64]


class EvictionPolicy(ABC):
    """Order of eviction among the slots 0 .. capacity-1. Calls come from one thread."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    @abstractmethod
    def insert(self, slots: Slots) -> None:
        """These may now be evicted. The tail of a sequence comes before its head: keep that order."""

    @abstractmethod
    def reuse(self, slots: Slots) -> None:
        """These, once written, were wanted again and are pinned: not evictable until inserted again."""

    def hold(self, slots: Slots) -> None:
        """These are pinned for a copy to the tier below: not evictable, but nobody wanted them again."""
        self.reuse(slots)

    @abstractmethod
    def forget(self, slots: Slots) -> None:
        """The contents of these are gone; what the slot holds next is another block."""

    @abstractmethod
    def evict(self, count: int) -> Slots:
        """Take up to `count` victims out of the order, first victim first."""


class SlotQueue:
    """FIFO of distinct slots with removal from the middle, all operations vectorised.

    A slot's position says which of its log entries counts; removal only forgets the position. Stale
    entries are skipped when popped, and squeezed out when the log is full, which is amortised O(1) because
    the log is twice as long as there are slots.
    """

    def __init__(self, capacity: int) -> None:
        self._log = np.zeros(2 * capacity, np.int32)
        self._positions = np.full(capacity, -1, np.int32)
        self._head = 0
        self._tail = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, slots: Slots) -> None:
        """Append slots that are not in the queue."""
        if self._tail + len(slots) > len(self._log):
            self._squeeze()
        end = self._tail + len(slots)
        self._log[self._tail : end] = slots
        self._positions[slots] = np.arange(self._tail, end, dtype=np.int32)
        self._tail = end
        self._count += len(slots)

    def remove(self, slots: Slots) -> None:
        """Remove those of `slots` that are in the queue."""
        self._count -= int(np.count_nonzero(self._positions[slots] >= 0))
        self._positions[slots] = -1

    def pop(self, count: int) -> Slots:
        """Remove and return up to `count` slots from the front."""
        taken: list[Slots] = []
        wanted = min(count, self._count)
        window = wanted + 64
        while wanted > 0:
            end = min(self._head + window, self._tail)
            window *= 2  # crosses a long stretch of stale entries in few steps
            entries = self._log[self._head : end]
            live = np.flatnonzero(self._positions[entries] == np.arange(self._head, end, dtype=np.int32))[
                :wanted
            ]
            slots = entries[live].astype(np.int64)
            self._head = self._head + int(live[-1]) + 1 if len(live) == wanted else end
            self._positions[slots] = -1
            taken.append(slots)
            wanted -= len(slots)
            self._count -= len(slots)
        return np.concatenate(taken) if taken else np.empty(0, np.int64)

    def _squeeze(self) -> None:
        entries = self._log[self._head : self._tail]
        live = entries[self._positions[entries] == np.arange(self._head, self._tail, dtype=np.int32)]
        self._log[: len(live)] = live
        self._positions[live] = np.arange(len(live), dtype=np.int32)
        self._head, self._tail = 0, len(live)


class Lru(EvictionPolicy):
    """Least recently released first. A sequence gives up its tail before its head."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._queue = SlotQueue(capacity)

    def insert(self, slots: Slots) -> None:
        self._queue.push(slots)

    def reuse(self, slots: Slots) -> None:
        self._queue.remove(slots)

    def forget(self, slots: Slots) -> None:
        self._queue.remove(slots)

    def evict(self, count: int) -> Slots:
        return self._queue.pop(count)


class SegmentedLru(EvictionPolicy):
    """Resists scans: a block that was never used again cannot push out one that was.

    Segmented LRU (Karedla, Love, Wherry: "Caching strategies to improve disk system performance", IEEE
    Computer 27(3), 1994): new blocks are on probation, reused ones are protected; the protected part is
    at most 80 % of the pool and its oldest go back on probation.
    """

    PROTECTED_SHARE = 0.8

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._probation = SlotQueue(capacity)
        self._protected = SlotQueue(capacity)
        self._reused = np.zeros(capacity, bool)

    def insert(self, slots: Slots) -> None:
        reused = self._reused[slots]
        self._probation.push(slots[~reused])
        self._protected.push(slots[reused])
        excess = len(self._protected) - int(self.PROTECTED_SHARE * self.capacity)
        if excess > 0:
            demoted = self._protected.pop(excess)
            self._reused[demoted] = False
            self._probation.push(demoted)

    def reuse(self, slots: Slots) -> None:
        self._remove(slots)
        self._reused[slots] = True

    def hold(self, slots: Slots) -> None:
        self._remove(slots)

    def forget(self, slots: Slots) -> None:
        self._remove(slots)
        self._reused[slots] = False

    def evict(self, count: int) -> Slots:
        victims = self._probation.pop(count)
        if len(victims) < count:
            victims = np.concatenate([victims, self._protected.pop(count - len(victims))])
            self._reused[victims] = False
        return victims

    def _remove(self, slots: Slots) -> None:
        self._probation.remove(slots)
        self._protected.remove(slots)


POLICIES: dict[str, type[EvictionPolicy]] = {"lru": Lru, "segmented-lru": SegmentedLru}


def load_policy(name: str, key: str = "host.policy") -> type[EvictionPolicy]:
    """The policy class called `name`: one of POLICIES, or `module:Class`. key: the setting, for errors."""
    if name in POLICIES:
        return POLICIES[name]
    module_name, _, class_name = name.partition(":")
    known = ", ".join(POLICIES)
    try:
        policy = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # the module may fail in any way while it is imported
        raise ConfigError(
            f"{key} = {name!r} can't be loaded: {error}. Use one of {known}, or 'module:Class' with a "
            f"module that can be imported."
        ) from error
    if not (isinstance(policy, type) and issubclass(policy, EvictionPolicy)):
        raise ConfigError(f"{key} = {name!r} is not a subclass of kvbm.logic.policies.EvictionPolicy.")
    return policy
