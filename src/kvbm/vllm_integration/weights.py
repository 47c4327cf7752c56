"""What tells the bytes of one engine's records from another's, beyond the namespace: for records that stay.

A host tier lives and dies with its engine. A disk outlives it, and the next engine may have other weights
under the same name, another kernel or another CPU. Whatever changes the bytes must change the digest; a
change that leaves them alone costs a cold start.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import vllm

from kvbm.logic.hashing import namespace_digest
from kvbm.runtime.fingerprint import device_fingerprint, fingerprint
from kvbm.storage.split import Split
from kvbm.transfer.layout import block_dimension
from kvbm.vllm_integration.identity import Geometry, engine_namespace


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """dimensions: of each KV tensor by name, the one that counts the heads of the rank."""

    split: Split
    dimensions: Mapping[str, int]


def record_namespace(
    vllm_config: Any,
    kv_cache_config: Any,
    shape: Geometry,
    kv_caches: Mapping[str, Any],
    heads: HeadSplit | None = None,
) -> bytes:
    """Digest of all that the bytes of a rank's records depend on, 16 bytes.

    heads: where given, the same for every number of ranks.
    """
    model = vllm_config.model_config
    return namespace_digest(
        {
            "namespace": engine_namespace(vllm_config, kv_cache_config, shape).hex(),
            "weights": fingerprint(str(model.model), getattr(model, "revision", None)),
            "load_format": str(vllm_config.load_config.load_format),
            "seed": model.seed,
            "vllm": vllm.__version__,
            "device": device_fingerprint(next(iter(kv_caches.values())).device),
            "backends": _backends(vllm_config, kv_caches),
            "scales": scales_of(vllm_config, kv_caches),
            "layers": list(kv_caches),  # those of a stage, of a pipeline
            "tensors": [_tensor(name, tensor, shape, heads) for name, tensor in kv_caches.items()],
            "split": msgspec.to_builtins(heads.split) if heads else None,
        }
    )


def _backends(vllm_config: Any, kv_caches: Mapping[str, Any]) -> list[str]:
    layers = vllm_config.compilation_config.static_forward_context
    names = {
        layers[name].get_attn_backend().full_cls_name()
        for name in kv_caches
        if hasattr(layers.get(name), "get_attn_backend")
    }
    return sorted(map(str, names))


def scales_of(vllm_config: Any, kv_caches: Mapping[str, Any]) -> list[list[float]]:
    """By which the layers' keys and values were divided before they were rounded to eight bits."""
    layers = vllm_config.compilation_config.static_forward_context
    scales = (
        getattr(layers.get(name), which, None) for name in kv_caches for which in ("_k_scale", "_v_scale")
    )
    return [scale.flatten().tolist() for scale in scales if scale is not None]


def _tensor(name: str, tensor: torch.Tensor, shape: Geometry, heads: HeadSplit | None) -> list[object]:
    block_dim = block_dimension(tuple(tensor.shape), shape.num_device_blocks, name)
    inner = [dim for dim in range(tensor.dim()) if dim != block_dim]
    parts = tensor.shape[block_dim] // shape.num_device_blocks
    sizes = list(tensor.shape)
    if heads is not None:
        sizes[heads.dimensions[name]] = heads.split.heads
    # Of strides only their order: they may depend on the number of blocks.
    return [str(tensor.dtype), block_dim, parts, [sizes[dim] for dim in inner], order_of(tensor, inner)]


def order_of(tensor: torch.Tensor, dims: Iterable[int]) -> list[int]:
    """The dimensions from the outermost in memory to the innermost. One of size 1 lies inside its equals."""
    return sorted(dims, key=lambda dim: (-tensor.stride(dim), tensor.shape[dim] == 1, dim))
