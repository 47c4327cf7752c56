"""Recognising where a block's bytes lie: every layout that we know, and none that we don't."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.errors import LayoutError
from kvbm.transfer.layout import KvLayout, TensorView, recognise, tensor_view

BLOCKS = 6


def view(
    shape: tuple[int, ...], strides: tuple[int, ...] | None = None, *, address: int = 0, itemsize: int = 2
) -> TensorView:
    """Strides in elements; those of a dense tensor unless given."""
    if strides is None:
        strides = tuple(int(np.prod(shape[dim + 1 :])) for dim in range(len(shape)))
    return TensorView("layer", address, shape, tuple(stride * itemsize for stride in strides), itemsize)


def pieces(layout: KvLayout, block: int) -> Iterator[tuple[int, int, int]]:
    """Address, length and place in the record of each of a block's pieces."""
    for run in layout.runs:
        for p in range(run.pieces):
            yield (
                run.address + block * run.block_stride + p * run.piece_stride,
                run.piece_bytes,
                run.record_offset + p * run.piece_bytes,
            )


def addresses(tensor: TensorView, block_dim: int, num_blocks: int, block: int) -> set[int]:
    """Every byte of a block, the slow way."""
    parts = tensor.shape[block_dim] // num_blocks
    ranges = [
        range(block * parts, (block + 1) * parts) if dim == block_dim else range(size)
        for dim, size in enumerate(tensor.shape)
    ]
    return {
        tensor.address + sum(i * s for i, s in zip(index, tensor.strides, strict=True)) + byte
        for index in product(*ranges)
        for byte in range(tensor.itemsize)
    }


def check(layout: KvLayout, tensors: list[tuple[TensorView, int]]) -> None:
    """Each block's pieces are exactly its bytes, and fill its record without gap or overlap."""
    for block in range(layout.num_blocks):
        expected: set[int] = set()
        for tensor, block_dim in tensors:
            expected |= addresses(tensor, block_dim, layout.num_blocks, block)
        found = [byte for at, size, _ in pieces(layout, block) for byte in range(at, at + size)]
        assert len(found) == len(set(found)) == layout.record_bytes
        assert set(found) == expected
        places = sorted((offset, size) for _, size, offset in pieces(layout, block))
        assert [offset for offset, _ in places] == [
            sum(size for _, size in places[:i]) for i in range(len(places))
        ]


# ---- layouts that we know ----


