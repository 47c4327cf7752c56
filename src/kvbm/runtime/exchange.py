"""Records that do not depend on the engine: where they may be exchanged, and their form.

A record is all layers one after the other, of each its keys and then its values, as (tokens, heads, elements
of a head). An engine whose blocks have another order copies element by element (CPU only).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvbm.logic.hashing import namespace_digest
from kvbm.runtime.fingerprint import fingerprint

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Exchange:
    """namespace: digest, 16 bytes, the same in every engine that has these records.

    views: see `CpuCopyEngine`; None where the engine's own records have that form.
    """

    namespace: bytes
    views: list[NDArray[Any]] | None = None


def exchange_namespace(
    model: str,
    revision: str | None,
    *,
    dtype: torch.dtype,
    quantization: str | None,
    layers: int,
    block_shape: Sequence[int],
    rank: int,
    ranks: int,
) -> bytes:
    """block_shape: tokens, KV heads of the rank, elements of a head. dtype: of the KV."""
    config = Path(model) / "config.json"
    return namespace_digest(
        {
            "exchange": "layers, keys and values, tokens, heads, elements",
            "weights": fingerprint(model, revision),
            "config": blake2b(config.read_bytes()).hexdigest() if config.is_file() else None,
            "dtype": str(dtype),
            "quantization": quantization,
            "layers": layers,
            "block": list(block_shape),
            "rank": [rank, ranks],
        }
    )


def element_view(tensor: torch.Tensor) -> NDArray[Any]:
    """A CPU tensor's memory, of whatever type, as numpy integers of the same size."""
    return tensor.view(_WORDS[tensor.element_size()]).numpy()


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a block of these inner dimensions lies in one piece, in the order of its dimensions."""
    expected = np.cumprod([1, *reversed(shape[1:])])[::-1]
    return all(
        size == 1 or stride == want for size, stride, want in zip(shape, strides, expected, strict=True)
    )
