"""What if: recorded requests replayed against tiers of other sizes and policies.

The pools, policies, planner, disk tier and filter are those of the engine. What is simulated is the engine
(each request runs alone and to its end) and the ranks: every copy succeeds and takes no time, so nothing is
dropped for want of time and no load is declined. Time is that of the requests. Not thread-safe.
"""

import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbm.errors import UsageError
from kvbm.logic.admission import FrequencyFilter
from kvbm.logic.disk import DiskLimits, DiskTier
from kvbm.logic.hashing import Hashes, SequenceHasher
from kvbm.logic.operations import Completion, Operation
from kvbm.logic.planner import Planner
from kvbm.logic.policies import Lru, load_policy
from kvbm.logic.pool import BlockPool
from kvbm.settings import DiskConfig, TransferConfig

# As `runtime.disk.make_disk_tier` chooses them, which logic may not import; a test compares the two.
_DISK_BATCH_BLOCKS = 32
_FILTER_BLOCKS = (65_536, 1_000_000)

_NOTHING_FAILED = np.empty(0, np.int32)
# Odd constants and shifts of the SplitMix64 generator (Steele, Lea, Flood, 2014).
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_UNNAMED = 1 << 63  # numbers from here on are blocks that a trace does not name


@dataclass(frozen=True, slots=True)
class Request:
    """time_s: of its arrival. hashes: of its full blocks from the head, of the prompt at least.

    Those of the reply follow, where they are known.
    """

    time_s: float
    input_tokens: int
    output_tokens: int
    hashes: Hashes

    def useful_blocks(self, block_size: int) -> int:
        """Blocks that can be had from a cache: an engine has to compute one token at least."""
        return min(max(0, self.input_tokens - 1) // block_size, len(self.hashes))

    def computed_blocks(self, block_size: int) -> int:
        """Full blocks at its end, reply included; the last token of a reply is never computed on."""
        return (self.input_tokens + max(self.output_tokens, 1) - 1) // block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """Sizes in blocks, 0: no such tier. device: what the engine keeps by itself."""

    device_blocks: int = 0
    host_blocks: int = 0
    host_policy: str = "lru"
    disk_blocks: int = 0
    disk_policy: str = "segmented-lru"
    disk_filter: bool = True


@dataclass(slots=True)
class Result:
    """Counted in blocks where nothing else is said. Hits are of prompts, by the tier that had the block."""

    block_size: int
    requests: int = 0
    input_tokens: int = 0
    prompt_blocks: int = 0  # full ones
    device_hits: int = 0
    host_hits: int = 0
    disk_hits: int = 0
    device_evictions: int = 0
    host_evictions: int = 0
    disk_evictions: int = 0
    disk_writes: int = 0

    @property
    def hits(self) -> int:
        return self.device_hits + self.host_hits + self.disk_hits

    @property
    def misses(self) -> int:
        return self.prompt_blocks - self.hits

    @property
    def missed_tokens(self) -> int:
        """Prompt tokens that have to be computed, those of blocks that are not full among them."""
        return self.input_tokens - self.hits * self.block_size

    def rate(self, blocks: int) -> float:
        """Share of the prompt tokens that so many blocks are."""
        return blocks * self.block_size / self.input_tokens if self.input_tokens else 0.0


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A cache that never evicts: what no size and no policy can exceed, and how large it is at the end."""

    hits: int
    blocks: int


class Simulation:
    """One arrangement of tiers, empty at first. block_size: tokens."""

    def __init__(self, tiers: Tiers, block_size: int) -> None:
        if tiers.disk_blocks and not tiers.host_blocks:
            raise UsageError("Blocks pass through the host tier to disk: give host_blocks as well.")
        self._block_size = block_size
        self._result = Result(block_size)
        self._device = BlockPool(tiers.device_blocks, Lru, tier="device") if tiers.device_blocks else None
        self._below = _Below(tiers, block_size) if tiers.host_blocks else None
        self._unnamed = itertools.count(_UNNAMED)

    @property
    def result(self) -> Result:
        """Of the requests replayed so far."""
        result = self._result
        if self._device is not None:
            result.device_evictions = self._device.evictions
        if self._below is not None:
            result.host_evictions = self._below.host.evictions
            if self._below.disk is not None:
                result.disk_evictions = self._below.disk.pool.evictions
                result.disk_writes = self._below.disk.stats.written_blocks
        return result

    def replay(self, request: Request) -> None:
        """Look the prompt up, load what is there, compute the rest and the reply, and store all of it."""
        size, result = self._block_size, self._result
        hashes = self._all_hashes(request)
        wanted = request.useful_blocks(size)
        on_device = 0
        if self._device is not None:
            on_device = len(self._device.match(hashes[:wanted]))
        in_host = on_disk = 0
        if self._below is not None:
            in_host, on_disk = self._below.replay(request.time_s, hashes, on_device, wanted)
        if self._device is not None:
            slots, is_new = self._device.claim(hashes, len(hashes))
            self._device.register(slots[is_new])
            self._device.release(slots[slots >= 0])
        result.requests += 1
        result.input_tokens += request.input_tokens
        result.prompt_blocks += request.input_tokens // size
        result.device_hits += on_device
        result.host_hits += in_host
        result.disk_hits += on_disk

    def _all_hashes(self, request: Request) -> Hashes:
        """Of the blocks that are full at the request's end; unknown ones get names of their own.

        Nobody will ask for these, but they take room.
        """
        computed = request.computed_blocks(self._block_size)
        known = request.hashes[:computed]
        if len(known) == computed:
            return known
        numbers = np.fromiter(itertools.islice(self._unnamed, computed - len(known)), np.uint64)
        return np.concatenate([known, hashes_of(numbers)])


class _Below:
    """What lies below the device, asked in the order in which an engine's leader asks."""

    def __init__(self, tiers: Tiers, block_size: int) -> None:
        self.host = BlockPool(tiers.host_blocks, load_policy(tiers.host_policy))
        self.disk: DiskTier | None = None
        self._block_size = block_size
        self._now = -np.inf
        self._numbers = itertools.count()
        ids = itertools.count()
        self._planner = Planner(
            self.host,
            ranks=1,
            max_batch_blocks=TransferConfig().max_batch_blocks,
            # A real prompt comes in chunks, which never fill the queue; here it comes at once.
            max_queued_blocks=tiers.host_blocks,
            timeout_s=np.inf,
            ids=ids,
            seen=self._seen if tiers.disk_blocks else None,
        )
        if not tiers.disk_blocks:
            return
        remembered = max(_FILTER_BLOCKS[0], 2 * (tiers.disk_blocks + tiers.host_blocks))
        self.disk = DiskTier(
            self.host,
            BlockPool(
                tiers.disk_blocks, load_policy(tiers.disk_policy, "disk.policy"), tier="disk", usable=0
            ),
            ranks=1,
            ids=ids,
            drop=lambda slots, fate: self._planner.drop(slots, fate=fate),
            limits=DiskLimits(
                max_batch_blocks=_DISK_BATCH_BLOCKS,
                max_queued_writes=min(DiskConfig().max_queued_blocks, max(1, tiers.host_blocks // 2)),
                max_fetched_blocks=max(1, tiers.host_blocks // 2),
                timeout_s=np.inf,
            ),
            admission=FrequencyFilter(min(_FILTER_BLOCKS[1], remembered)) if tiers.disk_filter else None,
        )
        # Nothing is left from an earlier run, so that the first tick opens the tier.
        self.disk.found(0, _NOTHING_FAILED, np.empty((0, 2), np.uint64), last=True)

    def _seen(self, slots: NDArray[np.int64]) -> None:
        if self.disk is not None:
            self.disk.seen(slots)

    def replay(self, time_s: float, hashes: Hashes, first: int, wanted: int) -> tuple[int, int]:
        """Blocks from block `first` on, of the first `wanted`, that the host had, and that the disk had."""
        now = self._now = max(self._now, time_s)
        id_ = str(next(self._numbers))
        planner, disk = self._planner, self.disk
        planner.add_request(id_, _KnownHashes(hashes, self._block_size))
        from_disk = 0
        if disk is not None:
            disk.tick(now)
            if wanted > first:
                before = disk.stats.read_blocks
                while not disk.fetch(id_, hashes[first:wanted]):
                    self._copy_of_disk()
                from_disk = disk.stats.read_blocks - before
        matched = min(wanted - first, planner.match(id_, first))
        # Nothing is copied to or from them: any numbers do, and this is the fastest way to so many.
        device_blocks = array("i", bytes(4 * len(hashes)))
        planner.set_table(id_, device_blocks)
        if disk is not None:
            disk.release(id_)
        if matched:
            load = planner.load(id_, first, matched, now)
            self._copy([load] if load is not None else [])
        copies, _ = planner.finish(id_, len(hashes), now, device_blocks)
        if disk is not None:
            disk.finish(id_)
        self._copy(copies)
        return matched - from_disk, from_disk

    def _copy(self, operations: Sequence[Operation]) -> None:
        """Be the one rank. The disk's orders that follow from a copy are carried out before the next."""
        self._copy_of_disk()
        for operation in operations:
            self._planner.complete(0, Completion(operation.id, _NOTHING_FAILED))
            self._copy_of_disk()

    def _copy_of_disk(self) -> None:
        while self.disk is not None and (orders := self.disk.take_orders()[0]):
            for order in orders:
                self.disk.complete(0, Completion(order.id, _NOTHING_FAILED))


class _KnownHashes(SequenceHasher):
    """The chain of a sequence whose hashes were recorded: there are no tokens to hash."""

    def __init__(self, hashes: Hashes, block_size: int) -> None:
        super().__init__(b"", block_size)
        self._hashes.append(hashes)


def hashes_of(numbers: NDArray[np.uint64]) -> Hashes:
    """Distinct sequence hashes for distinct numbers: evenly spread, as the index expects, always the same."""
    return np.stack([_split_mix(numbers), _split_mix(~numbers)], axis=1)


def _split_mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = numbers + _GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
    return mixed ^ (mixed >> np.uint64(31))


def ceiling(requests: Iterable[Request], block_size: int) -> Ceiling:
    """Hits when nothing is ever evicted, found without the classes above."""
    requests = list(requests)
    computed = [request.computed_blocks(block_size) for request in requests]
    names = [request.hashes[:blocks] for request, blocks in zip(requests, computed, strict=True)]
    if not names:
        return Ceiling(0, 0)
    starts = np.cumsum([0, *map(len, names)])
    keys = np.ascontiguousarray(np.concatenate(names)).view("V16").reshape(-1)
    distinct, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    # A block is known where it was first seen in an earlier request.
    known = first[inverse.reshape(-1)] < np.repeat(starts[:-1], np.diff(starts))
    unknown = np.append(np.flatnonzero(~known), len(keys))
    hits = unknown[np.searchsorted(unknown, starts[:-1])] - starts[:-1]
    useful = [request.useful_blocks(block_size) for request in requests]
    unnamed = sum(computed) - len(keys)
    return Ceiling(int(np.minimum(hits, useful).sum()), len(distinct) + unnamed)
