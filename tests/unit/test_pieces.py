"""Descriptors of copies, executed with memcpy: bit-exact for every layout, and as few as can be."""

import ctypes
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CpuCopyEngine
from kvbm.transfer.layout import KvLayout, Run, recognise, tensor_view
from kvbm.transfer.pieces import Addresses, PieceTable, block_copies, record_copies

BLOCKS, SLOTS = 6, 9
UNUSED = 0xEE

Copies = tuple[Addresses, Addresses, Addresses]


@dataclass
class Cache:
    memory: np.ndarray
    tensors: list[np.ndarray]
    block_dim: int = 0
    layout: KvLayout = field(init=False)

    def __post_init__(self) -> None:
        views = [tensor_view(str(i), tensor) for i, tensor in enumerate(self.tensors)]
        self.layout = recognise(views, BLOCKS, sum(tensor.nbytes for tensor in self.tensors) // BLOCKS)
        self.memory[:] = np.random.default_rng(7).integers(0, 256, len(self.memory))

    def block(self, number: int) -> list[np.ndarray]:
        """Views of the block in each tensor, found by indexing."""
        return [tensor[number] if self.block_dim == 0 else tensor[:, number] for tensor in self.tensors]


def cache(layout: str) -> Cache:
    memory = np.zeros(1_500_000, np.uint8)

    def tensor(
        shape: tuple[int, ...], strides: tuple[int, ...], offset: int, dtype: str = "u2"
    ) -> np.ndarray:
        base = memory[64 + offset :][: (len(memory) - 64 - offset) // 8 * 8].view(dtype)
        return as_strided(base, shape, [base.itemsize * stride for stride in strides])

    if layout == "packed":  # vLLM's FlashAttention: keys and values side by side, heads inside tokens
        page = 8 * 16 * 256
        return Cache(
            memory, [tensor((BLOCKS, 8, 16, 256), (page, 256, 8 * 256, 1), i * 420_000) for i in range(3)]
        )
    if layout == "apart":  # keys and values in halves of a tensor
        page = 16 * 4 * 24
        return Cache(
            memory,
            [tensor((2, BLOCKS, 16, 4, 24), (BLOCKS * page, page, 96, 24, 1), i * 50_000) for i in range(3)],
            1,
        )
    if layout == "mla":  # one latent vector a token, rows of it unequal to the record's alignment
        return Cache(
            memory, [tensor((BLOCKS, 16, 72), (16 * 72, 72, 1), i * 16 * 72 * 2 * BLOCKS) for i in range(4)]
        )
    if layout == "block-major":  # a block is one stretch, and fills its record to the last byte
        page = 4096 // 4 // 2
        return Cache(memory, [tensor((BLOCKS, page), (4 * page, 1), i * page * 2) for i in range(4)])
    if layout == "block-major, padded records":
        return Cache(memory, [tensor((BLOCKS, 5, 6), (4 * 30, 6, 1), i * 60) for i in range(4)])
    if layout == "block-major with gaps":
        page = 4096 // 4 // 2
        return Cache(memory, [tensor((BLOCKS, page), (4 * page + 8, 1), i * page * 2) for i in range(4)])
    if layout == "gaps inside blocks":
        return Cache(memory, [tensor((BLOCKS, 3, 2, 5), (100, 30, 11, 2), i * 1400) for i in range(3)])
    assert layout == "neighbours in the first block only"
    return Cache(memory, [tensor((BLOCKS, 8), (100, 1), 0, "u1"), tensor((BLOCKS, 42), (50, 1), 8, "u1")])


LAYOUTS = [
    "packed",
    "apart",
    "mla",
    "block-major",
    "block-major, padded records",
    "block-major with gaps",
    "gaps inside blocks",
    "neighbours in the first block only",
]


def arena_of(layout: KvLayout) -> HostArena:
    arena = HostArena(SLOTS, layout.record_bytes)
    arena.slots[:] = UNUSED
    return arena


def copies_of(
    kv: Cache,
    arena: HostArena,
    blocks: list[int],
    slots: list[int],
    *,
    pieces: tuple[int, int] | None = None,
    chunk_slots: int = SLOTS,
) -> Copies:
    table = PieceTable(kv.layout)
    return block_copies(
        table,
        pieces or (0, len(table)),
        np.array(blocks, np.int32),
        np.array(slots, np.int32),
        records=arena.address,
        slot_bytes=arena.slot_bytes,
        chunk_slots=chunk_slots,
    )


def execute(copies: Copies, *, to_host: bool) -> None:
    for device, host, size in zip(*(array.tolist() for array in copies), strict=True):
        assert size > 0
        ctypes.memmove(*((host, device) if to_host else (device, host)), size)


def check_chunks(copies: Copies, arena: HostArena, chunk_slots: int) -> None:
    chunk_bytes = chunk_slots * arena.slot_bytes
    _, host, size = copies
    begin = host - arena.address
    np.testing.assert_array_equal(begin // chunk_bytes, (begin + size - 1) // chunk_bytes)


def without(kv: Cache, blocks: list[int]) -> np.ndarray:
    """The memory with zeros in these blocks."""
    for block in blocks:
        for part in kv.block(block):
            part[...] = 0
    return kv.memory.copy()


def stretches(*rows: list[int], chunk_slots: int) -> int:
    """Of rows that are counted up together, the last of which must not enter another chunk."""
    steps = pairwise(zip(*rows, strict=True))
    return 1 + sum(
        any(b != a + 1 for a, b in zip(before, after, strict=True)) or after[-1] % chunk_slots == 0
        for before, after in steps
    )


# ---- blocks ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_into_other_blocks(layout: str) -> None:
    kv = cache(layout)
    arena = arena_of(kv.layout)
    original = kv.memory.copy()
    execute(copies_of(kv, arena, [5, 0, 3], [1, 8, 0]), to_host=True)
    np.testing.assert_array_equal(kv.memory, original)
    execute(copies_of(kv, arena, [1, 2], [8, 0]), to_host=False)
    for source, target in ((0, 1), (3, 2)):
        for a, b in zip(kv.block(source), kv.block(target), strict=True):
            np.testing.assert_array_equal(a, b)
    changed = without(kv, [1, 2])
    kv.memory[:] = original
    np.testing.assert_array_equal(changed, without(kv, [1, 2]))  # nothing else has changed


@settings(max_examples=150, deadline=None, print_blob=True, derandomize=False)
@given(
    layout=st.sampled_from(LAYOUTS),
    blocks=st.permutations(range(BLOCKS)) | st.just(list(range(BLOCKS))),
    slots=st.permutations(range(SLOTS)) | st.just(list(range(SLOTS))),
    count=st.integers(1, BLOCKS),
    chunk_slots=st.integers(1, 4),
    split=st.integers(0, 3),
)
def test_records_are_those_of_the_cpu_engine(
    layout: str, blocks: list[int], slots: list[int], count: int, chunk_slots: int, split: int
) -> None:
    """Also when the layers are copied in parts: not a byte more, none in another chunk's registration."""
    kv = cache(layout)
    blocks, slots = blocks[:count], slots[:count]
    expected, arena = arena_of(kv.layout), arena_of(kv.layout)
    CpuCopyEngine(kv.layout, expected).offload(np.array(blocks), np.array(slots))
    original = kv.memory.copy()

    spans = sorted(set(kv.layout.layers.values()))
    bounds = [0, *([spans[split][0]] if 0 < split < len(spans) else []), spans[-1][1]]
    parts = [
        copies_of(kv, arena, blocks, slots, pieces=pieces, chunk_slots=chunk_slots)
        for pieces in pairwise(bounds)
    ]
    for copies in parts:
        check_chunks(copies, arena, chunk_slots)
        execute(copies, to_host=True)
    np.testing.assert_array_equal(arena.slots, expected.slots)
    without(kv, blocks)
    for copies in parts:
        execute(copies, to_host=False)
    np.testing.assert_array_equal(kv.memory, original)


@settings(max_examples=150, deadline=None, print_blob=True, derandomize=False)
@given(
    blocks=st.permutations(range(BLOCKS)) | st.just(list(range(BLOCKS))),
    first=st.integers(0, SLOTS - BLOCKS),
    gap=st.none() | st.integers(0, BLOCKS - 1),
    chunk_slots=st.integers(1, SLOTS),
)
def test_neighbours_are_one_copy(blocks: list[int], first: int, gap: int | None, chunk_slots: int) -> None:
    """Where blocks are one stretch of memory that fills a record: as many copies as there are breaks."""
    slots = [first + i for i in range(BLOCKS) if i != gap]
    blocks = [block for i, block in enumerate(blocks) if i != gap]
    kv = cache("block-major")
    arena = arena_of(kv.layout)
    copies = copies_of(kv, arena, blocks, slots, chunk_slots=chunk_slots)
    assert len(copies[0]) == stretches(blocks, slots, chunk_slots=chunk_slots)
    assert copies[2].sum() == len(slots) * arena.slot_bytes


@pytest.mark.parametrize(
    ("layout", "copies_a_block"),
    [
        ("packed", 3),
        ("apart", 6),
        ("mla", 4),
        ("block-major", 1),
        ("block-major, padded records", 1),
        ("block-major with gaps", 1),
        ("gaps inside blocks", 3 * 3 * 2 * 5),
        ("neighbours in the first block only", 2),
    ],
)
def test_pieces_of_a_block_that_touch_are_one_copy(layout: str, copies_a_block: int) -> None:
    kv = cache(layout)
    table = PieceTable(kv.layout)
    assert table.copies == copies_a_block
    assert len(table) == sum(run.pieces for run in kv.layout.runs)
    assert table.size.sum() == kv.layout.record_bytes
    arena = arena_of(kv.layout)
    assert len(copies_of(kv, arena, [4, 1, 3], [2, 0, 1])[0]) == 3 * copies_a_block
    in_order = 1 if layout == "block-major" else 3 * copies_a_block
    assert len(copies_of(kv, arena, [3, 4, 5], [0, 1, 2])[0]) == in_order


def test_padding_between_records_is_not_copied() -> None:
    """Neither read beyond the blocks that lie behind one another, nor written."""
    kv = cache("block-major, padded records")
    arena = arena_of(kv.layout)
    copies = copies_of(kv, arena, [0, 1, 2], [4, 5, 6])
    assert copies[2].tolist() == [kv.layout.record_bytes] * 3
    execute(copies, to_host=True)
    assert (arena.slots[:, arena.record_bytes :] == UNUSED).all()


def test_a_layer_of_a_block_that_is_one_stretch() -> None:
    """Its blocks don't touch, however neighbouring they are."""
    kv = cache("block-major")
    arena = arena_of(kv.layout)
    assert len(copies_of(kv, arena, [0, 1, 2], [0, 1, 2], pieces=kv.layout.layers["1"])[0]) == 3


def test_addresses_beyond_four_gigabytes() -> None:
    """Block and slot numbers come in 32 bits."""
    layout = KvLayout(100_000, 2**20, (Run(2**45, 2**20, 1, 2**20, 2**20, 0),))
    numbers = np.array([99_998, 99_999], np.int32)
    device, host, size = block_copies(
        PieceTable(layout), (0, 1), numbers, numbers, records=2**44, slot_bytes=2**20, chunk_slots=64
    )
    assert device.tolist() == [2**45 + 99_998 * 2**20]
    assert host.tolist() == [2**44 + 99_998 * 2**20]
    assert size.tolist() == [2**21]


@pytest.mark.parametrize("name", ["address", "block_stride", "size", "offset"])
def test_aligned_means_every_piece_of_every_block(name: str) -> None:
    table = PieceTable(cache("mla").layout)
    table.address += -table.address[0] % 64
    assert table.aligned(64)
    getattr(table, name)[-1] += 2
    assert not table.aligned(64)
    assert table.aligned(2)


# ---- whole records ----


@settings(max_examples=150, deadline=None, print_blob=True, derandomize=False)
@given(
    record_bytes=st.sampled_from([1, 4095, 4096, 5000, 8192]),
    slots=st.permutations(range(SLOTS)) | st.just(list(range(SLOTS))),
    start=st.integers(0, SLOTS - 1),
    count=st.integers(1, SLOTS),
    chunk_slots=st.integers(1, SLOTS),
    rows=st.integers(1, SLOTS + 1),
)
def test_records_and_staging(
    record_bytes: int, slots: list[int], start: int, count: int, chunk_slots: int, rows: int
) -> None:
    """A part after the other through staging memory of `rows` records, out and back."""
    slots = slots[start : start + count]
    random = np.random.default_rng(3)
    arena = HostArena(SLOTS, record_bytes)
    arena.slots[:] = UNUSED
    *copies, bounds = record_copies(
        np.array(slots, np.int32),
        rows,
        records=arena.address,
        size=record_bytes,
        row_bytes=arena.slot_bytes,
        slot_bytes=arena.slot_bytes,
        chunk_slots=chunk_slots,
    )
    assert bounds[0] == 0
    assert bounds[-1] == len(copies[0])
    for part, first in zip(pairwise(bounds), range(0, len(slots), rows), strict=True):
        offsets, host, sizes = (array[slice(*part)] for array in copies)
        own = slots[first : first + rows]
        staging = random.integers(0, 256, (SLOTS, arena.slot_bytes), np.uint8)
        placed = offsets + staging.ctypes.data, host, sizes
        check_chunks(placed, arena, chunk_slots)
        assert len(offsets) == stretches(own, chunk_slots=chunk_slots)

        before = arena.slots.copy()
        execute(placed, to_host=True)
        np.testing.assert_array_equal(arena.records()[own], staging[: len(own), :record_bytes])
        others = np.setdiff1d(np.arange(SLOTS), own)
        assert (arena.slots[others] == before[others]).all()
        # Padding may be copied where the next record follows, but never behind the last.
        last = [a for a, b in pairwise([*own, -1]) if b != a + 1 or b % chunk_slots == 0]
        assert (arena.slots[last, record_bytes:] == UNUSED).all()

        arena.records()[own] = random.integers(0, 256, (len(own), record_bytes), np.uint8)
        staging[:] = UNUSED
        execute(placed, to_host=False)
        np.testing.assert_array_equal(staging[: len(own), :record_bytes], arena.records()[own])
        assert (staging[len(own) - 1, record_bytes:] == UNUSED).all()
        assert (staging[len(own) :] == UNUSED).all()


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (2, 4)])
@pytest.mark.parametrize("rows", [2, 5, SLOTS])
def test_a_part_of_each_record_through_staging(first: int, last: int, rows: int) -> None:
    """Some layers of neighbouring records: never one copy, as other layers lie between them."""
    kv = cache("mla")
    table = PieceTable(kv.layout)
    offset, size = table.span(first, last)
    assert (offset, size) == (table.offset[first], table.size[first:last].sum())
    arena = HostArena(SLOTS, kv.layout.record_bytes)
    arena.slots[:] = np.random.default_rng(5).integers(0, 256, arena.slots.shape, np.uint8)
    slots = np.array([3, 4, 5, 0, 8, 7, 6, 1])
    *copies, bounds = record_copies(
        slots,
        rows,
        records=arena.address + offset,
        size=size,
        row_bytes=size,
        slot_bytes=arena.slot_bytes,
        chunk_slots=SLOTS,
    )
    assert len(copies[0]) == len(slots)
    for part, start in zip(pairwise(bounds), range(0, len(slots), rows), strict=True):
        offsets, host, sizes = (array[slice(*part)] for array in copies)
        own = slots[start : start + rows]
        staging = np.full((rows, size), UNUSED, np.uint8)
        execute((offsets + staging.ctypes.data, host, sizes), to_host=False)
        np.testing.assert_array_equal(staging[: len(own)], arena.records()[own, offset : offset + size])
        assert (staging[len(own) :] == UNUSED).all()
