"""KV events for routers: what KVBM's tiers hold, in vLLM's own stream of what its device cache holds.

vLLM publishes what `block_pool.take_events()` returns with each step. That method is replaced here by one
that returns the engine's events merged with those of our tiers, so sequence numbers, replay and a port for
each data-parallel rank are vLLM's own. What the stream means is in docs/events.md.
"""

import functools
import logging
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Concatenate, TypeVar

import msgspec
import numpy as np

from kvbm.logic.hashing import HASH_BYTES, Hashes, SequenceHasher
from kvbm.logic.pool import BlockEvent, BlockPool, BlockState, EventKind
from kvbm.runtime.leader import Leader
from kvbm.vllm_integration import compat

logger = logging.getLogger(__name__)

# As they are on the wire. vLLM 0.26 has no name for the last one yet.
MEDIA = GPU, CPU, STORAGE = "GPU", "CPU", "STORAGE"
MEDIUM_OF_TIER = {"host": CPU, "disk": STORAGE}
_BITS = {CPU: 1, STORAGE: 2}

# Of models with several groups no events are made.
_GROUP = 0

_REGISTERED = np.uint8(BlockState.REGISTERED)
_STORED = EventKind.STORED
_KEY = np.dtype((np.void, HASH_BYTES))

Name = int | bytes  # of a block, in vLLM's events
_T = TypeVar("_T")


@dataclass(slots=True)
class Block:
    """A block that a tier of ours holds or may soon hold, and what its announcement says."""

    name: Name
    parent: Name | None
    tokens: "array[int]"
    lora: tuple[int | None, str | None]  # id, name
    extra_keys: tuple[Any, ...] | None
    held: int = 0  # by which tiers, see _BITS


