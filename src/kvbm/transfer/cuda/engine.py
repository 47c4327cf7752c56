"""Copy engine for KV tensors on a CUDA device.

Copies run on streams of its own, ordered behind the engine's by events. There are three ways, see `Method`.
On an H200 (PCIe 5) DMA moves what is contiguous on the device at the speed of the bus, pieces of 32 and 64
KiB at 80 % of it, smaller ones far below, and takes the CPU half a microsecond for each. A kernel that reads
or writes pinned memory needs none of that and reaches 92 to 94 %, with SMs that the model lacks meanwhile.
Staged reaches 97 % with every layout, at the price of a little device memory, and of SMs for moments.
"""

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kvbm.errors import CapacityError
from kvbm.transfer.arena import HostArena
from kvbm.transfer.calibration import CalibrationFile, Method, MethodTable, always, in_step_method, measure
from kvbm.transfer.copy import CopyEngine, InStepLoad, Transfer
from kvbm.transfer.cuda import driver
from kvbm.transfer.cuda.pinning import PinnedArena, slots_per_chunk
from kvbm.transfer.layout import KvLayout
from kvbm.transfer.numa import cpus_near
from kvbm.transfer.pieces import Addresses, PieceTable, block_copies, record_copies

if TYPE_CHECKING:
    from kvbm.transfer.cuda.kernel import PieceCopies
try:
    from kvbm.transfer.cuda import kernel
except ImportError:  # torch without Triton: DMA alone
    kernel = None

_STAGING_SHARE = 1024  # a thousandth of the device's memory is one half, of two for each direction
_MAX_BLOCKS = 4096  # in one launch of a kernel
# Groups of layers, of which a load inside a step signals each when it has arrived: where they end. The less
# in the first, the sooner the model starts; in the last, the less is left to compute when all have arrived.
_IN_STEP_GROUPS = (1 / 8, 3 / 8, 5 / 8, 7 / 8, 1)
_CALIBRATED_COUNTS = (1, 8, 32, 256)
# Copies in one order: each takes the engine's thread 0.5 to 1 µs; with 32,768 it has waited for the device.
_MOST_BY_DMA = 8192

Indices = NDArray[np.integer]

logger = logging.getLogger(__name__)


