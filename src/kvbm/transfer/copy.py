"""Copy engines: move the bytes of whole blocks between an engine's KV tensors and a host arena."""

import ctypes
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from kvbm.errors import LayoutError
from kvbm.transfer.arena import HostArena
from kvbm.transfer.layout import KvLayout, Run


class Transfer(ABC):
    """A copy that the device carries out by itself."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Asked at any time, from any thread; never waits."""


class InStepLoad(Transfer):
    """A load that the forward pass of the same step is ordered behind, on the device, layer by layer.

    All calls from the engine's forward thread; none waits.
    """

    @abstractmethod
    def before_layer(self, name: str) -> None:
        """What is given to the device from now on comes after this layer's bytes have arrived."""

    @abstractmethod
    def before_all(self) -> None:
        """The same for all layers."""


class CopyEngine(ABC):
    """Copies block `device_blocks[i]` to or from the record in slot `host_slots[i]`.

    Shapes (n,), any integer dtype. `offload` and `onboard` return when the bytes have arrived and may raise
    when they did not. They are called from threads of ours, several at once, with disjoint slots and blocks.
    """

    copies_by_itself = False
    """Whether the device copies without a thread of ours: then there are the methods start_...()."""

    @property
    def ready_slots(self) -> int | None:
        """Slots below this number can be used already; None: all. It only grows."""
        return None

    def start_offload(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer], after: object = None
    ) -> Transfer:
        """Have the device copy, and return at once. May raise."""
        raise NotImplementedError

    def start_onboard(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer], after: object = None
    ) -> Transfer:
        """Have the device copy, and return at once. May raise."""
        raise NotImplementedError

    def start_in_step(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer]
    ) -> InStepLoad:
        """Start a load from the engine's forward thread, behind what that has given the device to do."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop what runs in the background; no copy is under way."""
        return None

    def caller(self) -> object:
        """Whose call this is: what equal callers give the device to do is done in that order."""
        return threading.get_ident()

    def fence(self) -> object:
        """Called by the engine's forward thread: marks what it has given the device to do so far.

        A copy that is handed this mark as `after` happens behind it.
        """
        return None

    @abstractmethod
    def offload(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer], after: object = None
    ) -> None: ...

    @abstractmethod
    def onboard(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer], after: object = None
    ) -> None: ...


class CpuCopyEngine(CopyEngine):
    """For KV tensors in this process's memory. One strided memcpy a block and run, without the GIL.

    views: of the tensors, first dimension blocks; then a record is not the layout's but the elements of each
    view after the other, in the order of its dimensions.
    """

    def __init__(
        self, layout: KvLayout, arena: HostArena, views: Sequence[NDArray[Any]] | None = None
    ) -> None:
        if views is None:
            self._pairs = [
                (_device_view(run, layout.num_blocks), _host_view(run, arena)) for run in layout.runs
            ]
        else:
            self._pairs = list(zip(views, _element_views(views, arena), strict=True))

    def offload(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer], after: object = None
    ) -> None:
        for device, host in self._pairs:
            for block, slot in zip(device_blocks.tolist(), host_slots.tolist(), strict=True):
                np.copyto(host[slot], device[block])

    def onboard(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer], after: object = None
    ) -> None:
        for device, host in self._pairs:
            for block, slot in zip(device_blocks.tolist(), host_slots.tolist(), strict=True):
                np.copyto(device[block], host[slot])


def _device_view(run: Run, num_blocks: int) -> NDArray[np.uint8]:
    """The run's bytes in the engine's memory, shape (num_blocks, pieces, piece_bytes)."""
    extent = (num_blocks - 1) * run.block_stride + (run.pieces - 1) * run.piece_stride + run.piece_bytes
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * extent).from_address(run.address))
    return as_strided(
        memory, (num_blocks, run.pieces, run.piece_bytes), (run.block_stride, run.piece_stride, 1)
    )


def _host_view(run: Run, arena: HostArena) -> NDArray[np.uint8]:
    """The same in the arena, shape (num_slots, pieces, piece_bytes)."""
    size = run.pieces * run.piece_bytes
    part = arena.records()[:, run.record_offset : run.record_offset + size]
    return as_strided(
        part, (arena.num_slots, run.pieces, run.piece_bytes), (arena.slot_bytes, run.piece_bytes, 1)
    )


def _element_views(views: Sequence[NDArray[Any]], arena: HostArena) -> Iterator[NDArray[Any]]:
    """Where the elements of each view lie in the arena, in the same shape but for the first dimension."""
    offset = 0
    for view in views:
        size = view[0].size * view.itemsize
        part = arena.records()[:, offset : offset + size].view(view.dtype)
        yield part.reshape(arena.num_slots, *view.shape[1:])
        offset += size
    if offset != arena.record_bytes:
        raise LayoutError(f"The views hold {offset} bytes a block, a record {arena.record_bytes}.")
