"""A plugin of SGLang with which HiCache runs where the "device" is a CPU.

What SGLang's kernels do between device and host pool, indexing of torch does here. Tree, controller, host
pools, threads and layouts are SGLang's own.
"""

import ctypes
from typing import Any

import numpy as np
from torch import Tensor


def activate() -> None:
    """Called by SGLang in each of its processes."""
    from sglang.srt.mem_cache.pool_host import base, mha

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = 0  # 10 GB; a test's pool has one, where others run beside it
    for operation in _OPERATIONS:
        setattr(mha, operation.__name__, operation)
    pool: Any = mha.MHATokenToKVPoolHost
    if pool.__init__.__name__ != "unpinned":
        pool.__init__ = _unpinned(pool.__init__)


def _unpinned(original: Any) -> Any:
    """torch has no pinned memory without an accelerator."""

    def unpinned(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "pin_memory": False})

    return unpinned


# ---- io backend "direct": layers are (tokens, ...), page-first tensors (pages, layers, tokens, ...)


def transfer_kv_direct(
    src_layers: list[Tensor],
    dst_layers: list[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: list[Tensor],
    dst_ptrs: list[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[src_indices // page_size, layer_id, src_indices % page_size]


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: list[Tensor], dst_ptrs: list[Tensor], src_indices: Tensor, dst_indices: Tensor, page_size: int
) -> None:
    layers = len(src_ptrs) // len(dst_ptrs)
    for i, source in enumerate(src_ptrs):
        target = dst_ptrs[i // layers]
        target[dst_indices // page_size, i % layers, dst_indices % page_size] = source[src_indices]


# ---- io backend "kernel": `item_size` bytes a token and layer; page-first tensors are (tokens, layers, ...),
# and for a backup layers come as addresses


def transfer_kv_per_layer(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
) -> None:
    dst_k[dst_indices] = src_k[src_indices]
    dst_v[dst_indices] = src_v[src_indices]


def transfer_kv_per_layer_pf_lf(
    src_k: Tensor,
    dst_k: Tensor,
    src_v: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    item_size: int,
    src_layout_dim: int,
) -> None:
    dst_k[dst_indices] = src_k[src_indices, layer_id]
    dst_v[dst_indices] = src_v[src_indices, layer_id]


def transfer_kv_all_layer(
    src_k_layers: Tensor,
    dst_k_layers: Tensor,
    src_v_layers: Tensor,
    dst_v_layers: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    num_layers: int,
) -> None:
    from_rows, to_rows = src_indices.numpy(), dst_indices.numpy()
    for sources, targets in ((src_k_layers, dst_k_layers), (src_v_layers, dst_v_layers)):
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            _rows(target, to_rows, item_size)[to_rows] = _rows(source, from_rows, item_size)[from_rows]


def transfer_kv_all_layer_lf_pf(
    src_k_layers: Tensor,
    dst_k: Tensor,
    src_v_layers: Tensor,
    dst_v: Tensor,
    src_indices: Tensor,
    dst_indices: Tensor,
    item_size: int,
    dst_layout_dim: int,
    num_layers: int,
) -> None:
    from_rows, to_rows = src_indices.numpy(), dst_indices.numpy()
    for sources, target in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        tokens = _rows(target.data_ptr(), to_rows, dst_layout_dim)
        for layer, source in enumerate(sources.tolist()):
            place = tokens[:, layer * item_size : (layer + 1) * item_size]
            place[to_rows] = _rows(source, from_rows, item_size)[from_rows]


def _rows(address: int, rows: np.ndarray, size: int) -> np.ndarray:
    """Memory from `address` on as rows of `size` bytes, as far as the last of `rows`."""
    count = int(rows.max(initial=-1)) + 1
    return np.ctypeslib.as_array((ctypes.c_uint8 * (count * size)).from_address(address)).reshape(count, size)


_OPERATIONS = (
    *(transfer_kv_direct, transfer_kv_per_layer_direct_pf_lf, transfer_kv_all_layer_direct_lf_pf),
    *(transfer_kv_per_layer, transfer_kv_per_layer_pf_lf),
    *(transfer_kv_all_layer, transfer_kv_all_layer_lf_pf),
)
