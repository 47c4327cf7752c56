"""The block manager without an engine: host and disk tiers for KV tensors of numpy or torch (CPU)."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbm.config import load_config
from kvbm.errors import CapacityError, ConfigError, UsageError
from kvbm.logic.disk import DiskStats
from kvbm.logic.hashing import Hashes, SequenceHasher, namespace_digest, root_hash
from kvbm.logic.index import Slots
from kvbm.logic.policies import load_policy
from kvbm.logic.pool import BlockEvent, BlockPool, subscribe_to_all
from kvbm.runtime.disk import num_host_slots
from kvbm.runtime.manager_disk import ManagerDisk
from kvbm.transfer.arena import HostArena, ensure_fits, slot_bytes
from kvbm.transfer.copy import CpuCopyEngine
from kvbm.transfer.layout import KvLayout, recognise, tensor_view
from kvbm.transfer.records import HostRecords

Tokens = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class ManagerStats:
    """Counts of blocks, at one moment and since the start."""

    capacity: int
    registered: int
    free: int
    offloaded: int
    onboarded: int
    evicted: int
    corrupt: int
    disk: DiskStats | None = None


class Blocks:
    """Blocks of a `KvBlockManager`, kept from eviction until `release`; also a context manager."""

    def __init__(self, manager: "KvBlockManager", slots: Slots) -> None:
        self._manager = manager
        self.slots = slots
        self._held = True

    def __len__(self) -> int:
        return len(self.slots)

    def __enter__(self) -> "Blocks":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the blocks go; registered ones stay matchable until they are evicted."""
        if self._held:
            self._held = False
            self._manager._release(self.slots)


