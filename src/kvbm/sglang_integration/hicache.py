"""KVBM's tiers behind SGLang's host pool: a HiCache storage backend.

    --enable-hierarchical-cache --hicache-storage-backend dynamic --hicache-storage-backend-extra-config
    '{"backend_name": "kvbm", "module_path": "kvbm.sglang_integration.hicache", "class_name": "KvbmStorage",
      "interface_v1": 1, "kvbm": {"disk": {"cache_gb": 100, "dir": "/mnt/nvme"}}}'

SGLang calls from threads of its own, which die of an exception before 0.5.22: none leaves a method here, and
an error is a miss. Every rank has a store of its own; SGLang agrees on the shortest answer.
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from kvbm.errors import LayoutError
from kvbm.runtime.block_store import BlockStore, StatsLog, StoreStats
from kvbm.runtime.exchange import Exchange
from kvbm.sglang_integration import compat
from kvbm.sglang_integration.events import publish_events
from kvbm.sglang_integration.exchange import pool_exchange
from kvbm.sglang_integration.identity import Place, engine_namespace, hashes_of, read_config
from kvbm.sglang_integration.weights import weight_watch
from kvbm.transfer.copy import CpuCopyEngine
from kvbm.transfer.layout import KvLayout, TensorView, recognise

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# Attributes of a host pool that tell its bytes from another's.
_POOL = (
    *("layout", "page_size", "dtype", "layer_num", "head_num", "head_dim", "v_head_dim", "kv_lora_rank"),
    *("qk_rope_head_dim", "start_layer", "end_layer", "storage_format_tag", "head_group_num"),
)


def _or_miss(miss: Callable[[Any], Any]) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """An error, or a store that is not there, counts as `miss` of the method's first argument."""

    def decorate(method: Callable[..., _T]) -> Callable[..., _T]:
        @functools.wraps(method)
        def guarded(self: "KvbmStorage", first: Any, *args: Any, **kwargs: Any) -> Any:
            if self._store is None or weight_watch.changing:
                return miss(first)
            try:
                return method(self, first, *args, **kwargs)
            except Exception:
                if method.__name__ not in self._failed:  # a line for each page would bury the log
                    self._failed.add(method.__name__)
                    logger.exception(
                        "KVBM: an error in %s counts as a miss, also from now on", method.__name__
                    )
                return miss(first)

        return guarded

    return decorate


