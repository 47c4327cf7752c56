"""A request as the planner follows it: for each KV group its device blocks and its pinned host blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.arrays import GrowingArray
from kvbm.logic.groups import KvGroups
from kvbm.logic.hashing import Hashes, SequenceHasher
from kvbm.logic.index import Slots
from kvbm.logic.operations import BlockIds

NO_BLOCK = -1  # in a table: the group has no block there


class Passing(NamedTuple):
    """What an engine may soon give up of a request: for groups that need only the last blocks.

    begun: tokens computed before the step; what the groups don't need after them may be gone. offers: states
    of this step, as (group, the block at whose end the state was taken, device block).
    """

    begun: int
    offers: Sequence[tuple[int, int, int]] = ()


@dataclass(slots=True)
class Followed:
    """tables, chains: for each group, of each block of the sequence from the head, its device block, and the
    host block pinned for it; -1 where there is none."""

    hasher: SequenceHasher
    groups: KvGroups
    tag: int = 0  # of its blocks
    tables: list[GrowingArray] = field(init=False)
    chains: list[GrowingArray] = field(init=False)
    operations: set[int] = field(default_factory=set)
    failures: int = 0
    load_failed: bool = False
    finished: bool = False
    match: tuple[tuple[int, int, int], int] = ((-1, 0, 0), 0)  # what was asked, and the answer
    told: int = 0  # of its first so many blocks it is known that some found no room

    def __post_init__(self) -> None:
        self.tables = [GrowingArray(np.int32) for _ in self.groups]
        self.chains = [GrowingArray(np.int64) for _ in self.groups]

    def to_store(self, end: int, passing: Passing) -> "Iterator[Segment]":
        """What of the first `end` blocks is computed and in no chain yet."""
        for group, kind in enumerate(self.groups):
            first, table = len(self.chains[group]), self.tables[group]
            if kind.window is None:
                last = min(end, len(table))
                if last > first:
                    yield Segment(self, group, np.arange(first, last), table.rows[first:last], False)
                continue
            if kind.offered:
                own = [
                    (block, at) for of, block, at in passing.offers if of == group and first <= block < end
                ]
                positions, blocks = np.array(own, np.int64).reshape(-1, 2).T
            else:
                # What the engine may have given up is not looked at: its device block may be another's.
                first = max(first, (passing.begun - kind.reach) // self.hasher.block_size)
                positions = np.arange(first, max(first, min(end, len(table))))
                blocks = table.rows[positions]
                positions, blocks = positions[blocks != NO_BLOCK], blocks[blocks != NO_BLOCK]
            if len(positions):
                yield Segment(self, group, positions, blocks.astype(np.int32), True)

    def lose(self, slots: Slots) -> list[Slots]:
        """Some host blocks are no longer what they were: what it lets go, of each group that had any."""
        let_go: list[Slots] = []
        for kind, chain in zip(self.groups, self.chains, strict=True):
            lost = np.flatnonzero(np.isin(chain.rows, slots))
            if not len(lost):
                continue
            if kind.window is None:
                let_go.append(chain.rows[lost[0] :].copy())
                chain.cut(int(lost[0]))
            else:
                let_go.append(chain.rows[lost])
                chain.rows[lost] = -1
        return let_go

    def built_on(self, lost: Slots) -> Slots:
        """Its host blocks that were computed from `lost` ones, or may have been."""
        if not self.groups.single:
            rows = np.concatenate([chain.rows for chain in self.chains])
            return rows[rows >= 0]
        rows = self.chains[0].rows
        first = np.flatnonzero(np.isin(rows, lost))
        return rows[first[0] :] if len(first) else lost

    def outside_window(self, group: int) -> Slots:
        """Take from a group's chain what has left its window."""
        window, chain = self.groups[group].window, self.chains[group]
        return self._take(chain.rows[: max(0, len(chain) - window)]) if window is not None else _NONE

    def all_of(self, group: int) -> Slots:
        """Take all from a group's chain."""
        return self._take(self.chains[group].rows)

    @staticmethod
    def _take(rows: Slots) -> Slots:
        slots = rows[rows >= 0]
        rows[:] = -1
        return slots


_NONE = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Segment:
    """Blocks of a request's group to be stored. positions, device_blocks: shape (n,)."""

    request: Followed
    group: int
    positions: NDArray[np.int64]
    device_blocks: BlockIds
    passing: bool  # the engine may give up the device blocks

    @property
    def keys(self) -> Hashes:
        return KvGroups.keys(self.request.hasher.hashes[self.positions], self.group)

    def chain(self, slots: Slots) -> None:
        """Add host blocks to the request's chain: for the first positions, or for all with -1 for none."""
        chain = self.request.chains[self.group]
        if not self.passing:
            chain.append(slots)
            return
        chain.append(np.full(int(self.positions[-1]) + 1 - len(chain), -1))
        chain.rows[self.positions] = slots