class KvBlockManager:
    """Keeps KV blocks in host memory and finds them again by their tokens.

    block_size: tokens of a block. Either kv_caches names the tensors that hold the KV on the "device": numpy
    arrays or torch CPU tensors whose first dimension counts blocks; `offload` and `onboard` copy from and to
    them. Or block_bytes gives the size of a block that `write` fills.
    namespace: whatever else determines the bytes (model, dtype, ...); a mapping of JSON-serialisable values.
    settings: see docs/configuration.md, as host__cache_gb=4 or {"host": {...}} through `extra`. With
    disk__cache_gb, blocks that are used again are kept on disk too, also for a later manager of the same
    namespace. The disk is worked on while calls are made; `match` waits for what it needs from there.

    Thread-safe; calls run one after another. Raises ConfigError, CapacityError, LayoutError and UsageError.
    """

    def __init__(
        self,
        *,
        block_size: int,
        kv_caches: Mapping[str, Any] | None = None,
        block_bytes: int | None = None,
        namespace: Mapping[str, object] | None = None,
        extra: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        config = load_config(extra, **settings)
        if not config.enabled:
            raise ConfigError(
                "No cache size is configured: pass host__cache_gb=... or disk__cache_gb=..., or set "
                "DYN_KVBM_CPU_CACHE_GB or DYN_KVBM_DISK_CACHE_GB."
            )
        layout = None
        if kv_caches and block_bytes is None:
            layout = _layout(kv_caches)
            block_bytes = layout.record_bytes
        elif kv_caches or not block_bytes:
            raise UsageError("Give either kv_caches or block_bytes.")
        size = slot_bytes(block_bytes)
        num_slots = num_host_slots(config, block_bytes, ranks=1)
        if num_slots < 1:
            raise CapacityError(
                f"The host cache is smaller than one block of {size} bytes: raise host.cache_gb."
            )
        ensure_fits(num_slots * size)
        self.block_size = block_size
        self.block_bytes = block_bytes
        self._namespace = namespace_digest(
            {"block_size": block_size, "block_bytes": block_bytes, **(namespace or {})}
        )
        self._kv_caches = kv_caches  # keeps the memory behind the layout's addresses alive
        self._arena = HostArena(num_slots, block_bytes)
        engine = CpuCopyEngine(layout, self._arena) if layout else None
        self._records = HostRecords(self._arena, engine, checksum=config.host.checksum is not False)
        self._pool = BlockPool(num_slots, load_policy(config.host.policy))
        self._lock = threading.RLock()
        self._disk: ManagerDisk | None = None
        if config.has_disk:
            tensors = {
                name: [str(tensor.dtype), list(tensor.shape[1:])]
                for name, tensor in (kv_caches or {}).items()
            }
            record_namespace = namespace_digest({"cache": self._namespace.hex(), "tensors": tensors})
            self._disk = ManagerDisk(config, self._pool, self._records, self._arena, record_namespace)
        self._offloaded = self._onboarded = self._corrupt = 0

    # ---- block by block ----

    def allocate(self, count: int) -> Blocks:
        """`count` blocks to be filled, or CapacityError when so many are in use that they can't be had."""
        with self._lock:
            slots = self._pool.allocate(count)
            if len(slots) < count:
                self._pool.release(slots)
                raise CapacityError(
                    f"{count} blocks are wanted, {len(slots)} can be had, all others are in use: release "
                    f"some, or raise host.cache_gb."
                )
            return Blocks(self, slots)

    def write(self, blocks: Blocks, index: int, data: Any) -> None:
        """Fill block `index` of `blocks` with `data`: an array or buffer of `block_bytes` bytes."""
        source = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if source.nbytes != self.block_bytes:
            raise UsageError(f"A block has {self.block_bytes} bytes, not {source.nbytes}.")
        self._arena.records()[blocks.slots[index]] = source

    def register(self, blocks: Blocks, tokens: Tokens, *, salt: str | None = None) -> None:
        """Make filled blocks findable as those of the first `len(blocks)` blocks of `tokens`.

        A block that the tier has already is not kept twice: `blocks` then holds the one that was there.
        """
        hashes = self._hashes(tokens, salt)[: len(blocks)]
        if len(hashes) < len(blocks):
            raise UsageError(
                f"{len(blocks)} blocks need {len(blocks) * self.block_size} tokens, not {len(tokens)}."
            )
        with self._lock:
            self._records.seal(blocks.slots)
            owners = self._pool.complete(blocks.slots, hashes)
            self._pool.register(owners[owners == blocks.slots])
            blocks.slots = owners
            self._seen(owners)

    def match(self, tokens: Tokens, *, salt: str | None = None) -> Blocks:
        """The longest prefix of `tokens` that the tiers hold intact. Release it after use."""
        with self._lock:
            hashes = self._hashes(tokens, salt)
            if self._disk is not None:
                self._disk.fetch(hashes)
            slots = self._pool.match(hashes)
            damaged = slots[~self._records.intact(slots)]
            if len(damaged):
                self._corrupt += len(damaged)
                self._pool.withdraw(damaged)
                slots = slots[: int(np.flatnonzero(np.isin(slots, damaged))[0])]
            self._pool.pin(slots)
            self._seen(slots)
            return Blocks(self, slots)

    def read(self, blocks: Blocks, index: int) -> NDArray[np.uint8]:
        """View of the bytes of block `index`, shape (block_bytes,). Don't write to a registered block."""
        return self._arena.records()[blocks.slots[index]]

    # ---- whole sequences ----

    def offload(self, tokens: Tokens, device_blocks: Sequence[int], *, salt: str | None = None) -> int:
        """Copy what the tier lacks of the first blocks of `tokens`, which lie in `device_blocks`.

        Returns how many blocks of the sequence the tier holds now: fewer than given when it has no room.
        """
        hashes = self._hashes(tokens, salt)[: len(device_blocks)]
        blocks = np.asarray(device_blocks, np.int64)
        with self._lock:
            slots, is_new = self._pool.claim(hashes, max_new=self._pool.capacity)
            held = int(np.flatnonzero(slots < 0)[0]) if (slots < 0).any() else len(slots)
            new = np.flatnonzero(is_new)
            try:
                self._records.offload(blocks[new], slots[new])
                self._pool.register(slots[new])
                self._offloaded += len(new)
                self._seen(slots[new])
            finally:  # after an error the new blocks are unregistered, and released they are gone
                self._pool.release(slots[slots >= 0])
            return held

    def onboard(self, tokens: Tokens, device_blocks: Sequence[int], *, salt: str | None = None) -> int:
        """Copy the longest prefix of `tokens` that the tier holds to `device_blocks`; returns its blocks."""
        with self._lock, self.match(tokens, salt=salt) as found:
            count = min(len(found), len(device_blocks))
            blocks = np.asarray(device_blocks[:count], np.int64)
            self._records.onboard(blocks, found.slots[:count])
            self._onboarded += count
            return count

    # ---- the tier ----

    def subscribe(self, subscriber: Callable[[BlockEvent], None]) -> Callable[[], None]:
        """Call with every stored and removed event, from the thread that caused it; returns what ends it."""
        below = [self._disk.tier.pool] if self._disk is not None else []
        return subscribe_to_all([self._pool, *below], subscriber)

    def stats(self) -> ManagerStats:
        with self._lock:
            pool = self._pool
            return ManagerStats(
                capacity=pool.capacity,
                registered=pool.num_registered,
                free=pool.num_free,
                offloaded=self._offloaded,
                onboarded=self._onboarded,
                evicted=pool.evictions,
                corrupt=self._corrupt,
                disk=self._disk.stats() if self._disk is not None else None,
            )

    def clear(self) -> None:
        """Forget all blocks, also those on disk."""
        with self._lock:
            self._pool.clear()
            if self._disk is not None:
                self._disk.clear()

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until what is being written to disk is there; False if that takes longer."""
        with self._lock:
            return self._disk is None or self._disk.flush(timeout_s)

    def close(self) -> None:
        """Finish writing and give the memory back. Nothing else may be called afterwards."""
        if self._disk is not None:
            self._disk.close()
        self._arena.close()

    def __enter__(self) -> "KvBlockManager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside ----

    def _hashes(self, tokens: Tokens, salt: str | None) -> Hashes:
        hasher = SequenceHasher(root_hash(self._namespace, self.block_size, salt=salt), self.block_size)
        hasher.extend(tokens)
        return hasher.hashes

    def _seen(self, slots: Slots) -> None:
        if self._disk is not None:
            self._disk.seen(slots)

    def _release(self, slots: Slots) -> None:
        with self._lock:
            self._pool.release(slots)


def _layout(kv_caches: Mapping[str, Any]) -> KvLayout:
    for name, tensor in kv_caches.items():
        if str(getattr(tensor, "device", "cpu")) != "cpu" or not tensor.shape:
            raise UsageError(
                f"kv_caches[{name!r}] is not an array or CPU tensor with a first dimension of blocks."
            )
    num_blocks = next(iter(kv_caches.values())).shape[0]
    record_bytes = sum(tensor.nbytes for tensor in kv_caches.values()) // num_blocks
    return recognise(
        (tensor_view(name, tensor) for name, tensor in kv_caches.items()), num_blocks, record_bytes
    )
