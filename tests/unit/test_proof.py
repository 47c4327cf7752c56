"""The proof of a layout: passes for every layout that is copied right, and for none that isn't."""

import ctypes
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kvbm.errors import LayoutError
from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CopyEngine, CpuCopyEngine
from kvbm.transfer.layout import KvLayout, recognise, tensor_view

torch = pytest.importorskip("torch")
prove = pytest.importorskip("kvbm.transfer.proof").prove

LAYERS = 3
Tensors = dict[str, "torch.Tensor"]


def packed(blocks: int) -> Tensors:
    """vLLM's FlashAttention: keys and values side by side, heads inside tokens."""
    return {
        f"layer {i}": torch.zeros(blocks, 16, 8, 64, dtype=torch.bfloat16).transpose(1, 2)
        for i in range(LAYERS)
    }


def apart(blocks: int) -> Tensors:
    """Keys and values in halves of a tensor."""
    return {f"layer {i}": torch.zeros(2, blocks, 16, 2, 8, dtype=torch.float16) for i in range(LAYERS)}


def mla(blocks: int) -> Tensors:
    return {f"layer {i}": torch.zeros(blocks, 16, 72, dtype=torch.float8_e4m3fn) for i in range(LAYERS)}


def block_major(blocks: int) -> Tensors:
    """One tensor, in which a block's layers lie side by side."""
    everything = torch.zeros(blocks, LAYERS, 16, 24, dtype=torch.float16)
    return {f"layer {i}": everything[:, i] for i in range(LAYERS)}


def smaller_kernel_blocks(blocks: int) -> Tensors:
    return {f"layer {i}": torch.zeros(4 * blocks, 4, 10, dtype=torch.float16) for i in range(LAYERS)}


def several_types(blocks: int) -> Tensors:
    return {
        "a": torch.zeros(blocks, 8, dtype=torch.float32),
        "b": torch.zeros(2, blocks, 5, dtype=torch.uint8),
        "c": torch.zeros(blocks, 3, 4, dtype=torch.bfloat16),
    }


def shared(blocks: int) -> Tensors:
    tensors = packed(blocks)
    return tensors | {"last": tensors["layer 0"]}


KINDS = [packed, apart, mla, block_major, smaller_kernel_blocks, several_types, shared]
Kind = Callable[[int], Tensors]


def understood(tensors: Tensors, blocks: int) -> KvLayout:
    distinct = {tensor.data_ptr(): tensor for tensor in tensors.values()}.values()
    record = sum(tensor.numel() * tensor.element_size() for tensor in distinct) // blocks
    return recognise((tensor_view(name, tensor) for name, tensor in tensors.items()), blocks, record)


def fill(tensors: Tensors) -> list[bytes]:
    """Something to lose; returns it."""
    for i, tensor in enumerate(tensors.values()):
        generator = torch.Generator().manual_seed(i)
        tensor.copy_(torch.randint(0, 100, tensor.shape, generator=generator).to(tensor.dtype))
    return contents(tensors)


def contents(tensors: Tensors) -> list[bytes]:
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values()]


class Recorder(CopyEngine):
    """A CPU engine that tells what it copied."""

    def __init__(self, layout: KvLayout, arena: HostArena) -> None:
        self.engine = CpuCopyEngine(layout, arena)
        self.arena = arena
        self.offloaded: list[int] = []
        self.onboarded: list[int] = []
        self.slots: set[int] = set()
        self.afters: list[object] = []

    def fence(self) -> object:
        return "now"

    def offload(self, device_blocks: np.ndarray, host_slots: np.ndarray, after: object = None) -> None:
        self.offloaded += device_blocks.tolist()
        self.slots |= set(host_slots.tolist())
        self.afters.append(after)
        self.engine.offload(device_blocks, host_slots)

    def onboard(self, device_blocks: np.ndarray, host_slots: np.ndarray, after: object = None) -> None:
        self.onboarded += device_blocks.tolist()
        self.slots |= set(host_slots.tolist())
        self.afters.append(after)
        self.engine.onboard(device_blocks, host_slots)