class EventMerger:
    """Events of the device cache and of our tiers in, one stream out; pure.

    A block is announced when it gets its first holder in a scope and withdrawn when it loses the last one.
    The modes differ in the scope alone: in `dedup` there is one, in `passthrough` every medium is one. A
    withdrawal names the medium that the announcement named: routers keep an index for each medium.

    types: vLLM's event classes, by name. max_expected: most blocks remembered that no tier of ours holds yet.
    """

    def __init__(self, types: Any, *, block_size: int, mode: str, max_expected: int) -> None:
        self._types = types
        self._block_size = block_size
        self._max_expected = max_expected
        shared: dict[Name, int] = {}
        # Each block's holders, times len(MEDIA), plus the number of the medium that it was announced with.
        self._scopes = {medium: shared if mode == "dedup" else {} for medium in MEDIA}
        self._copies: dict[Name, int] = {}  # on the device: vLLM may have several of one block
        self._blocks: dict[bytes, Block] = {}  # by sequence hash
        self._expected: OrderedDict[bytes, None] = OrderedDict()  # those that no tier of ours holds
        self._out: list[Any] = []
        self._own: Any = None  # the last event in _out, where it is ours and may grow
        self._cleared = False

    @property
    def pending(self) -> bool:
        return bool(self._out) or self._cleared

    def __len__(self) -> int:
        """Blocks of ours that are remembered."""
        return len(self._blocks)

    def take(self) -> list[Any]:
        """The merged events since the last call."""
        if self._cleared and not any(self._scopes.values()):
            # True for every reading of it, also the widest, and heals what a router may have missed.
            self._append(self._types.AllBlocksCleared())
        out, self._out = self._out, []
        self._own, self._cleared = None, False
        return out

    # ---- the device cache

    def engine(self, events: Iterable[Any]) -> None:
        """The engine's own events, in their order."""
        for event in events:
            if isinstance(event, self._types.AllBlocksCleared):
                self._clear_device()
            elif getattr(event, "medium", None) != GPU:
                self._append(event)
            elif isinstance(event, self._types.BlockStored):
                self._device_stored(event)
            else:
                self._device_removed(event.block_hashes)

    def relay(self, events: Iterable[Any]) -> None:
        """Events that repeat what was said before, on demand of a request: they change nothing."""
        for event in events:
            self._append(event)

    def _device_stored(self, event: Any) -> None:
        fresh = [self._add_copy(name) and self._acquire(name, GPU) for name in event.block_hashes]
        size = event.block_size
        # An event of fewer blocks than its tokens fill can't be divided.
        if all(fresh) or (any(fresh) and len(event.token_ids) != size * len(fresh)):
            self._append(event)
            return
        for start, end in _runs(fresh):
            part = msgspec.structs.replace(
                event,
                block_hashes=event.block_hashes[start:end],
                parent_block_hash=event.block_hashes[start - 1] if start else event.parent_block_hash,
                token_ids=event.token_ids[start * size : end * size],
                extra_keys=event.extra_keys and event.extra_keys[start:end],
            )
            self._append(part)

    def _device_removed(self, names: Iterable[Name]) -> None:
        for name in names:
            copies = self._copies.get(name, 0)
            if copies > 1:
                self._copies[name] = copies - 1
            elif copies:
                del self._copies[name]
                self._release(name, GPU)

    def _clear_device(self) -> None:
        """Told block by block: AllBlocksCleared names no medium, and routers differ in what they forget."""
        for name in self._copies:
            self._release(name, GPU)
        self._copies.clear()
        self._cleared = True

    def _add_copy(self, name: Name) -> bool:
        """Whether it is the only one."""
        copies = self._copies[name] = self._copies.get(name, 0) + 1
        return copies == 1

    # ---- our tiers

    def expect(self, key: bytes, block: Block, held: int) -> None:
        """Tiers may hold block `key`, and those of `held` do. It is announced if it was not."""
        known = self._blocks.get(key)
        if known is None:
            known = self._blocks[key] = block
            self._expected[key] = None
        elif key in self._expected:
            self._expected.move_to_end(key)
        self._hold(key, known, held)
        while len(self._expected) > self._max_expected:
            oldest, _ = self._expected.popitem(last=False)
            del self._blocks[oldest]

    def stored(self, medium: str, keys: Iterable[bytes]) -> None:
        """Blocks that were never expected, those of an earlier run, wait for a request that names them."""
        bit = _BITS[medium]
        for key in keys:
            block = self._blocks.get(key)
            if block is not None:
                self._hold(key, block, block.held | bit)

    def removed(self, medium: str, keys: Iterable[bytes]) -> None:
        bit = _BITS[medium]
        for key in keys:
            block = self._blocks.get(key)
            if block is not None:
                self._hold(key, block, block.held & ~bit)

    def lose(self, medium: str) -> None:
        """The tier is off: what it holds is lost."""
        self.removed(medium, list(self._blocks))

    def _hold(self, key: bytes, block: Block, held: int) -> None:
        before = block.held
        if held == before:
            return
        block.held = held
        for medium, bit in _BITS.items():
            if held & bit and not before & bit and self._acquire(block.name, medium):
                self._announce(block, medium)
        for medium, bit in _BITS.items():
            if before & bit and not held & bit:
                self._release(block.name, medium)
        if not before:
            del self._expected[key]
        elif not held:
            self._expected[key] = None

    # ---- holders, and what is said of them

    def _acquire(self, name: Name, medium: str) -> bool:
        """Whether the block is new in the medium's scope."""
        scope = self._scopes[medium]
        record = scope.get(name)
        scope[name] = len(MEDIA) + (MEDIA.index(medium) if record is None else record)
        return record is None

    def _release(self, name: Name, medium: str) -> None:
        scope = self._scopes[medium]
        holders, number = divmod(scope[name] - len(MEDIA), len(MEDIA))
        if holders:
            scope[name] -= len(MEDIA)
        else:
            del scope[name]
            self._withdraw(name, MEDIA[number])

    def _announce(self, block: Block, medium: str) -> None:
        event, types = self._own, self._types
        if (
            isinstance(event, types.BlockStored)
            and event.medium == medium
            and event.block_hashes[-1] == block.parent
            and (event.lora_id, event.lora_name) == block.lora
        ):
            event.block_hashes.append(block.name)
            event.token_ids.extend(block.tokens)
            event.extra_keys.append(block.extra_keys)
            return
        lora_id, lora_name = block.lora
        self._append(
            types.BlockStored(
                block_hashes=[block.name],
                parent_block_hash=block.parent,
                token_ids=list(block.tokens),
                block_size=self._block_size,
                lora_id=lora_id,
                medium=medium,
                lora_name=lora_name,
                extra_keys=[block.extra_keys],
                group_idx=_GROUP,
            ),
            own=True,
        )

    def _withdraw(self, name: Name, medium: str) -> None:
        event = self._own
        if isinstance(event, self._types.BlockRemoved) and event.medium == medium:
            event.block_hashes.append(name)
        else:
            event = self._types.BlockRemoved(block_hashes=[name], medium=medium, group_idx=_GROUP)
            self._append(event, own=True)

    def _append(self, event: Any, own: bool = False) -> None:
        self._out.append(event)
        self._own = event if own else None


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of true flags."""
    for flag, members in groupby(range(len(flags)), key=flags.__getitem__):
        if flag:
            run = list(members)
            yield run[0], run[-1] + 1


def keys_of(hashes: Hashes) -> list[bytes]:
    keys: Any = np.ascontiguousarray(hashes).view(_KEY).reshape(-1).tolist()
    return keys


def _passes_on_error(
    method: Callable[Concatenate["KvEvents", ...], _T],
) -> Callable[Concatenate["KvEvents", ...], _T | None]:
    """An error of ours ends the merging: from then on the engine's own events pass as they are."""

    @functools.wraps(method)
    def guarded(self: "KvEvents", *args: Any, **kwargs: Any) -> _T | None:
        if self.failed:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception:
            self.give_up(method.__name__)
            return None

    return guarded


