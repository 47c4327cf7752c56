"""Blocks of one tier: fixed slots, their life cycle, who uses them, and which is evicted.

    Reset ──allocate──▶ Partial ──complete──▶ Complete ──register──▶ Registered
      ▲                    │                      │                      │
      └────── release ─────┴────── withdraw ──────┴── withdraw, evict ───┘

Partial: being filled, has no name yet. Complete: its sequence hash is known and taken, its bytes may still
be on their way. Registered: every rank has written every byte; only now can it be matched.

A pin keeps a slot's memory from being used for another block, whatever becomes of its contents: a block
that is withdrawn while pinned (a failed copy that may still be writing) stays out of use until the last
pin is gone.

State is held in arrays; every call takes and returns arrays of slots. Not thread-safe.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.hashing import Hashes
from kvbm.logic.history import Fate
from kvbm.logic.index import HashIndex, Slots
from kvbm.logic.policies import EvictionPolicy


class BlockState(IntEnum):
    RESET = 0
    PARTIAL = 1
    COMPLETE = 2
    REGISTERED = 3


# Reading a member of an IntEnum costs a microsecond in Python 3.11: not in the calls of every step.
_RESET, _PARTIAL, _COMPLETE, _REGISTERED = (np.uint8(state) for state in BlockState)


class EventKind(IntEnum):
    STORED = 0
    REMOVED = 1


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """Blocks that became matchable in a tier, or ceased to be. hashes: shape (n, 2), uint64.

    fate: why they were removed. wanted: how many blocks the tier had to make room for.
    """

    kind: EventKind
    tier: str
    hashes: Hashes
    fate: Fate | None = None
    wanted: int = 0


Subscriber = Callable[[BlockEvent], None]
Tags = NDArray[np.uint32]

UNKNOWN_TAG = np.uint32(0xFFFFFFFF)  # of blocks from an earlier run


class BlockPool:
    """`capacity` slots of one tier, the first `usable` of which have memory. `tier` is the name in events."""

    def __init__(
        self, capacity: int, policy: type[EvictionPolicy], tier: str = "host", usable: int | None = None
    ) -> None:
        self.capacity = capacity
        self.usable = 0
        self.tier = tier
        self.version = 0  # rises whenever the result of `match` may change
        self.evictions = 0
        self.num_registered = 0
        self._policy = policy(capacity)
        self._index = HashIndex(capacity)
        self._states = np.zeros(capacity, np.uint8)
        self._pins = np.zeros(capacity, np.int32)
        self._tags = np.zeros(capacity, np.uint32)
        self._free = np.zeros(capacity, np.int32)  # stack of free slots
        self._num_free = 0
        self._subscribers: dict[EventKind, list[Subscriber]] = {kind: [] for kind in EventKind}
        self.grow(capacity if usable is None else usable)

    def grow(self, usable: int) -> None:
        """Slots up to number `usable` have memory now; never fewer than before."""
        before, self.usable = self.usable, max(self.usable, min(usable, self.capacity))
        # Lowest on top, so that a young pool uses its memory from the start.
        new = np.arange(self.usable - 1, before - 1, -1)
        self._put_back(new[(self._states[new] == _RESET) & (self._pins[new] == 0)])

    def shrink(self, usable: int) -> None:
        """Use only slots below `usable` from now on. Those above are given up, once they are released."""
        self.usable = min(self.usable, usable)
        self.withdraw(self.beyond(usable), Fate.EVICTED)
        free = self._free[: self._num_free]
        kept = free[free < usable]
        self._free[: len(kept)] = kept
        self._num_free = len(kept)

    def beyond(self, usable: int) -> Slots:
        """Complete and registered blocks from slot `usable` on."""
        return np.flatnonzero(self._states[usable:] >= _COMPLETE) + usable

    def adopt(self, slots: Slots, hashes: Hashes) -> None:
        """Registered blocks from an earlier run, distinct, those to be evicted first come first.

        In slots that have no memory yet, as far as this pool knows: call `grow` afterwards.
        """
        self._index.insert(hashes, slots)
        self._states[slots] = _REGISTERED
        self._tags[slots] = UNKNOWN_TAG
        self.num_registered += len(slots)
        self._policy.insert(slots)
        self._changed(EventKind.STORED, slots)

    # ---- looking up ----

    def match(self, hashes: Hashes) -> Slots:
        """Slots of the longest prefix of `hashes` that is registered. Pins nothing."""
        slots = self._index.find(hashes)
        missing = np.flatnonzero((slots < 0) | (self._states[slots] != _REGISTERED))
        return slots[: missing[0]] if len(missing) else slots

    def find(self, hashes: Hashes) -> Slots:
        """Slot that owns each hash, complete or registered; -1 where there is none."""
        return self._index.find(hashes)

    def registered(self, hashes: Hashes) -> Slots:
        """Slot of each hash that can be matched; -1 where there is none."""
        slots = self._index.find(hashes)
        slots[self._states[slots] != _REGISTERED] = -1
        return slots

    def hashes(self, slots: Slots) -> Hashes:
        """Sequence hashes of complete or registered slots."""
        return self._index.hashes(slots)

    def states(self, slots: Slots) -> NDArray[np.uint8]:
        return self._states[slots]

    def pins(self, slots: Slots) -> NDArray[np.int32]:
        return self._pins[slots]

    def tag(self, slots: Slots, tags: Tags | np.uint32) -> None:
        """Note whose blocks these are: a number for the caller's use."""
        self._tags[slots] = tags

    def tags(self, slots: Slots) -> Tags:
        return self._tags[slots]

    def tagged(self, *tags: np.uint32) -> Slots:
        """Complete and registered blocks with one of these tags."""
        return np.flatnonzero((self._states >= _COMPLETE) & np.isin(self._tags, tags))

    @property
    def num_free(self) -> int:
        """Slots that hold nothing. Evictable blocks are not counted."""
        return self._num_free

    # ---- life cycle ----

    def allocate(self, count: int) -> Slots:
        """Up to `count` slots, Partial and pinned once; evicts what nobody uses. Fewer when all is in use."""
        if count > self._num_free:
            self._evict(count - self._num_free)
        taken = min(count, self._num_free)
        slots = self._free[self._num_free - taken : self._num_free][::-1].astype(np.int64)
        self._num_free -= taken
        self._states[slots] = _PARTIAL
        self._pins[slots] = 1
        return slots

    def complete(self, slots: Slots, hashes: Hashes) -> Slots:
        """Name Partial slots. Returns the owner of each hash: the slot itself, or the block that has it.

        A duplicate's own slot is released and its owner pinned instead, so the caller holds the returned
        slots just as it held `slots`.
        """
        owners = self._index.find(hashes)
        # The first of equal hashes in one call owns, the others are its duplicates.
        owners = np.where(owners >= 0, owners, slots[_first_occurrence(hashes)])
        fresh = owners == slots
        self._index.insert(hashes[fresh], slots[fresh])
        self._states[slots[fresh]] = _COMPLETE
        self.pin(owners[~fresh])
        self.release(slots[~fresh])
        return owners

    def claim(self, hashes: Hashes, max_new: int) -> tuple[Slots, NDArray[np.bool_]]:
        """A pinned owner for each hash: the block that has it, or a new Complete one.

        Returns (slots, is_new), shape (n,) each. At most `max_new` are new; a hash that gets no slot, for
        want of room or because of `max_new`, has slot -1. Equal hashes share a slot.
        """
        slots = self._index.find(hashes)
        is_new = np.zeros(len(slots), bool)
        # Found blocks are pinned before anything is allocated: eviction must not take them.
        self.pin(slots[slots >= 0])
        missing = np.flatnonzero(slots < 0)
        if len(missing):
            origin = _first_occurrence(hashes[missing])
            # In the order of the request, so that what finds no room is the tail.
            wanted = np.flatnonzero(origin == np.arange(len(missing)))[:max_new]
            new = self.allocate(len(wanted))
            targets = missing[wanted[: len(new)]]
            self._index.insert(hashes[targets], new)
            self._states[new] = _COMPLETE
            slots[targets] = new
            is_new[targets] = True
            repeated = origin != np.arange(len(missing))
            if repeated.any():
                slots[missing[repeated]] = slots[missing[origin[repeated]]]
                shared = slots[missing[repeated]]
                self.pin(shared[shared >= 0])
        return slots, is_new

    def register(self, slots: Slots) -> None:
        """Complete to Registered: all bytes are written on all ranks, from now on it can be matched."""
        self._states[slots] = _REGISTERED
        self.num_registered += len(slots)
        self._changed(EventKind.STORED, slots)

    def withdraw(self, slots: Slots, fate: Fate = Fate.LOST) -> None:
        """Drop the contents of Complete or Registered blocks at once, pinned or not: nobody may use them."""
        registered = slots[self._states[slots] == _REGISTERED]
        self._index.remove(slots)
        self._states[slots] = _RESET
        self._policy.forget(slots)
        if len(registered):
            self.num_registered -= len(registered)
            self._changed(EventKind.REMOVED, registered, fate)
        self._put_back(slots[self._pins[slots] == 0])

    def clear(self) -> Slots:
        """Withdraw every block that is complete or registered; returns their slots."""
        slots = np.flatnonzero(self._states >= _COMPLETE)
        self.withdraw(slots, Fate.CLEARED)
        return slots

    # ---- use ----

    def pin(self, slots: Slots, *, reuse: bool = True) -> None:
        """Use blocks again (repeats count): they stay until released as often.

        reuse: False where only their bytes are wanted, for the tier below.
        """
        if _distinct(slots):  # an unbuffered add costs twenty times as much
            self._pins[slots] += 1
        else:
            np.add.at(self._pins, slots, 1)
            slots = np.unique(slots)
        # A block that is still being written is not used again.
        tell = self._policy.reuse if reuse else self._policy.hold
        tell(slots[self._states[slots] == _REGISTERED])

    def release(self, slots: Slots) -> None:
        """Undo a pin of each (repeats count). Slots in the order of their sequence, head first."""
        if _distinct(slots):
            self._pins[slots] -= 1
        else:
            np.subtract.at(self._pins, slots, 1)
            slots = slots[np.sort(np.unique(slots, return_index=True)[1])]
        idle = slots[self._pins[slots] == 0]
        states = self._states[idle]
        # Tail first: it is evicted before the head, without which it would be worth nothing.
        self._policy.insert(idle[states == _REGISTERED][::-1])
        abandoned = idle[states == _COMPLETE]
        if len(abandoned):
            self._index.remove(abandoned)
        self._put_back(idle[states != _REGISTERED])
        if self.usable < self.capacity:
            given_up = idle[(idle >= self.usable) & (states == _REGISTERED)]
            if len(given_up):
                self.withdraw(given_up, Fate.EVICTED)

    def subscribe(
        self, subscriber: Subscriber, kinds: Sequence[EventKind] = tuple(EventKind)
    ) -> Callable[[], None]:
        """Call `subscriber` with each BlockEvent from now on; returns what ends the subscription."""
        lists = [self._subscribers[kind] for kind in kinds]
        for subscribers in lists:
            subscribers.append(subscriber)

        def unsubscribe() -> None:
            for subscribers in lists:
                if subscriber in subscribers:
                    subscribers.remove(subscriber)

        return unsubscribe

    # ---- inside ----

    def _evict(self, count: int) -> None:
        victims = self._policy.evict(count)
        # A policy named by the user may be wrong: nothing in use is ever given away.
        victims = victims if _distinct(victims) else np.unique(victims)
        victims = victims[(self._pins[victims] == 0) & (self._states[victims] == _REGISTERED)]
        if not len(victims):
            return
        self._index.remove(victims)
        self.evictions += len(victims)
        self.num_registered -= len(victims)
        self._changed(EventKind.REMOVED, victims, Fate.EVICTED, count)
        self._put_back(victims)

    def _put_back(self, slots: Slots) -> None:
        self._states[slots] = _RESET
        if self.usable < self.capacity:
            slots = slots[slots < self.usable]  # the others' turn comes in `grow`
        self._free[self._num_free : self._num_free + len(slots)] = slots
        self._num_free += len(slots)

    def _changed(self, kind: EventKind, slots: Slots, fate: Fate | None = None, wanted: int = 0) -> None:
        self.version += 1
        subscribers = tuple(self._subscribers[kind])
        if not subscribers or not len(slots):
            return
        event = BlockEvent(kind, self.tier, self._index.hashes(slots), fate, wanted)
        for subscriber in subscribers:
            subscriber(event)


def subscribe_to_all(
    pools: Iterable[BlockPool], subscriber: Subscriber, kinds: Sequence[EventKind] = tuple(EventKind)
) -> Callable[[], None]:
    """`BlockPool.subscribe` for several tiers at once; returns what ends it for all."""
    ends = [pool.subscribe(subscriber, kinds) for pool in pools]

    def unsubscribe() -> None:
        for end in ends:
            end()

    return unsubscribe


def _distinct(slots: Slots) -> bool:
    ordered = np.sort(slots)
    return bool((ordered[1:] != ordered[:-1]).all())


def _first_occurrence(hashes: Hashes) -> NDArray[np.int64]:
    """For each hash the position of the first one equal to it."""
    words = np.sort(hashes[:, 0])
    if (words[1:] != words[:-1]).all():  # nearly always, and ten times faster than comparing whole keys
        return np.arange(len(hashes))
    keys = np.ascontiguousarray(hashes).view("S16").reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]
