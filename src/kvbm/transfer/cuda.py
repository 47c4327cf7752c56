"""Copy engine for CUDA tensors by means of torch alone: right, not yet fast.

A gather on the GPU and one DMA for each stretch of slots. It lets the rest of KVBM run on a GPU; engines that
move blocks at the speed of the bus take its place behind the same interface.
"""

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvbm.errors import CapacityError
from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CopyEngine
from kvbm.transfer.layout import KvLayout, Run

_STAGING_BYTES = 64 << 20  # of device memory for each thread and copy


class CudaCopyEngine(CopyEngine):
    """For KV tensors on `device`. Each calling thread copies on a stream of its own."""

    def __init__(self, layout: KvLayout, arena: HostArena, device: torch.device) -> None:
        self._device = device
        self._threads = threading.local()
        self._batch = max(1, _STAGING_BYTES // arena.slot_bytes)
        self._host = torch.from_numpy(arena.slots)
        cudart: Any = torch.cuda.cudart()
        status = cudart.cudaHostRegister(self._host.data_ptr(), self._host.numel(), 0)
        if int(status) != 0:
            raise CapacityError(
                f"CUDA can't pin {self._host.numel() / 1e9:.2f} GB of host memory ({status}). Lower "
                f"DYN_KVBM_CPU_CACHE_GB, or raise the locked-memory limit (ulimit -l)."
            )
        # Memory that is unmapped while registered makes CUDA refuse the next mapping at its address.
        weakref.finalize(self, cudart.cudaHostUnregister, self._host.data_ptr())
        self._runs = [(run, self._device_view(run, layout.num_blocks)) for run in layout.runs]

    def fence(self) -> object:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def offload(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer], after: object = None
    ) -> None:
        with torch.cuda.stream(self._stream(after)):
            for blocks, slots in self._batches(device_blocks, host_slots):
                staged = self._staging(len(slots))
                for run, device in self._runs:
                    self._part(staged, run).copy_(device.index_select(0, blocks).flatten(1))
                for at, slot, count in _ranges(slots):
                    self._host[slot : slot + count].copy_(staged[at : at + count], non_blocking=True)
            torch.cuda.current_stream().synchronize()

    def onboard(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer], after: object = None
    ) -> None:
        with torch.cuda.stream(self._stream(after)):
            for blocks, slots in self._batches(device_blocks, host_slots):
                staged = self._staging(len(slots))
                for at, slot, count in _ranges(slots):
                    staged[at : at + count].copy_(self._host[slot : slot + count], non_blocking=True)
                for run, device in self._runs:
                    rows = self._part(staged, run).unflatten(1, (run.pieces, run.piece_bytes))
                    device.index_copy_(0, blocks, rows)
            torch.cuda.current_stream().synchronize()

    def _stream(self, after: object) -> torch.cuda.Stream:
        if not hasattr(self._threads, "stream"):
            self._threads.stream = torch.cuda.Stream(self._device)
        stream: torch.cuda.Stream = self._threads.stream
        if isinstance(after, torch.cuda.Event):
            stream.wait_event(after)
        return stream

    def _batches(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer]
    ) -> Iterator[tuple[torch.Tensor, list[int]]]:
        for start in range(0, len(host_slots), self._batch):
            blocks = torch.from_numpy(device_blocks[start : start + self._batch].astype(np.int64))
            yield blocks.to(self._device), host_slots[start : start + self._batch].tolist()

    def _staging(self, count: int) -> torch.Tensor:
        return torch.empty((count, self._host.shape[1]), dtype=torch.uint8, device=self._device)

    def _part(self, records: torch.Tensor, run: Run) -> torch.Tensor:
        return records[:, run.record_offset : run.record_offset + run.pieces * run.piece_bytes]

    def _device_view(self, run: Run, num_blocks: int) -> torch.Tensor:
        """The run's bytes on the device, shape (num_blocks, pieces, piece_bytes), uint8."""

        class Memory:
            __cuda_array_interface__ = {  # noqa: RUF012
                "shape": (num_blocks, run.pieces, run.piece_bytes),
                "strides": (run.block_stride, run.piece_stride, 1),
                "typestr": "|u1",
                "data": (run.address, False),
                "version": 3,
            }

        return torch.as_tensor(Memory(), device=self._device)


def _ranges(slots: list[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches of consecutive slots: (position in `slots`, first slot, count). One DMA each."""
    start = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1:
            yield start, slots[start], end - start
            start = end