class KvbmStorage(HiCacheStorage):
    """See the module. Made by SGLang on each rank; threads call at once.

    The generic interface hands over pages as flat tensors; `interface_v1` names pages of the host pool, which
    are then copied without a tensor between. Raises KvbmError at start, for a user's mistakes, and only then.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        extra = dict(getattr(storage_config, "extra_config", None) or {})
        self._config, self._kv_events = read_config(extra)
        self._zero_copy = bool(extra.get("interface_v1"))
        self._sglang_config = storage_config
        self._store: BlockStore | None = None
        self._failed: set[str] = set()
        self._metrics = _Metrics()
        self._end_events: Callable[[], None] | None = None

    # ---- life ----

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = pool = mem_pool_host
        config = self._sglang_config
        self._page_size = int(pool.page_size)
        reason = _refusal(config)
        if reason is not None:
            logger.warning("KVBM: nothing is cached, as %s", reason)
            return
        place = _place(config)
        layout: KvLayout | None = None
        exchange: Exchange | None = None
        if self._zero_copy:
            layout = pool_layout(pool)
            record_bytes = layout.record_bytes
            exchange = pool_exchange(pool, place) if self._config.disk.exchange else None
        else:
            record_bytes = pool.get_dummy_flat_data_page().nbytes
        if self._config.disk.exchange and exchange is None:
            logger.warning("KVBM: records on disk are not exchanged with other engines: see docs/engines.md")
        facts = {name: str(getattr(pool, name, None)) for name in _POOL}
        facts |= {"type": type(pool).__name__, "zero_copy": self._zero_copy, "bytes": record_bytes}
        self._pages = layout.num_blocks if layout else 0
        self._store = BlockStore(
            self._config,
            record_bytes,
            (lambda arena: CpuCopyEngine(layout, arena, exchange and exchange.views)) if layout else None,
            namespace=exchange.namespace
            if exchange
            else engine_namespace(getattr(config, "model_name", None), facts, place),
            checksum=self._config.host.checksum is not False,
            rank=place.rank,
            ranks=place.ranks,
            replica=place.replica,
        )
        self._log = StatsLog(self._store, self._config.observe.log_interval_s)
        weight_watch.add(self)
        if self._kv_events is not None and place.rank == 0:
            self._end_events = publish_events(
                self._store, self._kv_events, page_size=self._page_size, dp_rank=place.replica
            )
        logger.info(
            "KVBM: rank %d of %d keeps %d pages of %d bytes in host memory%s",
            *(place.rank, place.ranks, self._store.pool.capacity, record_bytes),
            " and more on disk" if self._config.has_disk else "",
        )

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A model with more pools than that of its KV has state that KVBM does not keep: not cached."""
        if str(host_pool_name) != "kv" and self._store is not None:
            logger.warning(
                "KVBM: nothing is cached, as the model keeps %r beside its KV", str(host_pool_name)
            )
            self.close()

    def clear(self) -> None:
        if self._store is not None:
            self._store.clear()

    def close(self) -> None:
        store, self._store = self._store, None
        if self._end_events is not None:
            self._end_events()
            self._end_events = None
        if store is not None:
            store.close()

    def stats(self) -> StoreStats | None:
        return self._store.stats() if self._store is not None else None

    def get_stats(self) -> Any:
        return self._metrics.take()

    # ---- by page of the host pool ----

    @_or_miss(lambda keys: 0)
    def batch_exists(self, keys: Sequence[str], extra_info: Any = None) -> int:
        self._log.tick()
        return self._running.count(hashes_of(keys))

    @_or_miss(lambda keys: [False] * len(keys))
    def batch_set_v1(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        begin = time.monotonic()
        held = self._running.store(hashes_of(keys), self._pool_pages(keys, host_indices))
        self._metrics.stored(held, held * self._record_bytes, time.monotonic() - begin)
        return _first(held, len(keys))

    @_or_miss(lambda keys: [False] * len(keys))
    def batch_get_v1(
        self, keys: Sequence[str], host_indices: torch.Tensor, extra_info: Any = None
    ) -> list[bool]:
        begin = time.monotonic()
        loaded = self._running.load(hashes_of(keys), self._pool_pages(keys, host_indices))
        self._metrics.loaded(loaded, loaded * self._record_bytes, time.monotonic() - begin)
        return _first(loaded, len(keys))

    # ---- by flat tensor ----

    @_or_miss(lambda keys: False)
    def batch_set(
        self, keys: Sequence[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        begin = time.monotonic()
        held = self._running.put(hashes_of(keys), [_bytes_of(value, self._record_bytes) for value in values])
        self._metrics.stored(held, held * self._record_bytes, time.monotonic() - begin)
        return held == len(keys)

    @_or_miss(lambda keys: [None] * len(keys))
    def batch_get(
        self, keys: Sequence[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[torch.Tensor | None]:
        begin = time.monotonic()
        targets = [_bytes_of(target, self._record_bytes) for target in target_locations]
        loaded = self._running.get(hashes_of(keys), targets)
        self._metrics.loaded(loaded, loaded * self._record_bytes, time.monotonic() - begin)
        return [*target_locations[:loaded], *[None] * (len(keys) - loaded)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        return self.batch_get([key], [target_location])[0]

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    # ---- several pools: see register_mem_host_pool_v2 ----

    def batch_exists_v2(self, keys: Sequence[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        from sglang.srt.mem_cache.hicache_storage import PoolTransferResult

        return PoolTransferResult(0, {})

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    batch_set_v2 = batch_get_v2

    # ---- inside ----

    @property
    def _running(self) -> BlockStore:
        assert self._store is not None
        return self._store

    @property
    def _record_bytes(self) -> int:
        return self._running.records.arena.record_bytes

    def _pool_pages(self, keys: Sequence[str], host_indices: torch.Tensor) -> NDArray[np.int64]:
        """Pages of the host pool from SGLang's token slots."""
        indices = host_indices.numpy()
        if len(indices) != len(keys) * self._page_size:
            raise LayoutError(f"{len(keys)} pages of {self._page_size} tokens in {len(indices)} slots")
        firsts = indices[:: self._page_size]
        pages = firsts // self._page_size
        if (pages * self._page_size != firsts).any() or (pages < 0).any() or (pages >= self._pages).any():
            raise LayoutError("a page of the host pool that begins inside another, or lies outside")
        return pages


class _Metrics:
    """Since SGLang last asked: pages and GB/s of each batch, in its own form. The last thousand batches."""

    _MOST = 1000

    def __init__(self) -> None:
        self._report = compat.storage_metrics()

    def stored(self, pages: int, size: int, seconds: float) -> None:
        self._add("backup", pages, size, seconds)

    def loaded(self, pages: int, size: int, seconds: float) -> None:
        self._add("prefetch", pages, size, seconds)

    def take(self) -> Any:
        report, self._report = self._report, compat.storage_metrics()
        return report

    def _add(self, what: str, pages: int, size: int, seconds: float) -> None:
        report = self._report
        if report is not None and pages and len(counts := getattr(report, f"{what}_pgs")) < self._MOST:
            counts.append(pages)
            getattr(report, f"{what}_bandwidth").append(size / 1e9 / max(seconds, 1e-9))


def pool_layout(pool: Any) -> KvLayout:
    """Where SGLang's host pool keeps its pages, as it says itself; LayoutError if that is not regular."""
    size = int(pool.page_size)
    pages = int(getattr(pool, "page_num", None) or pool.size // size)

    def regions(page: int) -> tuple[NDArray[np.int64], list[int]]:
        try:
            addresses, sizes = pool.get_page_buffer_meta(torch.arange(page * size, (page + 1) * size))
        except Exception as error:
            raise LayoutError(
                f"SGLang's host pool {type(pool).__name__} with layout {getattr(pool, 'layout', None)} does "
                f"not say where its pages lie ({error}): leave interface_v1 out of the extra config."
            ) from error
        return np.asarray(addresses, np.int64), [int(size) for size in sizes]

    first, sizes = regions(0)
    strides = regions(1)[0] - first if pages > 1 else np.asarray(sizes)
    last, last_sizes = regions(pages - 1)
    if (first + strides * (pages - 1) != last).any() or sizes != last_sizes:
        raise LayoutError(f"The pages of SGLang's host pool {type(pool).__name__} are not equally spaced.")
    views = [
        TensorView(f"region.{i}", int(first[i]), (pages, sizes[i]), (int(strides[i]), 1), 1)
        for i in range(len(sizes))
    ]
    return recognise(views, pages, sum(sizes))


def _refusal(config: Any) -> str | None:
    if getattr(config, "is_mla_model", False) and config.tp_size > 1:
        return (
            "SGLang lets only rank 0 store the KV of such a model, and KVBM's ranks don't share it (SGLang)"
        )
    if getattr(config, "should_split_heads", False):
        return "pages with split heads (tp_lcm_size) are not supported"
    if getattr(config, "dcp_size", 1) > 1:
        return "decode context parallelism is not supported"
    return None


def _place(config: Any) -> Place:
    sizes = [int(getattr(config, f"{name}_size", 1)) for name in ("pp", "attn_cp", "tp")]
    ranks = [int(getattr(config, f"{name}_rank", 0)) for name in ("pp", "attn_cp", "tp")]
    rank = (ranks[0] * sizes[1] + ranks[1]) * sizes[2] + ranks[2]
    return Place(rank, sizes[0] * sizes[1] * sizes[2], int(getattr(config, "dp_rank", 0)) or compat.replica())


def _bytes_of(page: torch.Tensor, size: int) -> NDArray[np.uint8]:
    """View of a flat page; LayoutError where it isn't one."""
    if page is None or page.nbytes != size or not page.is_contiguous():
        raise LayoutError(f"a page that does not have {size} bytes in a row")
    return page.view(torch.uint8).numpy()


def _first(count: int, of: int) -> list[bool]:
    return [True] * count + [False] * (of - count)