def test_vllm_on_cpu() -> None:
    """One storage of (blocks, heads, tokens, 2 × dim) a layer; the tensor may be a permuted view of it."""
    heads, tokens, dim = 2, 4, 3
    layers = [view((BLOCKS, heads, tokens, 2 * dim), address=layer * 10_000) for layer in range(3)]
    record = 3 * heads * tokens * 2 * dim * 2
    layout = recognise(layers, BLOCKS, record)
    check(layout, [(layer, 0) for layer in layers])
    assert [run.piece_bytes for run in layout.runs] == [record // 3]
    assert layout.runs[0].pieces == 3  # equally spaced layers join


def test_vllm_on_gpu() -> None:
    """Shape (blocks, heads, tokens, 2 × dim) with heads inside tokens: still one dense piece a layer."""
    heads, tokens, dim = 8, 16, 4
    tensor = view((BLOCKS, heads, tokens, dim), (heads * tokens * dim, dim, heads * dim, 1))
    layout = recognise([tensor], BLOCKS, heads * tokens * dim * 2)
    check(layout, [(tensor, 0)])
    assert len(layout.runs) == layout.runs[0].pieces == 1


def test_keys_and_values_apart() -> None:
    tensors = [view((2, BLOCKS, 4, 2, 3), address=layer * 5000) for layer in range(2)]
    layout = recognise(tensors, BLOCKS, 2 * 2 * 4 * 2 * 3 * 2)
    check(layout, [(tensor, 1) for tensor in tensors])
    assert sum(run.pieces for run in layout.runs) == 4


def test_keys_and_values_side_by_side_in_a_block() -> None:
    """(blocks, 2, …): the block is one piece."""
    tensor = view((BLOCKS, 2, 4, 2, 3))
    layout = recognise([tensor], BLOCKS, 2 * 4 * 2 * 3 * 2)
    check(layout, [(tensor, 0)])
    assert layout.runs[0].pieces == 1


def test_keys_and_values_of_one_shape_but_interleaved_blocks() -> None:
    """(2, blocks, …) as a view of (blocks, 2, …)."""
    tensor = view((2, BLOCKS, 24), (24, 48, 1))
    layout = recognise([tensor], BLOCKS, 2 * 24 * 2)
    check(layout, [(tensor, 1)])


def test_block_major_over_all_layers() -> None:
    """A block's layers lie side by side: each layer is a view with the stride of all of them."""
    layers, page = 4, 30
    tensors = [
        view((BLOCKS, 5, 6), (layers * page, 6, 1), address=1000 + layer * page * 2)
        for layer in range(layers)
    ]
    layout = recognise(tensors, BLOCKS, layers * page * 2)
    check(layout, [(tensor, 0) for tensor in tensors])
    assert len(layout.runs) == 1


@pytest.mark.parametrize("shape", [(4 * BLOCKS, 3, 5), (4 * BLOCKS,)])
def test_kernels_with_smaller_blocks(shape: tuple[int, ...]) -> None:
    tensor = view(shape)
    layout = recognise([tensor], BLOCKS, int(np.prod(shape)) * 2 // BLOCKS)
    check(layout, [(tensor, 0)])
    assert layout.runs[0].block_stride == tensor.strides[0] * 4
    assert layout.runs[0].pieces == 1


def test_kernels_with_smaller_blocks_and_keys_and_values_apart() -> None:
    tensor = view((2, 4 * BLOCKS, 3, 5))
    layout = recognise([tensor], BLOCKS, 2 * 4 * 3 * 5 * 2)
    check(layout, [(tensor, 1)])
    assert sum(run.pieces for run in layout.runs) == 2


def test_small_blocks_with_a_gap_between_them() -> None:
    tensor = view((2 * BLOCKS, 10), (16, 1))
    layout = recognise([tensor], BLOCKS, 2 * 10 * 2)
    check(layout, [(tensor, 0)])


def test_layers_that_differ() -> None:
    """Other sizes, other element types, in any order of addresses."""
    tensors = [
        view((BLOCKS, 8), address=9000, itemsize=1),
        view((BLOCKS, 3, 4), address=1000),
        view((2, BLOCKS, 5), address=3000, itemsize=4),
        view((BLOCKS, 3, 4), address=500),
    ]
    layout = recognise(tensors, BLOCKS, 8 + 24 + 40 + 24)
    check(layout, [(tensors[0], 0), (tensors[1], 0), (tensors[2], 1), (tensors[3], 0)])


def test_dimensions_of_one_do_not_matter() -> None:
    tensor = view((BLOCKS, 1, 4, 1, 3), (12, 999, 3, 0, 1))
    layout = recognise([tensor], BLOCKS, 24)
    check(layout, [(replace(tensor, strides=(24, 0, 6, 0, 2)), 0)])


def test_memory_that_layers_share_counts_once() -> None:
    shared, own = view((BLOCKS, 12), address=100), view((BLOCKS, 12), address=5000)
    layout = recognise([shared, own, shared, replace(own, name="again")], BLOCKS, 48)
    check(layout, [(shared, 0), (own, 0)])


def test_one_block() -> None:
    tensor = view((1, 3, 4))
    check(recognise([tensor], 1, 24), [(tensor, 0)])


def test_numpy_arrays_describe_themselves() -> None:
    array = np.zeros((BLOCKS, 4, 6), np.float16)[:, ::2]
    tensor = tensor_view("x", array)
    assert tensor == TensorView("x", array.ctypes.data, (BLOCKS, 2, 6), (48, 24, 2), 2)
    with pytest.raises(LayoutError, match="list"):
        tensor_view("x", [array])


# ---- what is refused ----


def test_bytes_that_do_not_add_up() -> None:
    """Padded pages: what the engine announced holds more than the tensors show."""
    tensor = view((BLOCKS, 10), (16, 1))
    with pytest.raises(LayoutError, match="20 bytes a block, but it announced 32"):
        recognise([tensor], BLOCKS, 32)
    recognise([tensor], BLOCKS, 20)
    with pytest.raises(LayoutError):
        recognise([], BLOCKS, 32)
    with pytest.raises(LayoutError):
        recognise([view((BLOCKS, 16)), view((BLOCKS, 16), address=64)], BLOCKS, 32)


@pytest.mark.parametrize(
    "shape", [(), (0,), (BLOCKS + 1, 4), (3, BLOCKS, 4), (2, BLOCKS + 1, 4), (0, 4), (2, 0, 4), (2,)]
)
def test_no_dimension_of_blocks(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="has no dimension of 6 blocks"):
        recognise([view(shape)], BLOCKS, 8)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((BLOCKS, 4), (2, 1)),  # blocks overlap
        ((BLOCKS, 4), (0, 1)),
        ((BLOCKS, 4, 3), (12, 2, 1)),  # rows overlap
        ((BLOCKS, 4, 3), (12, 0, 1)),  # expanded
        ((BLOCKS, 4), (4, 0)),
        ((BLOCKS, 2, 3), (5, 4, 1)),  # the second row runs into the next block
        ((BLOCKS, 2, 3, 2), (100, 5, 4, 1)),  # rows of two dimensions cross
        ((2, BLOCKS, 4), (8, 4, 1)),  # values begin where the third block's keys are
    ],
)
def test_memory_that_overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError):
        recognise([view(shape, strides)], BLOCKS, int(np.prod(shape)) * 2 // BLOCKS)


@settings(max_examples=300, deadline=None, print_blob=True, derandomize=False)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    strides=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    blocks=st.sampled_from([3, 5]),
    parts=st.integers(1, 2),
    apart=st.booleans(),
)
def test_any_strides_are_understood_or_refused(
    shape: list[int], strides: list[int], blocks: int, parts: int, apart: bool
) -> None:
    full = (2, blocks * parts, *shape) if apart else (blocks * parts, *shape)
    tensor = view(full, (40, *strides)[: len(full)] if apart else tuple(strides[: len(full)]), itemsize=1)
    try:
        layout = recognise([tensor], blocks, int(np.prod(full)) // blocks)
    except LayoutError:
        return
    check(layout, [(tensor, int(apart))])
    every = [byte for block in range(blocks) for byte in addresses(tensor, int(apart), blocks, block)]
    assert len(every) == len(set(every)), "blocks share bytes"


@settings(max_examples=100, deadline=None, print_blob=True, derandomize=False)
@given(
    order=st.permutations(range(3)),
    shape=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    pad=st.integers(0, 3),
)
def test_every_order_of_dimensions_is_understood(order: list[int], shape: list[int], pad: int) -> None:
    """Whatever order a kernel keeps heads, tokens and values in, and with rows that are padded."""
    strides = [0, 0, 0]
    step = 1
    for dim in order:
        strides[dim] = step
        step = step * shape[dim] + pad
    tensor = view((BLOCKS, *shape), (step, *strides))
    check(recognise([tensor], BLOCKS, int(np.prod(shape)) * 2), [(tensor, 0)])
