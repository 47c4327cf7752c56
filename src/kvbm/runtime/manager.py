"""The block manager without an engine: host and disk tiers for KV tensors of numpy or torch (CPU)."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbm.config import load_config
from kvbm.errors import CapacityError, ConfigError, UsageError
from kvbm.logic.hashing import Hashes, SequenceHasher, namespace_digest, root_hash
from kvbm.logic.index import Slots
from kvbm.logic.pool import BlockEvent
from kvbm.runtime.block_store import BlockStore, StoreStats
from kvbm.transfer.copy import CpuCopyEngine
from kvbm.transfer.layout import KvLayout, recognise, tensor_view

Tokens = Sequence[int] | NDArray[np.integer]


class Blocks:
    """Blocks of a `KvBlockManager`, kept from eviction until `release`; also a context manager."""

    def __init__(self, store: BlockStore, slots: Slots) -> None:
        self._store = store
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
            self._store.release(self.slots)


class KvBlockManager:
    """Keeps KV blocks in host memory and finds them again by their tokens.

    block_size: tokens of a block. Either kv_caches names the tensors that hold the KV on the "device": numpy
    arrays or torch CPU tensors whose first dimension counts blocks; `offload` and `onboard` copy from and to
    them. Or block_bytes gives the size of a block that `write` fills.
    namespace: whatever else determines the bytes (model, dtype, ...); a mapping of JSON-serialisable values.
    settings: see docs/configuration.md, as host__cache_gb=4 or {"host": {...}} through `extra`. With
    disk__cache_gb, blocks that are used again are kept on disk too, also for a later manager of the same
    namespace. A thread works on the disk in the background; `match` waits for what it needs from there.

    Thread-safe. Raises ConfigError, CapacityError, LayoutError and UsageError.
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
        self.block_size = block_size
        self.block_bytes = block_bytes
        self._namespace = namespace_digest(
            {"block_size": block_size, "block_bytes": block_bytes, **(namespace or {})}
        )
        self._kv_caches = kv_caches  # keeps the memory behind the layout's addresses alive
        tensors = {
            name: [str(tensor.dtype), list(tensor.shape[1:])] for name, tensor in (kv_caches or {}).items()
        }
        self._store = BlockStore(
            config,
            block_bytes,
            (lambda arena: CpuCopyEngine(layout, arena)) if layout else None,
            namespace=namespace_digest({"cache": self._namespace.hex(), "tensors": tensors}),
            checksum=config.host.checksum is not False,
        )
        self._store.wait_found()

    # ---- block by block ----

    def allocate(self, count: int) -> Blocks:
        """`count` blocks to be filled, or CapacityError when so many are in use that they can't be had."""
        slots = self._store.allocate(count)
        if len(slots) < count:
            self._store.release(slots)
            raise CapacityError(
                f"{count} blocks are wanted, {len(slots)} can be had, all others are in use: release "
                f"some, or raise host.cache_gb."
            )
        return Blocks(self._store, slots)

    def write(self, blocks: Blocks, index: int, data: Any) -> None:
        """Fill block `index` of `blocks` with `data`: an array or buffer of `block_bytes` bytes."""
        source = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        if source.nbytes != self.block_bytes:
            raise UsageError(f"A block has {self.block_bytes} bytes, not {source.nbytes}.")
        self._store.records.arena.records()[blocks.slots[index]] = source

    def register(self, blocks: Blocks, tokens: Tokens, *, salt: str | None = None) -> None:
        """Make filled blocks findable as those of the first `len(blocks)` blocks of `tokens`.

        A block that the tier has already is not kept twice: `blocks` then holds the one that was there.
        """
        hashes = self._hashes(tokens, salt)[: len(blocks)]
        if len(hashes) < len(blocks):
            raise UsageError(
                f"{len(blocks)} blocks need {len(blocks) * self.block_size} tokens, not {len(tokens)}."
            )
        self._store.records.seal(blocks.slots)
        blocks.slots = self._store.name(blocks.slots, hashes)

    def match(self, tokens: Tokens, *, salt: str | None = None) -> Blocks:
        """The longest prefix of `tokens` that the tiers hold intact. Release it after use."""
        return Blocks(self._store, self._store.match(self._hashes(tokens, salt)))

    def read(self, blocks: Blocks, index: int) -> NDArray[np.uint8]:
        """View of the bytes of block `index`, shape (block_bytes,). Don't write to a registered block."""
        return self._store.records.arena.records()[blocks.slots[index]]

    # ---- whole sequences ----

    def offload(self, tokens: Tokens, device_blocks: Sequence[int], *, salt: str | None = None) -> int:
        """Copy what the tier lacks of the first blocks of `tokens`, which lie in `device_blocks`.

        Returns how many blocks of the sequence the tier holds now: fewer than given when it has no room.
        """
        hashes = self._hashes(tokens, salt)[: len(device_blocks)]
        return self._store.store(hashes, np.asarray(device_blocks, np.int64))

    def onboard(self, tokens: Tokens, device_blocks: Sequence[int], *, salt: str | None = None) -> int:
        """Copy the longest prefix of `tokens` that the tier holds to `device_blocks`; returns its blocks."""
        hashes = self._hashes(tokens, salt)[: len(device_blocks)]
        return self._store.load(hashes, np.asarray(device_blocks, np.int64))

    # ---- the tier ----

    def subscribe(self, subscriber: Callable[[BlockEvent], None]) -> Callable[[], None]:
        """Call with every stored and removed event, from the thread that caused it; returns what ends it."""
        return self._store.subscribe(subscriber)

    def stats(self) -> StoreStats:
        return self._store.stats()

    def clear(self) -> None:
        """Forget all blocks, also those on disk."""
        self._store.clear()

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until what is being written to disk is there; False if that takes longer."""
        return self._store.flush(timeout_s)

    def close(self) -> None:
        """Finish writing and give the memory back. Nothing else may be called afterwards."""
        self._store.close()

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