class CudaCopyEngine(CopyEngine):
    """`method` overrides the calibration. Raises CapacityError when no host memory can be pinned."""

    def __init__(
        self, layout: KvLayout, arena: HostArena, device: torch.device, *, method: Method | None = None
    ) -> None:
        self._device = device
        self._engine_thread = threading.get_ident()
        self._arena = arena
        self._chunk_slots = slots_per_chunk(arena.slot_bytes)
        self._pieces = PieceTable(layout)
        self._num_blocks = layout.num_blocks
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # makes the context current
            self._context = driver.current_context()
            self._lanes = {direction: _Lane(device, arena.slot_bytes) for direction in ("offload", "onboard")}
        self._groups = _layer_groups(layout, self._pieces)
        self._piece_copies = self._prepare_kernel()
        try:
            self._pinned = PinnedArena(
                arena,
                register=driver.register,
                unregister=driver.unregister,
                enter_thread=self._enter_thread,
                cpus=cpus_near(_pci_address(device)),
            )
        except driver.CudaError as error:
            raise CapacityError(
                f"CUDA can't pin host memory: {error}. Raise the locked-memory limit (ulimit -l)."
            ) from error
        self._try_kernel()
        self._wanted = method if method in self._able else None
        self._methods = self._choose_methods()

    copies_by_itself = True

    @property
    def ready_slots(self) -> int:
        return self._pinned.ready_slots

    def wait_ready(self) -> None:
        """Until the whole arena is pinned, for tests and benchmarks."""
        self._pinned.wait()

    def close(self) -> None:
        self._pinned.close()

    def caller(self) -> object:
        return threading.get_ident(), torch.cuda.current_stream(self._device).cuda_stream

    def fence(self) -> object:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    # ---- copies ----

    def offload(self, device_blocks: Indices, host_slots: Indices, after: object = None) -> None:
        self._enter_thread()
        self.start_offload(device_blocks, host_slots, after).wait()

    def onboard(self, device_blocks: Indices, host_slots: Indices, after: object = None) -> None:
        self._enter_thread()
        self.start_onboard(device_blocks, host_slots, after).wait()

    def start_offload(
        self, device_blocks: Indices, host_slots: Indices, after: object = None
    ) -> "CudaTransfer":
        return self.start("offload", device_blocks, host_slots, after)

    def start_onboard(
        self, device_blocks: Indices, host_slots: Indices, after: object = None
    ) -> "CudaTransfer":
        return self.start("onboard", device_blocks, host_slots, after)

    def start(
        self,
        direction: str,
        blocks: Indices,
        slots: Indices,
        after: object = None,
        method: Method | None = None,
    ) -> "CudaTransfer":
        """Order a copy by `method`, or by what was measured to be the best."""
        method = method or self._methods.choose(direction, len(slots))
        [ends] = self._order(direction, method, blocks, slots, after, [(0, len(self._pieces))])
        return CudaTransfer(ends)

    def start_in_step(self, device_blocks: Indices, host_slots: Indices) -> InStepLoad:
        """Group of layers by group."""
        groups = self._groups
        method = self._wanted or in_step_method(
            len(host_slots), self._arena.record_bytes, len(groups.ranges), groups.whole, self._able
        )
        ends = self._order("onboard", method, device_blocks, host_slots, self.fence(), groups.ranges)
        return _CudaInStepLoad(self._device, ends, groups.by_name)

    def _order(
        self,
        direction: str,
        method: Method,
        blocks: Indices,
        slots: Indices,
        after: object,
        groups: Sequence[tuple[int, int]],
    ) -> list[list[torch.cuda.Event]]:
        """Order a copy of the pieces of each group; the events with which each ends."""
        lane = self._lanes[direction]
        order = {Method.DMA: self._dma, Method.KERNEL: self._kernel, Method.STAGED: self._staged}[method]
        with lane.lock:
            try:
                parts = (order(direction == "offload", lane, blocks, slots, after, group) for group in groups)
                return [[_mark(stream) for stream in streams] for streams in parts]
            except Exception:
                lane.synchronize()  # what was ordered before the error must not go on unknown to anybody
                raise

    # Each orders a copy of some pieces and returns the streams on which it ends.

    def _dma(
        self,
        offload: bool,
        lane: "_Lane",
        blocks: Indices,
        slots: Indices,
        after: object,
        group: tuple[int, int],
    ) -> Sequence[torch.cuda.Stream]:
        stream = lane.halves[0].stream
        _wait(stream, after)
        device, host, sizes = block_copies(
            self._pieces,
            group,
            blocks,
            slots,
            records=self._arena.address,
            slot_bytes=self._arena.slot_bytes,
            chunk_slots=self._chunk_slots,
        )
        driver.copy_batch(*_to_and_from(offload, device, host), sizes, stream.cuda_stream)
        return [stream]

    def _kernel(
        self,
        offload: bool,
        lane: "_Lane",
        blocks: Indices,
        slots: Indices,
        after: object,
        group: tuple[int, int],
    ) -> Sequence[torch.cuda.Stream]:
        assert kernel is not None
        half = lane.halves[0]
        _wait(half.stream, after)
        programs = kernel.PROGRAMS_TO_HOST if offload else kernel.PROGRAMS_FROM_HOST
        records = _Rows(self._arena.address, self._arena.slot_bytes)
        for part in _parts(len(slots), _MAX_BLOCKS):
            index = half.upload_pairs(blocks[part], slots[part])
            self._launch(half.stream, index, records, group, gather=offload, programs=programs)
        return [half.stream]

    def _staged(
        self,
        offload: bool,
        lane: "_Lane",
        blocks: Indices,
        slots: Indices,
        after: object,
        group: tuple[int, int],
    ) -> Sequence[torch.cuda.Stream]:
        """Through the halves in turn: the bus moves what is in one, a kernel packs or unpacks the other."""
        assert kernel is not None
        programs = kernel.PROGRAMS_TO_PACK if offload else kernel.PROGRAMS_TO_UNPACK
        offset, size = self._pieces.span(*group)
        row_bytes = self._arena.slot_bytes if size == self._arena.record_bytes else size
        rows = lane.rows(row_bytes)
        waiting = set(lane.halves)
        for chunk in _parts(len(slots), _MAX_BLOCKS):
            for half in lane.halves:
                half.upload(blocks[chunk])
            offsets, host, sizes, bounds = record_copies(
                slots[chunk],
                rows,
                records=self._arena.address + offset,
                size=size,
                row_bytes=row_bytes,
                slot_bytes=self._arena.slot_bytes,
                chunk_slots=self._chunk_slots,
            )
            parts = list(_parts(len(slots[chunk]), rows))
            halves = [lane.next_half() for _ in parts]
            staged = offsets + np.repeat([half.address for half in halves], np.diff(bounds))
            batch = driver.CopyBatch(*_to_and_from(offload, staged, host), sizes)
            for half, part, (first, last) in zip(halves, parts, pairwise(bounds.tolist()), strict=True):
                stream = half.stream
                if not offload:  # the bus may run ahead with loads: only what writes blocks has to wait
                    batch.order(first, last, stream.cuda_stream)
                if half in waiting:
                    waiting.remove(half)
                    _wait(stream, after)
                records = _Rows(half.address - offset, row_bytes)
                self._launch(stream, half.staged(part), records, group, gather=offload, programs=programs)
                if offload:
                    batch.order(first, last, stream.cuda_stream)
        return [half.stream for half in lane.halves if half not in waiting]

    # ---- inside ----

    def _enter_thread(self) -> None:
        if threading.get_ident() != self._engine_thread:
            torch.cuda.set_device(self._device)
            driver.enter_thread(self._context)

    def _prepare_kernel(self) -> "PieceCopies | None":
        if kernel is None or not self._pieces.aligned(kernel.ALIGNMENT):
            return None
        pieces = self._pieces
        words = pieces.size // 8
        table = np.stack([pieces.address, pieces.block_stride, words, pieces.offset])
        return kernel.PieceCopies(
            torch.from_numpy(table).to(self._device),
            (int(words.min()), int(words.max())),
        )

    def _try_kernel(self) -> None:
        """See whether the kernel works. It is compiled when first launched: not in the middle of a step."""
        if self._piece_copies is None:
            return
        try:
            for direction in ("offload", "onboard") * 2:  # from the second on without Triton's launcher
                self._calibration_copy(direction, Method.KERNEL, 1)
        except Exception as error:  # Triton needs a C compiler, for one
            logger.warning("KVBM: blocks are copied without a kernel, more slowly: %s", error)
            self._piece_copies = None

    def _launch(
        self,
        stream: torch.cuda.Stream,
        index: "_Index",
        records: "_Rows",
        pieces: tuple[int, int],
        *,
        gather: bool,
        programs: int,
    ) -> None:
        assert self._piece_copies is not None
        self._piece_copies.launch(
            stream,
            index.memory,
            index.start,
            index.row,
            index.count,
            pieces,
            records.address,
            records.stride,
            gather=gather,
            programs=programs,
        )

    @property
    def _able(self) -> list[Method]:
        return list(Method) if self._piece_copies is not None else [Method.DMA]

    def _choose_methods(self) -> MethodTable:
        if self._wanted is not None:
            return always(self._wanted)
        if self._able == [Method.DMA] or self._pieces.copies == 1:
            return always(Method.DMA)
        name = torch.cuda.get_device_name(self._device)
        shape = f"{len(self._pieces)} pieces of {self._pieces.size.max()} bytes"
        key = f"{name}, driver {driver.version()}, {shape}"
        file = CalibrationFile()
        table = file.load(key)
        if table is None:
            # The records that are loaded must hold something of the engine's.
            self._calibration_copy("offload", Method.DMA, self.ready_slots)
            table = measure(self._calibration_copy, self._able, _CALIBRATED_COUNTS, clock=time.perf_counter)
            if table is None:
                return always(Method.STAGED)
            file.save(key, table)
        return replace(table, most_by_dma=_MOST_BY_DMA // self._pieces.copies)

    def _calibration_copy(self, direction: str, method: Method, count: int) -> None:
        """The engine has computed nothing yet: which of its blocks holds what does not matter."""
        numbers = np.arange(count)
        blocks, slots = numbers % self._num_blocks, numbers % self.ready_slots
        self.start(direction, blocks, slots, self.fence(), method).wait()


class _Half:
    """One of the two staging areas of a lane. The order of its stream protects its memory."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.stream = torch.cuda.Stream(device)
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.address = self._memory.data_ptr()
        # Blocks and records of a copy, then the rows of the staging area.
        self._index = torch.arange(-2 * _MAX_BLOCKS, _MAX_BLOCKS, dtype=torch.int32, device=device)
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def upload(self, blocks: Indices) -> None:
        driver.upload(self._index.data_ptr(), blocks.astype(np.int32), self.stream.cuda_stream)

    def upload_pairs(self, blocks: Indices, records: Indices) -> "_Index":
        self.upload(np.concatenate([blocks, records]))
        return _Index(self._index, len(blocks), 0, len(blocks))

    def staged(self, part: slice) -> "_Index":
        """Blocks of a part of what was uploaded, which go to the rows from the first on."""
        return _Index(self._index, 2 * _MAX_BLOCKS - part.start, part.start, part.stop - part.start)


class _Lane:
    """Streams and staging memory of one direction. Submissions are made under its lock."""

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self.lock = threading.Lock()
        staging = torch.cuda.get_device_properties(device).total_memory // _STAGING_SHARE
        self.half_bytes = max(1, min(_MAX_BLOCKS, staging // slot_bytes)) * slot_bytes
        self.halves = [_Half(device, self.half_bytes) for _ in range(2)]

    def rows(self, row_bytes: int) -> int:
        """How many of these are staged at once."""
        return min(_MAX_BLOCKS, self.half_bytes // row_bytes)

    def synchronize(self) -> None:
        for half in self.halves:
            half.stream.synchronize()

    def next_half(self) -> _Half:
        self.halves.reverse()
        return self.halves[0]


@dataclass(frozen=True, slots=True)
class _LayerGroups:
    ranges: list[tuple[int, int]]  # of pieces
    by_name: dict[str, int]
    whole: bool  # whether a block's part of each is one stretch of memory on the device


def _layer_groups(layout: KvLayout, pieces: PieceTable) -> _LayerGroups:
    """Groups of neighbouring layers, see _IN_STEP_GROUPS."""
    spans = sorted(set(layout.layers.values())) or [(0, len(pieces))]
    ends = sorted({round(end * len(spans)) for end in _IN_STEP_GROUPS} - {0})
    ranges = [(spans[first][0], spans[last - 1][1]) for first, last in pairwise([0, *ends])]
    group_of = {span: bisect_right(ends, i) for i, span in enumerate(spans)}
    by_name = {name: group_of[span] for name, span in layout.layers.items()}
    return _LayerGroups(ranges, by_name, all(len(pieces.joined(*part)[0]) == 1 for part in ranges))


class CudaTransfer(Transfer):
    """Ends with the last of some events. Waiting for them leaves the CPU to others."""

    def __init__(self, ends: Sequence[torch.cuda.Event]) -> None:
        self._ends = ends

    @property
    def is_over(self) -> bool:
        return all(end.query() for end in self._ends)

    def wait(self) -> None:
        for end in self._ends:
            end.synchronize()


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


class _CudaInStepLoad(InStepLoad):
    def __init__(
        self, device: torch.device, ends: list[list[torch.cuda.Event]], group_of: dict[str, int]
    ) -> None:
        self._device = device
        self._ends = ends  # of each group
        self._group_of = group_of
        self._passed = 0  # groups that the forward pass has been ordered behind

    def before_layer(self, name: str) -> None:
        self._pass(self._group_of.get(name, len(self._ends) - 1))

    def before_all(self) -> None:
        self._pass(len(self._ends) - 1)

    def _pass(self, group: int) -> None:
        model = torch.cuda.current_stream(self._device)
        while self._passed <= group:
            for end in self._ends[self._passed]:
                model.wait_event(end)
            self._passed += 1

    @property
    def is_over(self) -> bool:
        return all(end.query() for ends in reversed(self._ends) for end in ends)


def _parts(count: int, most: int) -> Iterator[slice]:
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))


@dataclass(frozen=True, slots=True)
class _Index:
    """Blocks and records of a copy on the device: `row` elements lie between a block and its record."""

    memory: torch.Tensor
    row: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """Records in host memory or rows of a staging area: address of the first, bytes from one to the next."""

    address: int
    stride: int


def _wait(stream: torch.cuda.Stream, after: object) -> None:
    if isinstance(after, torch.cuda.Event):
        stream.wait_event(after)


def _to_and_from(offload: bool, device: Addresses, host: Addresses) -> tuple[Addresses, Addresses]:
    return (host, device) if offload else (device, host)


def _pci_address(device: torch.device) -> str:
    at = torch.cuda.get_device_properties(device)
    try:
        return f"{at.pci_domain_id:04x}:{at.pci_bus_id:02x}:{at.pci_device_id:02x}.0"
    except AttributeError:  # older torch
        return ""
