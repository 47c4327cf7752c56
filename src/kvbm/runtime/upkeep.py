"""What users ask of running tiers: clear, resize, pin, prefetch. All under the leader's lock."""

import numpy as np

from kvbm.logic.disk import DiskTier
from kvbm.logic.hashing import Hashes, salt_tag
from kvbm.logic.history import Fate
from kvbm.logic.index import Slots
from kvbm.logic.planner import Planner
from kvbm.logic.pool import BlockState

_NO_SLOTS = np.empty(0, np.int64)
MAX_PREFETCHES = 64  # that have not arrived; they begin with the engine's next step


class Upkeep:
    """disk: None without a disk tier. Times are the leader's."""

    def __init__(self, planner: Planner, disk: DiskTier | None) -> None:
        self._planner = planner
        self._pool = planner.pool
        self._disk = disk
        self._ready = 0  # host slots that have memory
        self._limit = planner.pool.capacity  # of those to be used
        self._pins: dict[str, tuple[Slots, float]] = {}  # until when
        self._prefetches: dict[str, Hashes] = {}
        self._forget_all = False

    @property
    def pinned_blocks(self) -> int:
        return sum(len(slots) for slots, _ in self._pins.values())

    def host_has(self, ready: int) -> None:
        """So many host slots have memory on all ranks."""
        self._ready = ready
        self._pool.grow(min(ready, self._limit))

    def take_forget_all(self) -> bool:
        """Whether the ranks must forget what is on disk."""
        forget_all, self._forget_all = self._forget_all, False
        return forget_all

    def clear(self, tier: str | None, salt: str | None) -> int:
        """Forget the blocks of a tier, of a salt, or all; returns how many."""
        disk, tag = self._disk, salt_tag(salt)
        count = 0
        if salt is not None:
            count += self._planner.clear_tag(tag)
        elif tier != "disk":
            count += self._pool.num_registered
            self._planner.clear()
        if disk is not None:
            if salt is not None and disk.pool.usable:
                count += disk.clear_tag(tag)
            # Until the tier is ready it has but what an earlier run left, and all salts are unknown.
            elif salt is not None or tier != "host":
                count += disk.pool.num_registered
                disk.clear()
                self._forget_all = True
        self._release_lost()
        return count

    def resize(self, tier: str, blocks: int) -> None:
        """Use the first `blocks` slots of a tier."""
        if tier == "disk" and self._disk is not None:
            self._disk.resize(blocks)
            return
        self._limit = blocks
        if blocks < self._pool.usable:
            self._planner.drop(self._pool.beyond(blocks), Fate.EVICTED)
            self._pool.shrink(blocks)
            self._release_lost()
            while self.pinned_blocks > blocks // 2:
                self.unpin(next(reversed(self._pins)))
        else:
            self.host_has(self._ready)

    def pin(self, name: str, hashes: Hashes, until: float) -> int:
        """Keep what the host has of a prefix, half the tier at most; returns how many blocks."""
        room = max(0, self._pool.usable // 2 - self.pinned_blocks)
        wanted = hashes[: self._planner.longest(hashes)]
        slots = self._planner.slots_of(wanted) if len(wanted) else _NO_SLOTS
        if len(slots) > room:  # the head is of use without the tail only where one group needs all
            slots = slots[:room] if self._planner.groups.single else _NO_SLOTS
        if len(slots):
            self._pool.pin(slots)
            self._pins[name] = (slots, until)
        return len(slots)

    def unpin(self, name: str) -> int:
        """Returns how many blocks are let go; 0 if there is no such pin."""
        slots, _ = self._pins.pop(name, (None, 0.0))
        if slots is None:
            return 0
        self._pool.release(slots)
        return len(slots)

    def prefetch(self, name: str, hashes: Hashes) -> tuple[int, int] | None:
        """Read a prefix from disk, from the next step on: an idle engine makes none.

        Returns how many of its blocks the host has, and how many it lacks that the disk has; None if too many
        prefetches wait.
        """
        coming = 0
        if self._disk is not None:
            if len(self._prefetches) >= MAX_PREFETCHES:
                return None
            self._prefetches[name] = hashes
            coming = self._disk.lacking(hashes)
        return self._planner.longest(hashes), coming

    def tick(self, now: float) -> None:
        """Let go of what has expired or arrived. Once a step, after the disk tier's."""
        if self._pins:
            for name in [name for name, (_, until) in self._pins.items() if until <= now]:
                self.unpin(name)
        if self._prefetches and self._disk is not None:
            for name in [name for name, hashes in self._prefetches.items() if self._disk.fetch(name, hashes)]:
                del self._prefetches[name]
                self._disk.finish(name)

    def _release_lost(self) -> None:
        """Pins hold the memory of blocks that are gone as well: nobody wants that."""
        for name, (slots, until) in list(self._pins.items()):
            lost = self._pool.states(slots) != BlockState.REGISTERED
            if lost.any():
                self._pool.release(slots[lost])
                self._pins[name] = (slots[~lost], until)
                if lost.all():
                    del self._pins[name]
