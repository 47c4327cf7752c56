"""KV groups: sets of layers that need different parts of a prefix to go on from its end.

Full attention needs all blocks of the prefix, a sliding window the last few, a recurrent state (Mamba, linear
attention, short convolution) the one block at whose end it was taken. A prefix can be restored only if every
group can. A block of a group has a key of its own, so pools and tiers below know of no groups.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.hashing import Hashes

Mask = NDArray[np.bool_]

# Odd 64-bit constants (from the golden ratio): a hash mixed with them is the key in another group.
_MIX = np.array([0x9E3779B97F4A7C15, 0xF39CC0605CEDC835], np.uint64)
NOT_TO_BE_HAD = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class KvGroup:
    """window: how many of the last blocks of a prefix the group needs; None: all.

    reach: how many tokens before the next one it looks at; the engine may give up the blocks before these.
    offered: which device block holds one of its states, the engine says when there is one to keep.
    """

    window: int | None = None
    reach: int = 0
    offered: bool = False


FULL = KvGroup()


@dataclass(frozen=True)
class KvGroups:
    """The groups of a model, in the engine's order."""

    groups: tuple[KvGroup, ...] = (FULL,)

    @cached_property
    def single(self) -> bool:
        """Whether there is one group, and it needs everything: most models."""
        return self.groups == (FULL,)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[KvGroup]:
        return iter(self.groups)

    def __getitem__(self, group: int) -> KvGroup:
        return self.groups[group]

    @staticmethod
    def keys(hashes: Hashes, group: int) -> Hashes:
        """What the group's blocks of a sequence are found by, shape (n, 2) as `hashes`."""
        return hashes ^ (_MIX * np.uint64(group)) if group else hashes

    def lookup(self, find: Callable[[Hashes], NDArray[np.int64]], hashes: Hashes) -> list[NDArray[np.int64]]:
        """`find` of the keys of each group."""
        return [find(self.keys(hashes, group)) for group in range(len(self))]

    def restorable(self, there: Sequence[Mask]) -> Mask:
        """Which of the prefixes of 1 .. n blocks can be restored, where `there` says what each group has.

        What lies before the n blocks is taken to be on the device already.
        """
        possible = np.ones(len(there[0]), bool)
        for group, have in zip(self.groups, there, strict=True):
            possible &= (
                np.logical_and.accumulate(have)
                if group.window is None
                else _last_are_there(have, group.window)
            )
        return possible

    def longest(self, there: Sequence[Mask]) -> int:
        """How many blocks the longest of these prefixes has."""
        if self.single:
            missing = np.flatnonzero(~there[0])
            return int(missing[0]) if len(missing) else len(there[0])
        possible = np.flatnonzero(self.restorable(there))
        return int(possible[-1]) + 1 if len(possible) else 0

    def needed(self, count: int) -> list[int]:
        """Of each group the first of the `count` blocks of a prefix that it needs."""
        return [max(0, count - count_of(group, count)) for group in self.groups]

    def by_block(self, count: int, marked: Mask) -> Mask:
        """`marked` speaks of what a prefix of `count` blocks needs, group after group; this of its blocks."""
        blocks = np.zeros(count, bool)
        offset = 0
        for first in self.needed(count):
            blocks[first:] |= marked[offset : offset + count - first]
            offset += count - first
        return blocks

    def cost(self, marked: Sequence[Mask], there: Sequence[Mask]) -> NDArray[np.int64]:
        """How many marked blocks each of the prefixes of 1 .. n blocks needs.

        NOT_TO_BE_HAD for those that can't be restored.
        """
        total = np.zeros(len(marked[0]), np.int64)
        for group, mask in zip(self.groups, marked, strict=True):
            until = np.cumsum(mask)
            total += until
            if group.window is not None:
                total[group.window :] -= until[: -group.window]
        total[~self.restorable(there)] = NOT_TO_BE_HAD
        return total


def count_of(group: KvGroup, count: int) -> int:
    """How many blocks of a prefix of `count` the group needs."""
    return count if group.window is None else min(group.window, count)


def _last_are_there(have: Mask, window: int) -> Mask:
    """At each position, whether it and the window - 1 before it, as far as there are any, are there."""
    positions = np.arange(len(have))
    last_gap = np.maximum.accumulate(np.where(have, -1, positions))
    return positions - last_gap >= np.minimum(window, positions + 1)
