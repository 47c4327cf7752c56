"""The CPU copy engine: bit-exact both ways, for every layout, and not a byte beyond."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CpuCopyEngine
from kvbm.transfer.layout import recognise, tensor_view

BLOCKS, SLOTS = 6, 5


@dataclass
class Cache:
    """KV tensors over one memory, which also holds bytes that are none of theirs."""

    memory: np.ndarray
    tensors: list[np.ndarray]
    block_dim: int
    parts: int = 1

    @property
    def record_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in {id(t): t for t in self.tensors}.values()) // BLOCKS

    def mask(self, blocks: list[int]) -> np.ndarray:
        """Which bytes of the memory belong to these blocks."""
        before = self.memory.copy()
        self.memory[:] = 0
        for tensor in self.tensors:
            for block in blocks:
                index = slice(block * self.parts, (block + 1) * self.parts)
                part = tensor[index] if self.block_dim == 0 else tensor[:, index]
                part[...] = 0xFFFF
        mask = self.memory != 0
        self.memory[:] = before
        return mask


def cache(layout: str) -> Cache:
    memory = np.zeros(40_000, np.uint8)
    base = memory[64:].view(np.uint16)

    def tensor(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> np.ndarray:
        return as_strided(base[offset:], shape, [2 * stride for stride in strides])

    if layout == "vllm on cpu":  # a storage a layer
        return Cache(memory, [tensor((BLOCKS, 2, 4, 6), (48, 24, 6, 1), i * 400) for i in range(3)], 0)
    if layout == "vllm on gpu":  # heads inside tokens
        return Cache(memory, [tensor((BLOCKS, 2, 4, 6), (48, 6, 12, 1), i * 300) for i in range(3)], 0)
    if layout == "keys and values apart":
        return Cache(memory, [tensor((2, BLOCKS, 4, 6), (200, 24, 6, 1), i * 500) for i in range(2)], 1)
    if layout == "block-major":
        return Cache(memory, [tensor((BLOCKS, 4, 6), (5 * 24, 6, 1), i * 24) for i in range(4)], 0)
    if layout == "smaller kernel blocks":
        return Cache(memory, [tensor((4 * BLOCKS, 10), (10, 1), i * 300) for i in range(2)], 0, 4)
    if layout == "gaps everywhere":
        return Cache(memory, [tensor((BLOCKS, 3, 2, 5), (100, 30, 11, 2), i * 700) for i in range(3)], 0)
    if layout == "layers of several sizes":
        return Cache(memory, [tensor((BLOCKS, 7), (7, 1), 900), tensor((BLOCKS, 3, 3), (12, 3, 1), 100)], 0)
    shared = tensor((BLOCKS, 8), (8, 1))
    return Cache(memory, [shared, tensor((BLOCKS, 8), (8, 1), 99), shared], 0)


LAYOUTS = [
    "vllm on cpu",
    "vllm on gpu",
    "keys and values apart",
    "block-major",
    "smaller kernel blocks",
    "gaps everywhere",
    "layers of several sizes",
    "layers that share",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout: str) -> None:
    kv = cache(layout)
    random = np.random.default_rng(4)
    kv.memory[:] = random.integers(0, 256, len(kv.memory))
    views = [tensor_view(str(i), tensor) for i, tensor in enumerate(kv.tensors)]
    arena = HostArena(SLOTS, kv.record_bytes)
    arena.slots[:] = 0xEE
    engine = CpuCopyEngine(recognise(views, BLOCKS, kv.record_bytes), arena)
    original = kv.memory.copy()

    blocks, slots = np.array([5, 0, 3], np.int32), np.array([1, 4, 0], np.int64)
    engine.offload(blocks, slots)
    np.testing.assert_array_equal(kv.memory, original)
    untouched = np.ones(SLOTS, bool)
    untouched[slots] = False
    assert (arena.slots[untouched] == 0xEE).all()
    assert (arena.slots[:, arena.record_bytes :] == 0xEE).all()

    # Records hold exactly the bytes of their blocks, in some order.
    for block, slot in zip(blocks.tolist(), slots.tolist(), strict=True):
        own = original[kv.mask([block])]
        np.testing.assert_array_equal(np.sort(arena.records()[slot]), np.sort(own))

    # Back into the blocks that they came from, which have lost everything.
    kv.memory[kv.mask(blocks.tolist())] = 0
    engine.onboard(blocks, slots)
    np.testing.assert_array_equal(kv.memory, original)

    # Into other blocks: these are the same tensors' worth, all else stays.
    records = arena.slots.copy()
    engine.onboard(np.array([1, 2]), slots[:2])
    np.testing.assert_array_equal(arena.slots, records)
    expected = original.copy()
    changed = kv.mask([1, 2])
    np.testing.assert_array_equal(kv.memory[~changed], expected[~changed])
    for tensor in kv.tensors:
        for source, target in ((5, 1), (0, 2)):
            for part in range(kv.parts):
                a, b = source * kv.parts + part, target * kv.parts + part
                if kv.block_dim == 0:
                    np.testing.assert_array_equal(tensor[a], tensor[b])
                else:
                    np.testing.assert_array_equal(tensor[:, a], tensor[:, b])


def test_nothing_to_copy() -> None:
    kv = cache("vllm on cpu")
    arena = HostArena(SLOTS, kv.record_bytes)
    views = [tensor_view(str(i), tensor) for i, tensor in enumerate(kv.tensors)]
    engine = CpuCopyEngine(recognise(views, BLOCKS, kv.record_bytes), arena)
    nothing = np.empty(0, np.int32)
    engine.offload(nothing, nothing)
    engine.onboard(nothing, nothing)
    assert not arena.slots.any()


def test_threads_with_disjoint_blocks() -> None:
    kv = cache("block-major")
    random = np.random.default_rng(8)
    kv.memory[:] = random.integers(0, 256, len(kv.memory))
    original = kv.memory.copy()
    arena = HostArena(BLOCKS, kv.record_bytes)
    views = [tensor_view(str(i), tensor) for i, tensor in enumerate(kv.tensors)]
    engine = CpuCopyEngine(recognise(views, BLOCKS, kv.record_bytes), arena)
    start = threading.Barrier(3)

    def copy(block: int) -> None:
        start.wait(10)
        for _ in range(50):
            engine.offload(np.array([block, block + 3]), np.array([block, block + 3]))
            engine.onboard(np.array([block, block + 3]), np.array([block, block + 3]))

    threads = [threading.Thread(target=copy, args=(block,)) for block in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    np.testing.assert_array_equal(kv.memory, original)
