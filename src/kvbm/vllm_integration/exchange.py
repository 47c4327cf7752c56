"""Whether a rank's records can have the form that other engines read."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from kvbm.runtime.exchange import Exchange, element_view, exchange_namespace, is_dense
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.identity import Geometry

_LAYER = re.compile(r"\.(\d+)\.")


def find_exchange(
    vllm_config: Any, kv_cache_config: Any, kv_caches: Mapping[str, Any], shape: Geometry, rank: int
) -> Exchange | str:
    """How a rank exchanges records, or why it can't."""
    if shape.stages:
        return "a stage of a pipeline has only some of the layers"
    groups = kv_cache_config.kv_cache_groups
    if len(groups) > 1 or type(groups[0].kv_cache_spec).__name__ != "FullAttentionSpec":
        return "only models with full attention in all layers have such records"
    model = vllm_config.model_config
    if getattr(model, "hf_overrides", None):
        return "the model's configuration is changed by hf_overrides"
    if vllm_config.speculative_config is not None:
        return "speculative decoding adds layers that other engines don't have"
    spec = groups[0].kv_cache_spec
    block = (spec.block_size, spec.num_kv_heads, spec.head_size)
    numbers = [_LAYER.search(name) for name in kv_caches]
    if not all(numbers) or sorted(order := [int(number[1]) for number in numbers if number]) != order:
        return "the order of the layers is not known"
    tensors = list(kv_caches.values())
    views: list[NDArray[Any]] | None = None
    if tensors[0].device.type == "cpu":
        views = []
        for name, tensor in kv_caches.items():
            pair = _cpu_views(tensor, compat.cpu_kernel(vllm_config, name), shape.num_device_blocks, block)
            if isinstance(pair, str):
                return pair
            views += pair
    elif not all(_is_token_major(tensor, shape.num_device_blocks, block) for tensor in tensors):
        return "its attention backend orders the elements of a block in another way"
    return Exchange(
        exchange_namespace(
            str(model.model),
            getattr(model, "revision", None),
            dtype=tensors[0].dtype,
            quantization=model.quantization,
            layers=len(tensors),
            block_shape=block,
            rank=rank,
            ranks=shape.ranks,
        ),
        views,
    )


def _cpu_views(
    tensor: torch.Tensor, kernel: str | None, num_blocks: int, block: tuple[int, int, int]
) -> list[NDArray[Any]] | str:
    """Keys and values of a layer as (blocks, tokens, heads, elements).

    Measured by storing known tokens (vLLM 0.32): a head's keys lie before its values, keys with the tokens
    innermost.
    """
    tokens, heads, size = block
    if kernel not in ("vec", "vec16"):
        return f"the CPU kernel {kernel!r} packs its keys"
    if tuple(tensor.shape) != (num_blocks, heads, tokens, 2 * size) or not tensor.is_contiguous():
        return f"a KV tensor has the unknown shape {tuple(tensor.shape)}"
    halves = element_view(tensor).reshape(num_blocks, heads, 2, -1)
    return [
        halves[:, :, 0].reshape(num_blocks, heads, size, tokens).transpose(0, 3, 1, 2),
        halves[:, :, 1].reshape(num_blocks, heads, tokens, size).transpose(0, 2, 1, 3),
    ]


def _is_token_major(tensor: torch.Tensor, num_blocks: int, block: tuple[int, int, int]) -> bool:
    """Whether a block's keys and values lie apart as (tokens, heads, elements): FlashAttention's NHD."""
    return (
        tuple(tensor.shape) in ((2, num_blocks, *block), (num_blocks, 2, *block))
        and is_dense(block, tensor.stride()[2:])
        and tensor.stride(0 if tensor.shape[0] == 2 else 1) >= torch.Size(block).numel()
    )
