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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvbm.errors import CapacityError
from kvbm.transfer.arena import HostArena
from kvbm.transfer.calibration import CalibrationFile, Method, MethodTable, always, measure
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
_IN_STEP_GROUPS = 8  # of layers: a load inside a step signals each when it has arrived
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
            self._in_step = torch.cuda.Stream(device)
        self._groups = _layer_groups(layout, len(self._pieces))
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
        self._methods = self._choose_methods(method)

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
        lane = self._lanes[direction]
        order = {Method.DMA: self._dma, Method.KERNEL: self._kernel, Method.STAGED: self._staged}[method]
        with lane.lock:
            try:
                streams = order(direction == "offload", lane, blocks, slots, after)
            except Exception:
                lane.synchronize()  # what was ordered before the error must not go on unknown to anybody
                raise
            return CudaTransfer([_mark(stream) for stream in streams])

    # Each orders a copy and returns the streams on which it ends.

    def _dma(
        self, offload: bool, lane: "_Lane", blocks: Indices, slots: Indices, after: object
    ) -> Sequence[torch.cuda.Stream]:
        stream = lane.halves[0].stream
        _wait(stream, after)
        device, host, sizes = self._block_copies((0, len(self._pieces)), blocks, slots)
        driver.copy_batch(*_to_and_from(offload, device, host), sizes, stream.cuda_stream)
        return [stream]

    def _kernel(
        self, offload: bool, lane: "_Lane", blocks: Indices, slots: Indices, after: object
    ) -> Sequence[torch.cuda.Stream]:
        assert kernel is not None
        half = lane.halves[0]
        _wait(half.stream, after)
        programs = kernel.PROGRAMS_TO_HOST if offload else kernel.PROGRAMS_FROM_HOST
        for part in _parts(len(slots), _MAX_BLOCKS):
            index = _upload(half.index, blocks[part], slots[part], half.stream)
            self._launch(half.stream, index, self._arena.address, gather=offload, programs=programs)
        return [half.stream]

    def _staged(
        self, offload: bool, lane: "_Lane", blocks: Indices, slots: Indices, after: object
    ) -> Sequence[torch.cuda.Stream]:
        """Through the halves in turn: the bus moves what is in one, a kernel packs or unpacks the other."""
        assert kernel is not None
        programs = kernel.PROGRAMS_TO_PACK if offload else kernel.PROGRAMS_TO_UNPACK
        waiting = set(lane.halves)
        for chunk in _parts(len(slots), _MAX_BLOCKS):
            for half in lane.halves:
                half.upload(blocks[chunk])
            offsets, host, sizes, bounds = record_copies(
                slots[chunk],
                lane.staged_blocks,
                records=self._arena.address,
                record_bytes=self._arena.record_bytes,
                slot_bytes=self._arena.slot_bytes,
                chunk_slots=self._chunk_slots,
            )
            parts = list(_parts(len(slots[chunk]), lane.staged_blocks))
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
                self._launch(stream, half.staged(part), half.address, gather=offload, programs=programs)
                if offload:
                    batch.order(first, last, stream.cuda_stream)
        return [half.stream for half in lane.halves if half not in waiting]

    def start_in_step(self, device_blocks: Indices, host_slots: Indices) -> InStepLoad:
        """Group of layers by group. By kernel: the engine has no other use for its SMs meanwhile."""
        stream = self._in_step
        stream.wait_stream(torch.cuda.current_stream(self._device))
        events = []
        with torch.cuda.stream(stream):  # whose memory it is
            memory = torch.empty(2 * len(host_slots), dtype=torch.int32, device=self._device)
        index = _upload(memory, device_blocks, host_slots, stream)
        for group in self._groups.ranges:
            if kernel is not None and self._piece_copies is not None:
                self._launch(
                    stream,
                    index,
                    self._arena.address,
                    group,
                    gather=False,
                    programs=kernel.PROGRAMS_FROM_HOST,
                )
            else:
                device, host, sizes = self._block_copies(group, device_blocks, host_slots)
                driver.copy_batch(device, host, sizes, stream.cuda_stream)
            event = torch.cuda.Event()
            event.record(stream)
            events.append(event)
        return _CudaInStepLoad(self._device, events, self._groups.by_name)

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
            self._arena.slot_bytes,
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
        records: int,
        pieces: tuple[int, int] | None = None,
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
            pieces or (0, len(self._pieces)),
            records,
            gather=gather,
            programs=programs,
        )

    def _block_copies(self, pieces: tuple[int, int], blocks: Indices, slots: Indices) -> Any:
        return block_copies(
            self._pieces,
            pieces,
            blocks,
            slots,
            records=self._arena.address,
            slot_bytes=self._arena.slot_bytes,
            chunk_slots=self._chunk_slots,
        )

    def _choose_methods(self, wanted: Method | None) -> MethodTable:
        methods = list(Method) if self._piece_copies is not None else [Method.DMA]
        if wanted is not None and wanted in methods:
            return always(wanted)
        if len(methods) == 1 or self._pieces.copies == 1:
            return always(Method.DMA)
        name = torch.cuda.get_device_name(self._device)
        shape = f"{len(self._pieces)} pieces of {self._pieces.size.max()} bytes"
        key = f"{name}, driver {driver.version()}, {shape}"
        file = CalibrationFile()
        table = file.load(key)
        if table is None:
            # The records that are loaded must hold something of the engine's.
            self._calibration_copy("offload", Method.DMA, self.ready_slots)
            table = measure(self._calibration_copy, methods, _CALIBRATED_COUNTS, clock=time.perf_counter)
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

    def __init__(self, device: torch.device, blocks: int, slot_bytes: int) -> None:
        self.stream = torch.cuda.Stream(device)
        self._memory = torch.empty(blocks * slot_bytes, dtype=torch.uint8, device=device)
        self.address = self._memory.data_ptr()
        # Blocks and records of a copy, then the rows of the staging area.
        self.index = torch.arange(-2 * _MAX_BLOCKS, blocks, dtype=torch.int32, device=device)
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def upload(self, blocks: Indices) -> None:
        driver.upload(self.index.data_ptr(), blocks.astype(np.int32), self.stream.cuda_stream)

    def staged(self, part: slice) -> "_Index":
        """Blocks of a part of what was uploaded, which go to the rows from the first on."""
        return _Index(self.index, 2 * _MAX_BLOCKS - part.start, part.start, part.stop - part.start)