# ---- what is copied right ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 6, 7, 40])
def test_passes_and_leaves_no_trace(kind: Kind, blocks: int) -> None:
    tensors = kind(blocks)
    before = fill(tensors)
    layout = understood(tensors, blocks)
    arena = HostArena(8, layout.record_bytes)
    engine = Recorder(layout, arena)
    prove(tensors, layout, engine, arena)
    assert contents(tensors) == before
    count = min(3, blocks // 2)
    used = engine.offloaded + engine.onboarded
    assert len(engine.offloaded) == len(engine.onboarded) == count
    assert len(set(used)) == 2 * count, "from some blocks into others"
    assert set(used) <= set(range(blocks))
    if count:
        assert {0, blocks - 1} <= set(used), "the ends of the tensors are where strides are wrong"
    assert engine.slots == set(range(count))
    assert engine.afters == ["now"] * 2 * bool(count), "behind the bytes that the proof itself writes"


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_an_arena_of_few_slots(slots: int) -> None:
    tensors = packed(20)
    before = fill(tensors)
    layout = understood(tensors, 20)
    arena = HostArena(slots, layout.record_bytes)
    prove(tensors, layout, CpuCopyEngine(layout, arena), arena)
    assert contents(tensors) == before


@pytest.mark.parametrize("ready", [1, 2])
def test_only_slots_that_are_ready_are_used(ready: int) -> None:
    """The rest of the arena is still being pinned: the device can't reach it."""

    class Pinning(Recorder):
        @property
        def ready_slots(self) -> int | None:
            return ready

    tensors = packed(20)
    layout = understood(tensors, 20)
    arena = HostArena(8, layout.record_bytes)
    engine = Pinning(layout, arena)
    prove(tensors, layout, engine, arena)
    assert engine.slots == set(range(ready))


# ---- what isn't ----

Copy = Callable[[np.ndarray, np.ndarray], None]


def byte_at(address: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * 1).from_address(address))