def merge_events(block_pool: Any, leader: Leader, *, block_size: int, mode: str) -> "KvEvents | None":
    """Merge from now on what the pool of an engine publishes; None if the engine publishes no events."""
    if not compat.publishes_events(block_pool):
        return None
    try:
        return KvEvents(block_pool, leader, block_size=block_size, mode=mode)
    except Exception:
        logger.exception(
            "KVBM: its tiers' events can't be merged with the engine's, which are published alone"
        )
        return None


class KvEvents:
    """Merges for one engine whose block pool makes events. All calls on the scheduler's thread, except what
    the leader tells of changes that others make.

    mode: dedup or passthrough.
    """

    def __init__(self, block_pool: Any, leader: Leader, *, block_size: int, mode: str) -> None:
        self.failed = False
        self._block_pool = block_pool
        self._leader = leader
        self._block_size = block_size
        self._types = compat.event_types()
        self._pools: dict[str, BlockPool] = {"host": leader.pool}
        if leader.disk is not None:
            self._pools["disk"] = leader.disk.pool
        self._on = set(self._pools)
        self._merger = EventMerger(
            self._types,
            block_size=block_size,
            mode=mode,
            # Requests that run have their blocks on the device, those that wait for a disk in host memory.
            max_expected=block_pool.num_gpu_blocks + leader.pool.capacity,
        )
        self._noted: list[tuple[Any, SequenceHasher, int, int]] = []  # first block, end
        self._later: deque[BlockEvent] = deque()  # of changes that were not made by the scheduler's thread
        self._since: list[Any] = []  # the engine's events since the last `take`, as they were
        self._unsubscribe = leader.subscribe(self._tier_changed)
        self._engine_take = compat.replace_take_events(block_pool, self.take)
        compat.around_repeats(block_pool, before=self._before_repeat, after=self._relay)

    @property
    def pending(self) -> bool:
        """Whether the next step has something to publish: an idle engine should make one."""
        waiting = self._merger.pending or bool(self._later) or compat.has_events(self._block_pool)
        return not self.failed and waiting

    def take(self) -> list[Any]:
        """What the engine publishes with this step."""
        events = self._take()
        if events is not None:
            self._since.clear()
            return events
        # After an error: once all that is left, from then on the engine's own.
        events, self._since = self._since, []
        return events + self._engine_take()

    def note(self, request: Any, hasher: SequenceHasher, first: int) -> None:
        """The request's blocks from block `first` on are hashed now."""
        if not self.failed:
            self._noted.append((request, hasher, first, len(hasher)))

    def give_up(self, where: str) -> None:
        logger.exception("KVBM: internal error in %s; events are those of the device cache alone", where)
        self.failed = True
        self._noted.clear()
        self._unsubscribe()
        # What was said of our tiers will not be withdrawn any more.
        self._since.insert(0, self._types.AllBlocksCleared())

    # ---- inside

    @_passes_on_error
    def _take(self) -> list[Any]:
        self._catch_up()
        for tier in [tier for tier in self._on if not self._works(tier)]:
            self._on.discard(tier)
            self._merger.lose(MEDIUM_OF_TIER[tier])
        return self._merger.take()

    @_passes_on_error
    def _tier_changed(self, event: BlockEvent) -> None:
        if self._leader.administered:  # by another thread, which must not touch the engine's pool
            self._later.append(event)
            return
        self._catch_up()  # all in the order in which it happened
        self._take_in(event)

    def _take_in(self, event: BlockEvent) -> None:
        medium = MEDIUM_OF_TIER.get(event.tier)
        if medium is None:
            return
        if event.kind != _STORED:
            self._merger.removed(medium, keys_of(event.hashes))
        elif self._works(event.tier):
            self._merger.stored(medium, keys_of(event.hashes))

    @_passes_on_error
    def _before_repeat(self) -> None:
        self._drain()

    @_passes_on_error
    def _relay(self) -> None:
        self._merger.relay(self._engine_events())

    def _catch_up(self) -> None:
        """Take in what the engine and the requests have said: at once for all, as each time costs 30 µs."""
        self._drain()
        while self._later:
            self._take_in(self._later.popleft())
        if not self._noted:
            return
        noted, self._noted = self._noted, []
        hashes = np.concatenate([hasher.hashes[first:end] for _, hasher, first, end in noted])
        known = zip(keys_of(hashes), self._held(hashes), strict=True)
        for request, _, first, end in noted:
            self._expect(request, first, list(islice(known, end - first)))

    def _expect(self, request: Any, first: int, known: list[tuple[bytes, int]]) -> None:
        """known: key and holders of each of the request's blocks from block `first` on."""
        size = self._block_size
        end = first + len(known)
        before = min(first, 1)  # the parent of the first one
        names = compat.event_hashes(self._block_pool, request, size, first - before, end)
        parents = [None, *names][before:]
        tokens = request.all_token_ids[first * size : end * size]
        extra_keys = compat.event_extra_keys(request, size, first, end)
        lora = request.lora_request
        adapter = (lora.adapter_id, lora.name) if lora else (None, None)
        # A block that vLLM had no hash of would have no name, and not be announced.
        for i, ((key, held), name) in enumerate(zip(known, names[before:], strict=False)):
            part = array("I", tokens[i * size : (i + 1) * size])
            extra = extra_keys[i] if extra_keys else None
            self._merger.expect(key, Block(name, parents[i], part, adapter, extra), held)

    def _drain(self) -> None:
        self._merger.engine(self._engine_events())

    def _engine_events(self) -> list[Any]:
        events = self._engine_take()
        self._since += events
        return events

    def _works(self, tier: str) -> bool:
        """Whether what the tier holds can be had."""
        leader = self._leader
        if leader.off_reason is not None:
            return False
        return tier != "disk" or (leader.disk is not None and leader.disk.off_reason is None)

    def _held(self, hashes: Hashes) -> list[int]:
        """By which tiers each block is held."""
        held = np.zeros(len(hashes), np.int64)
        with self._leader.lock:
            for tier, pool in self._pools.items():
                if self._works(tier):
                    slots = pool.find(hashes)
                    held |= ((slots >= 0) & (pool.states(slots) == _REGISTERED)) * _BITS[MEDIUM_OF_TIER[tier]]
        return held.tolist()