class _Lane:
    """Streams and staging memory of one direction. Submissions are made under its lock."""

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self.lock = threading.Lock()
        staging = torch.cuda.get_device_properties(device).total_memory // _STAGING_SHARE
        self.staged_blocks = min(_MAX_BLOCKS, max(1, staging // slot_bytes))
        self.halves = [_Half(device, self.staged_blocks, slot_bytes) for _ in range(2)]

    def synchronize(self) -> None:
        for half in self.halves:
            half.stream.synchronize()

    def next_half(self) -> _Half:
        self.halves.reverse()
        return self.halves[0]


class _LayerGroups:
    def __init__(self, ranges: list[tuple[int, int]], by_name: dict[str, int]) -> None:
        self.ranges = ranges  # of pieces
        self.by_name = by_name


def _layer_groups(layout: KvLayout, num_pieces: int) -> _LayerGroups:
    """Layers in at most _IN_STEP_GROUPS groups of neighbours."""
    spans = sorted(set(layout.layers.values())) or [(0, num_pieces)]
    size = -(-len(spans) // _IN_STEP_GROUPS)
    ranges = [(part[0][0], part[-1][1]) for part in (spans[i : i + size] for i in range(0, len(spans), size))]
    group_of = {span: i // size for i, span in enumerate(spans)}
    return _LayerGroups(ranges, {name: group_of[span] for name, span in layout.layers.items()})


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
        self, device: torch.device, events: list[torch.cuda.Event], group_of: dict[str, int]
    ) -> None:
        self._device = device
        self._events = events
        self._group_of = group_of
        self._passed = 0  # groups that the forward pass has been ordered behind

    def before_layer(self, name: str) -> None:
        self._pass(self._group_of.get(name, len(self._events) - 1))

    def before_all(self) -> None:
        self._pass(len(self._events) - 1)

    def _pass(self, group: int) -> None:
        if group >= self._passed:
            torch.cuda.current_stream(self._device).wait_event(self._events[group])
            self._passed = group + 1

    @property
    def is_over(self) -> bool:
        return self._events[-1].query()


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


def _upload(memory: torch.Tensor, blocks: Indices, records: Indices, stream: torch.cuda.Stream) -> _Index:
    driver.upload(memory.data_ptr(), np.concatenate([blocks, records]).astype(np.int32), stream.cuda_stream)
    return _Index(memory, len(blocks), 0, len(blocks))


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