class Wrong(CopyEngine):
    """A CPU engine that makes one mistake in one direction."""

    def __init__(self, tensors: Tensors, arena: HostArena, blocks: int, direction: str, mistake: str) -> None:
        self.layout = understood(tensors, blocks)
        self.right = CpuCopyEngine(self.layout, arena)
        self.records = arena.records()
        self.direction = direction
        self.mistake = mistake
        first_name = next(iter(tensors))
        self.one_less = CpuCopyEngine(
            understood({name: t for name, t in tensors.items() if name != first_name}, blocks), arena
        )
        runs = tuple(replace(run, block_stride=run.block_stride // 2) for run in self.layout.runs)
        self.misread = CpuCopyEngine(replace(self.layout, runs=runs), arena)

    def offload(self, device_blocks: np.ndarray, host_slots: np.ndarray, after: object = None) -> None:
        self.copy("offload", device_blocks, host_slots)

    def onboard(self, device_blocks: np.ndarray, host_slots: np.ndarray, after: object = None) -> None:
        self.copy("onboard", device_blocks, host_slots)

    def copy(self, direction: str, blocks: np.ndarray, slots: np.ndarray) -> None:
        copy: Copy = getattr(self.right, direction)
        mistake = self.mistake if direction == self.direction else None
        first = self.layout.runs[0]
        if mistake == "nothing":
            return
        if mistake == "two blocks swapped":
            copy(blocks[[1, 0, *range(2, len(blocks))]], slots)
        elif mistake == "the same block again and again":
            copy(np.full_like(blocks, blocks[0]), slots)
        elif mistake == "the next block":
            copy((blocks + 1) % self.layout.num_blocks, slots)
        elif mistake == "the last forgotten":
            copy(blocks[:-1], slots[:-1])
        elif mistake == "one layer forgotten":
            getattr(self.one_less, direction)(blocks, slots)
        elif mistake == "half the stride":
            getattr(self.misread, direction)(blocks, slots)
        elif mistake == "shifted by a byte":
            if direction == "onboard":
                self.records[slots] = np.roll(self.records[slots], 1, axis=1)
            copy(blocks, slots)
            if direction == "offload":
                self.records[slots] = np.roll(self.records[slots], 1, axis=1)
        elif mistake == "one bit":
            copy(blocks, slots)
            byte_at(first.address + int(blocks[-1]) * first.block_stride + first.piece_bytes - 1)[0] ^= 0x80
        elif mistake == "a byte too far":
            copy(blocks, slots)
            byte_at(first.address + (int(blocks[1]) + 1) * first.block_stride)[0] ^= 1
        elif mistake == "a byte too early":
            copy(blocks, slots)
            byte_at(first.address + int(blocks[1]) * first.block_stride - 1)[0] ^= 1
        else:
            copy(blocks, slots)


MISTAKES = [
    "nothing",
    "two blocks swapped",
    "the same block again and again",
    "the next block",
    "the last forgotten",
    "one layer forgotten",
    "half the stride",
    "shifted by a byte",
    "one bit",
    "a byte too far",
    "a byte too early",
]


@pytest.mark.parametrize("kind", [packed, apart, mla, block_major])
@pytest.mark.parametrize("direction", ["offload", "onboard"])
@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_mistakes_are_found(kind: Kind, direction: str, mistake: str) -> None:
    tensors = kind(20)
    fill(tensors)
    arena = HostArena(8, understood(tensors, 20).record_bytes)
    engine = Wrong(tensors, arena, 20, direction, mistake)
    if mistake is None:
        prove(tensors, engine.layout, engine, arena)
        return
    with pytest.raises(LayoutError, match="did not survive a trial copy"):
        prove(tensors, engine.layout, engine, arena)


def test_mistakes_are_found_in_tiny_caches() -> None:
    for mistake in ("nothing", "the next block", "one layer forgotten", "shifted by a byte"):
        tensors = packed(2)
        arena = HostArena(8, understood(tensors, 2).record_bytes)
        engine = Wrong(tensors, arena, 2, "onboard", mistake)
        with pytest.raises(LayoutError):
            prove(tensors, engine.layout, engine, arena)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_message_names_the_tensor(layer: int) -> None:
    """Here the layout itself is wrong: one tensor is not where it was said to be."""
    tensors = packed(20)
    elsewhere = tensors | {f"layer {layer}": torch.zeros_like(tensors["layer 0"])}
    layout = understood(elsewhere, 20)
    arena = HostArena(8, layout.record_bytes)
    with pytest.raises(LayoutError, match=f"1 KV tensors, first layer {layer},"):
        prove(tensors, layout, CpuCopyEngine(layout, arena), arena)


def test_a_layout_that_permutes_layers_of_equal_shape_is_no_mistake() -> None:
    """Records are opaque: their order is the layout's own."""
    tensors = packed(20)
    layout = understood(dict(reversed(tensors.items())), 20)
    arena = HostArena(8, layout.record_bytes)
    prove(tensors, layout, CpuCopyEngine(layout, arena), arena)


@pytest.mark.parametrize("direction", ["offload", "onboard"])
def test_contents_are_restored_when_the_copy_raises(direction: str) -> None:
    tensors = packed(20)
    before = fill(tensors)
    layout = understood(tensors, 20)
    arena = HostArena(8, layout.record_bytes)
    engine = CpuCopyEngine(layout, arena)

    def broken(*arguments: object) -> None:
        raise RuntimeError("device lost")

    setattr(engine, direction, broken)
    with pytest.raises(RuntimeError, match="device lost"):
        prove(tensors, layout, engine, arena)
    assert contents(tensors) == before


@pytest.mark.parametrize("mistake", ["nothing", "two blocks swapped", "a byte too far", "a byte too early"])
def test_contents_are_restored_when_it_fails(mistake: str) -> None:
    tensors = packed(20)
    before = fill(tensors)
    arena = HostArena(8, understood(tensors, 20).record_bytes)
    engine = Wrong(tensors, arena, 20, "onboard", mistake)
    with pytest.raises(LayoutError):
        prove(tensors, engine.layout, engine, arena)
    assert contents(tensors) == before


def test_a_tensor_that_cannot_be_viewed_as_bytes() -> None:
    tensors = {"odd": torch.zeros(20, 6, 4, dtype=torch.float16).transpose(1, 2)}
    layout = understood(tensors, 20)
    arena = HostArena(8, layout.record_bytes)
    with pytest.raises(LayoutError, match="odd can't be viewed as bytes"):
        prove(tensors, layout, CpuCopyEngine(layout, arena), arena)
