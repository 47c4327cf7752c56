"""The layout of an engine's KV tensors, put to the proof before anything is cached.

`recognise` concludes from shapes and strides where a block lies. Here the engine's own view of its tensors
has the last word: bytes written through it into some blocks must arrive, by the copy path in use, in other
blocks of every tensor, and nowhere else.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from kvbm.errors import LayoutError
from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CopyEngine
from kvbm.transfer.layout import KvLayout, block_dimension

_MOST_BLOCKS = 3


def prove(kv_caches: Mapping[str, Any], layout: KvLayout, engine: CopyEngine, arena: HostArena) -> None:
    """Raise LayoutError unless a few blocks survive the round trip bit by bit. Their contents are restored.

    Called before the engine computes anything: uses the first records of `arena`.
    """
    ready = arena.num_slots if engine.ready_slots is None else engine.ready_slots
    count = min(_MOST_BLOCKS, layout.num_blocks // 2, ready)
    if not count:
        return
    tensors = [_by_block(name, tensor, layout.num_blocks) for name, tensor in kv_caches.items()]
    chosen = np.unique(np.linspace(0, layout.num_blocks - 1, 2 * count).astype(np.int64))
    source, target = chosen[::2][:count], chosen[1::2][:count]
    # The neighbours show whether a copy reaches beyond its blocks.
    watched = np.unique(np.clip(np.concatenate([chosen, chosen - 1, chosen + 1]), 0, layout.num_blocks - 1))
    before = [tensor[watched].clone() for tensor in tensors]
    slots = np.arange(count)[::-1].copy()
    rng = np.random.default_rng(0)
    try:
        for tensor in tensors:
            bits = rng.integers(0, 256, (count, *tensor.shape[1:]), np.uint8)
            tensor[source] = torch.from_numpy(bits).to(tensor.device)
        expected = [tensor[watched].clone() for tensor in tensors]
        for tensor, wanted in zip(tensors, expected, strict=True):
            wanted[np.searchsorted(watched, target)] = tensor[source]
        engine.offload(source, slots, engine.fence())
        engine.onboard(target, slots, engine.fence())
        wrong = [
            name
            for name, tensor, wanted in zip(kv_caches, tensors, expected, strict=True)
            if not torch.equal(tensor[watched], wanted)
        ]
    finally:
        for tensor, old in zip(tensors, before, strict=True):
            tensor[watched] = old
    if wrong:
        raise LayoutError(
            f"Blocks of {len(wrong)} KV tensors, first {wrong[0]}, did not survive a trial copy: this layout "
            f"is not known and is not cached. Please report it with the engine's version and model."
        )


def _by_block(name: str, tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """View of a tensor's bytes, blocks (or their parts, joined) first."""
    try:
        dimension = block_dimension(tuple(tensor.shape), num_blocks, name)
        view = tensor.view(torch.uint8).unflatten(dimension, (num_blocks, -1))
    except RuntimeError as error:
        raise LayoutError(f"KV tensor {name} can't be viewed as bytes: {error}. It is not cached.") from error
    return view.movedim(dimension, 0)
