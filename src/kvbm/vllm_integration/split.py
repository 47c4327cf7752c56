"""Whether a rank's records can be made of those that another number of tensor-parallel ranks has stored."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch

from kvbm.storage.split import Part, Split
from kvbm.transfer.layout import block_dimension
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.identity import Geometry
from kvbm.vllm_integration.weights import HeadSplit, order_of, scales_of

# All layers of these hold nothing but keys and values, head by head.
_KINDS = ("FullAttentionSpec", "SlidingWindowSpec")


def find_split(
    vllm_config: Any, kv_cache_config: Any, shape: Geometry, kv_caches: Mapping[str, Any]
) -> HeadSplit | str:
    """How the heads are shared out, or why records stay with the number of ranks that stored them."""
    specs = {
        name: group.kv_cache_spec for group in kv_cache_config.kv_cache_groups for name in group.layer_names
    }
    kinds = {type(spec).__name__ for spec in specs.values()}
    if shape.shared or kinds - set(_KINDS):
        return f"its blocks ({', '.join(sorted(kinds))}) are not shared out by KV heads"
    if vllm_config.parallel_config.tensor_parallel_size != shape.ranks:
        return "its ranks differ in more than their KV heads"
    if vllm_config.speculative_config is not None:
        return "a draft model's KV heads are shared out in a way of their own"
    if any(len(scales) > 1 for scales in scales_of(vllm_config, kv_caches)):
        return "its heads have scales of their own"
    heads = vllm_config.model_config.get_total_num_kv_heads()
    if {spec.num_kv_heads for spec in specs.values()} != {max(1, heads // shape.ranks)}:
        return "its layers have different numbers of KV heads"
    parts: dict[int, Part] = {}  # by address: layers may share their memory, and a record has it once
    dimensions: dict[str, int] = {}
    for name, tensor in kv_caches.items():
        spec = specs.get(name)
        dim = compat.head_dimension(vllm_config, name, tensor, spec) if spec is not None else None
        if spec is None or dim is None or tensor.shape[dim] != spec.num_kv_heads:
            return f"which dimension of the KV tensor {name} counts the heads is not known"
        part = _part(name, tensor, dim, shape)
        if parts.setdefault(tensor.data_ptr(), part) != part:
            return f"the KV tensor {name} shares its memory with one of another form"
        dimensions[name] = dim
    split = Split(heads, _joined(parts.values()))
    if not split.allows(shape.ranks) or split.record_bytes(shape.ranks) != shape.record_bytes:
        return "its blocks hold more than the layers' heads"
    return HeadSplit(split, dimensions)


def _part(name: str, tensor: torch.Tensor, head_dim: int, shape: Geometry) -> Part:
    """A block of this tensor, whose pieces a record holds in the order in which they lie on the device."""
    block_dim = block_dimension(tuple(tensor.shape), shape.num_device_blocks, name)
    sizes = list(tensor.shape)
    sizes[block_dim] //= shape.num_device_blocks  # kernels may work on a fraction of a block
    dims = order_of(tensor, range(tensor.dim()))
    at = dims.index(head_dim)
    rows, row = (prod(sizes[dim] for dim in part) for part in (dims[:at], dims[at + 1 :]))
    return Part(rows, row * tensor.element_size())


def _joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Layers of one form are one part: so a record is cut in a few strided copies."""
    joined: list[Part] = []
    for part in parts:
        if joined and joined[-1].head_bytes == part.head_bytes:
            part = Part(joined.pop().rows + part.rows, part.head_bytes)
        joined.append(part)
    return tuple(joined)
