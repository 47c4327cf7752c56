"""SGLang's radix tree with its HiCache controller, host pool and storage threads, without an engine.

Made by SGLang's own test kit. Only the copies between the "device" and the host pool are ours, see
`cpu_plugin`.
"""

import functools
import json
import unittest
from array import array
from dataclasses import dataclass
from typing import Any

import sglang_on_cpu
import torch
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.kits.unified_radix_cache.config import CacheConfig
from sglang.test.kits.unified_radix_cache.fixtures import build_fixture, drop_hicache_atexit_pin, match_prefix
from sglang.test.kits.unified_radix_cache.storage import UnifiedRadixCacheStorageFixtures

from kvbm.runtime.block_store import BlockStore

sglang_on_cpu.activate()

PAGE = 16
LAYERS = 2
Tokens = tuple[int, ...]


class _Kit(UnifiedRadixCacheStorageFixtures, unittest.TestCase):
    cfg = CacheConfig(page_size=PAGE, num_layers=LAYERS, kv_size=1024, max_context_len=1024)

    def runTest(self) -> None: ...


@dataclass(frozen=True)
class Pool:
    """How the host pool lies in memory, and by which of a backend's interfaces SGLang talks to it."""

    layout: str
    io: str
    zero_copy: bool

    def __str__(self) -> str:
        return f"{self.layout}-{'zero_copy' if self.zero_copy else 'generic'}"


PLAIN = Pool("page_first", "kernel", True)


def extra_config(pool: Pool, kvbm: dict[str, Any], **more: Any) -> str:
    interface = {"interface_v1": 1} if pool.zero_copy else {}
    return json.dumps(
        {
            "backend_name": "kvbm",
            "module_path": "kvbm.sglang_integration.hicache",
            "class_name": "KvbmStorage",
            "prefetch_threshold": PAGE,
            "kvbm": kvbm,
            **interface,
            **more,
        }
    )


class Tree:
    """One "engine": starts with an empty tree. `close` it."""

    def __init__(
        self,
        kvbm: dict[str, Any] | None,
        pool: Pool = PLAIN,
        settings: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """kvbm: settings, None for no backend. settings: of the engine. more: in the extra config, beside."""
        backend: dict[str, Any] = {}
        if kvbm is not None:
            backend["hicache_storage_backend"] = "dynamic"
            backend["hicache_storage_backend_extra_config"] = extra_config(pool, kvbm, **more)
        self._kit: Any = _Kit()
        self._pool = pool
        self._requests = 0
        ranks = get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
        ranks.__enter__()
        self._kit.addCleanup(ranks.__exit__, None, None, None)
        self.cache, self._allocator, self._requests_pool = build_fixture(self._kit.cfg)
        args = ServerArgs(
            page_size=PAGE,
            hicache_io_backend=pool.io,
            hicache_mem_layout=pool.layout,
            hicache_storage_prefetch_policy="wait_complete",
            **{"model_path": "dummy", **backend, **(settings or {})},
        )
        set_global_server_args_for_scheduler(args)
        self._kit.addCleanup(self.cache.release_host_resources)
        self.cache.init_hicache(args, self.cache.cache_init_params)
        self._kit.addCleanup(drop_hicache_atexit_pin, self.cache)
        self.cache.write_through_threshold = 1 << 30  # only what the test says
        self.cache.load_back_threshold = 0
        self._kv = self._kit._get_full_kv_pool(self._allocator)
        if kvbm is not None:
            self._attached()

    def attach(self, kvbm: dict[str, Any]) -> None:
        ok, message = self.try_attach(kvbm)
        assert ok, message
        self._attached()

    def try_attach(self, kvbm: dict[str, Any]) -> tuple[bool, str]:
        """Whether it could be attached, and what SGLang says."""
        return self.cache.attach_storage_backend(
            "dynamic", extra_config(self._pool, kvbm), "dummy", "wait_complete"
        )

    def _attached(self) -> None:
        # SGLang counts with a host pool that is larger than the device's.
        controller = self.cache.cache_controller
        controller.prefetch_capacity_limit = controller.mem_pool_host.size
        # What is stored before the disk tier is up does not get there.
        assert store_of(self.backend).wait_found(20)

    @property
    def backend(self) -> Any:
        return self.cache.cache_controller.storage_backend

    def store(self, tokens: Tokens) -> None:
        """Compute, and back up to the host pool and from there to the backend."""
        self._kit._insert(self.cache, self._allocator, self._requests_pool, list(tokens))
        leaf = match_prefix(self.cache, tokens).last_device_node
        indices = self.cache.path_device_indices(leaf)
        for buffer, computed in zip(self._buffers(), self._kv_of(tokens), strict=True):
            buffer[indices] = computed
        self._kit._backup_node(self.cache, leaf)
        if self.backend is not None:
            self._kit._flush_l3_backups(self.cache)

    def forget(self) -> None:
        """What `flush_cache` does; and all bytes of device and host pool are overwritten."""
        self.cache.reset()
        self._requests_pool.clear()
        self._allocator.clear()
        for buffer in (*self._buffers(), self.cache.cache_controller.mem_pool_host.kv_buffer):
            buffer.fill_(-1)

    def load(self, tokens: Tokens) -> int:
        """How many leading pages come from the backend, through the host pool to the device, as computed."""
        self._requests += 1
        request = CacheRequestHandle(f"request-{self._requests}", 0)
        self.cache.prefetch_from_storage(
            request, self.cache.root_node_handle(), array("q", tokens), None, None
        )
        self._kit._run_prefetch_to_completion(self.cache, request)
        match = match_prefix(self.cache, tokens)
        assert match.device_prefix_len == 0, "was not forgotten"
        if not match.host_hit_length:
            return 0
        self._kit._load_back_node(self.cache, match.best_match_node)
        indices = self.cache.path_device_indices(match_prefix(self.cache, tokens).last_device_node)
        for buffer, computed in zip(self._buffers(), self._kv_of(tokens), strict=True):
            assert torch.equal(buffer[indices], computed[: len(indices)])
        assert len(indices) % PAGE == 0
        return len(indices) // PAGE

    def bytes_of(self, tokens: Tokens, page: int) -> bytes:
        """Those of a page's first token in the first layer: they lie in a row in every layout."""
        kv = self._kv_of(tokens)[0][page * PAGE]
        return kv.contiguous().view(torch.uint8).numpy().tobytes()

    def load_anew(self, tokens: Tokens) -> int:
        self.forget()
        return self.load(tokens)

    def _buffers(self) -> list[torch.Tensor]:
        return [*self._kv.k_buffer, *self._kv.v_buffer]

    def _kv_of(self, tokens: Tokens) -> list[torch.Tensor]:
        """Keys of all layers, then values."""
        shape = 2 * LAYERS, PAGE, *self._kv.k_buffer[0].shape[1:]
        pages = [_page(tokens[: end + PAGE], shape) for end in range(0, len(tokens), PAGE)]
        return list(torch.cat(pages, dim=1).to(self._kv.k_buffer[0].dtype))

    def close(self) -> None:
        self.cache.shutdown()
        self._kit.doCleanups()

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def _page(prefix: Tokens, shape: tuple[int, ...]) -> torch.Tensor:
    """What "the model" computes for the last page: it depends on all tokens up to there."""
    generator = torch.Generator().manual_seed(hash(prefix))
    return torch.randn(shape, generator=generator)


def tokens(first: int, pages: int) -> Tokens:
    return tuple(range(first, first + pages * PAGE))


def store_of(backend: Any) -> BlockStore:
    """Below SGLang's injector of faults, if that is there."""
    return getattr(backend, "_backend", backend)._store
