"""Where the bytes of a block lie in an engine's KV tensors, and how a record holds them.

A block's bytes are scattered over one tensor per layer, in each of which the block is one or several dense
pieces. A record is all pieces of a block in one contiguous run, layer after layer. Bytes inside a piece are
opaque: engines order heads, tokens, K and V as their kernels like (CPU attention even packs K for the
instruction set), so records are exchanged only between equal layouts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from kvbm.errors import LayoutError


@dataclass(frozen=True, slots=True)
class TensorView:
    """One KV tensor of an engine: address in bytes, shape, strides in bytes, bytes per element."""

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int


def tensor_view(name: str, tensor: Any) -> TensorView:
    """View of a torch tensor or numpy array; both are told by their methods, so that neither is imported."""
    if hasattr(tensor, "data_ptr"):
        itemsize = tensor.element_size()
        strides = tuple(stride * itemsize for stride in tensor.stride())
        return TensorView(name, tensor.data_ptr(), tuple(tensor.shape), strides, itemsize)
    if isinstance(tensor, np.ndarray):
        return TensorView(name, tensor.ctypes.data, tensor.shape, tensor.strides, tensor.itemsize)
    raise LayoutError(f"KV cache {name} is a {type(tensor).__name__}, not a tensor: not cached.")


@dataclass(frozen=True, slots=True)
class Run:
    """Equally spaced pieces of every block.

    Piece p of block b: `piece_bytes` at address + b * block_stride + p * piece_stride, and in the record at
    record_offset + p * piece_bytes.
    """

    address: int
    block_stride: int
    pieces: int
    piece_stride: int
    piece_bytes: int
    record_offset: int


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The pieces of `num_blocks` blocks."""

    num_blocks: int
    record_bytes: int
    runs: tuple[Run, ...]
    # Of each tensor by name: its first piece, and the one after its last.
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def recognise(tensors: Iterable[TensorView], num_blocks: int, record_bytes: int) -> KvLayout:
    """The layout of an engine's tensors, or LayoutError: what isn't understood is never guessed.

    record_bytes: what the engine says a block takes over all layers; the pieces found must add up to it.
    Tensors that are the same memory (layers that share their KV, or groups of layers that use the same blocks
    by turns) count once.
    """
    memories: dict[int, list[tuple[int, int, int]]] = {}  # pieces as address, block stride, bytes
    names: dict[str, int] = {}
    for tensor in tensors:
        names[tensor.name] = tensor.address
        own = _pieces(tensor, num_blocks)
        memories[tensor.address] = _larger(memories.get(tensor.address, own), own, tensor.name)
    pieces: list[tuple[int, int, int]] = []
    ranges: dict[int, tuple[int, int]] = {}
    for address, own in memories.items():
        ranges[address] = len(pieces), len(pieces) + len(own)
        pieces += own
    layers = {name: ranges[address] for name, address in names.items()}
    found = sum(size for _, _, size in pieces)
    if found != record_bytes:
        raise LayoutError(
            f"The engine's KV tensors hold {found} bytes a block, but it announced {record_bytes}: this "
            f"layout is not known and is not cached. Please report it with the engine's version and model."
        )
    return KvLayout(num_blocks, record_bytes, tuple(_merge(pieces)), layers)


def _larger(
    one: list[tuple[int, int, int]], other: list[tuple[int, int, int]], name: str
) -> list[tuple[int, int, int]]:
    """Of the pieces of two tensors at the same address those that cover the others'."""
    if one == other:
        return one
    if len(one) == len(other) == 1 and one[0][1] == other[0][1]:
        return max(one, other, key=lambda pieces: pieces[0][2])
    raise LayoutError(
        f"KV tensor {name} shares its memory with another in a way that is not known: not cached."
    )


def _pieces(tensor: TensorView, num_blocks: int) -> list[tuple[int, int, int]]:
    block_dim = block_dimension(tensor.shape, num_blocks, tensor.name)
    # Kernels may work on a fraction of a block: the dimension then counts several to each block.
    parts = tensor.shape[block_dim] // num_blocks
    part_stride = tensor.strides[block_dim]
    inner = [(part_stride, parts)] if parts > 1 else []
    inner += [
        (stride, size)
        for dim, (stride, size) in enumerate(zip(tensor.strides, tensor.shape, strict=True))
        if dim != block_dim and size > 1
    ]
    inner.sort()
    block_stride = part_stride * parts
    extent = tensor.itemsize
    for stride, size in sorted([(block_stride, num_blocks), *inner]):
        if stride < extent:
            raise LayoutError(
                f"KV tensor {tensor.name} of shape {tensor.shape} and strides {tensor.strides} bytes "
                f"overlaps itself: this layout is not known and is not cached."
            )
        extent += stride * (size - 1)
    dense = tensor.itemsize
    while inner and inner[0][0] == dense:
        dense *= inner.pop(0)[1]
    outermost_first = inner[::-1]
    return [
        (
            tensor.address + sum(i * stride for i, (stride, _) in zip(index, outermost_first, strict=True)),
            block_stride,
            dense,
        )
        for index in product(*(range(size) for _, size in outermost_first))
    ]


def block_dimension(shape: tuple[int, ...], num_blocks: int, name: str) -> int:
    """The dimension of a tensor that counts blocks, or equal parts of them."""
    # Engines put blocks first, or second behind a K and V dimension of 2.
    if shape and shape[0] and shape[0] % num_blocks == 0:
        return 0
    if len(shape) > 1 and shape[0] == 2 and shape[1] and shape[1] % num_blocks == 0:
        return 1
    raise LayoutError(
        f"KV tensor {name} of shape {shape} has no dimension of {num_blocks} blocks, or parts "
        f"of them, where KVBM expects it: this layout is not known and is not cached."
    )


def _merge(pieces: list[tuple[int, int, int]]) -> Iterable[Run]:
    """Join equally spaced neighbours: fewer descriptors for a copy engine to build."""
    offset = 0
    start = 0
    while start < len(pieces):
        address, block_stride, size = pieces[start]
        end = start + 1
        spacing = pieces[end][0] - address if end < len(pieces) else 0
        while (
            spacing >= size
            and end < len(pieces)
            and pieces[end][1:] == (block_stride, size)
            and pieces[end][0] == pieces[end - 1][0] + spacing
        ):
            end += 1
        count = end - start
        yield Run(address, block_stride, count, spacing if count > 1 else size, size, offset)
        offset += count * size
        start = end
