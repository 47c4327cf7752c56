"""Pages in the form that other engines read: see kvbm.runtime.exchange."""

from collections.abc import Sequence
from typing import Any

import torch

from kvbm.runtime.exchange import Exchange, element_view, exchange_namespace
from kvbm.sglang_integration import compat
from kvbm.sglang_integration.identity import Place

# Of a host pool's buffer with its slots cut into pages: which dimensions are page, layer, keys or values,
# token, head and element.
_ORDER = {
    "layer_first": (2, 1, 0, 3, 4, 5),
    "page_first": (1, 3, 0, 2, 4, 5),
    "page_first_direct": (1, 2, 0, 3, 4, 5),
    "page_head": (1, 4, 0, 3, 2, 5),
}


def page_namespace(dtype: torch.dtype, layers: int, block_shape: Sequence[int], place: Place) -> bytes | None:
    """Namespace of exchanged pages; None where the engine's settings make them unlike others'."""
    args = compat.server_args()
    overrides = getattr(args, "json_model_override_args", None)
    if args is None or overrides not in (None, "", "{}") or getattr(args, "speculative_algorithm", None):
        return None
    return exchange_namespace(
        str(args.model_path),
        getattr(args, "revision", None),
        dtype=dtype,
        quantization=getattr(args, "quantization", None),
        layers=layers,
        block_shape=block_shape,
        rank=place.rank,
        ranks=place.ranks,
    )


def pool_exchange(pool: Any, place: Place) -> Exchange | None:
    """How the pages of SGLang's host pool are exchanged; None where they can't be."""
    order = _ORDER.get(str(getattr(pool, "layout", None)))
    if order is None or type(pool).__name__ != "MHATokenToKVPoolHost":
        return None
    buffer, size = pool.kv_buffer, int(pool.page_size)
    if pool.layout in ("layer_first", "page_first"):
        slots = 2 if pool.layout == "layer_first" else 1
        buffer = buffer.unflatten(slots, (-1, size))
    heads, elements = int(pool.head_num), int(pool.head_dim)
    view = element_view(buffer).transpose(order)
    if view.shape[1:] != (pool.layer_num, 2, size, heads, elements):
        return None
    namespace = page_namespace(buffer.dtype, int(pool.layer_num), (size, heads, elements), place)
    return Exchange(namespace, [view]) if namespace else None
