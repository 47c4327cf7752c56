"""The calls of the CUDA driver that torch doesn't offer. Through ctypes, which gives up the GIL meanwhile."""

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ON_STREAM = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: sources are read in stream order
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_ARGUMENTS, _ARGUMENTS_SIZE = 1, 2  # CU_LAUNCH_PARAM_BUFFER_POINTER, ..._SIZE

Address = NDArray[np.int64]


class CudaError(RuntimeError):
    """The driver refused a call."""


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes; the locations matter for managed memory only."""

    _fields_ = (
        ("src_access_order", ctypes.c_int),
        ("locations", ctypes.c_int * 4),
        ("flags", ctypes.c_uint),
    )


_ATTRIBUTES = _Attributes(src_access_order=_ON_STREAM)
_FIRST = ctypes.c_size_t(0)
_FAILED = ctypes.c_size_t()
_ATTRIBUTES_AT, _FIRST_AT, _FAILED_AT = map(ctypes.addressof, (_ATTRIBUTES, _FIRST, _FAILED))


_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
_BATCH = [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE]
# Of the calls that are made most, so that they take plain integers.
_TYPES = {
    "cuGraphLaunch": [_POINTER, _POINTER],
    "cuGraphExecKernelNodeSetParams_v2": [_POINTER, _POINTER, _POINTER],
    "cuMemcpyBatchAsync": [*_BATCH, _POINTER, _POINTER],
    "cuMemcpyBatchAsync_v2": [*_BATCH, _POINTER],
    "cuMemcpyHtoDAsync_v2": [ctypes.c_uint64, _POINTER, _SIZE, _POINTER],
}


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    for name, types in _TYPES.items():
        if hasattr(library, name):
            getattr(library, name).argtypes = types
    return library


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorName(status, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or b'?').decode()} ({status})")


def version() -> int:
    """Of the installed driver's interface, as 1000 * major + 10 * minor."""
    found = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(found))
    return found.value


def current_context() -> int:
    context = ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(context))
    return context.value or 0


def enter_thread(context: int) -> None:
    """Make `context` current in a thread of ours.

    While the engine captures a CUDA graph, calls that could disturb a capture fail in every thread that has
    not declared, as this does, that it has nothing to do with it.
    """
    _call("cuCtxSetCurrent", ctypes.c_void_p(context))
    _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(ctypes.c_int(_RELAXED)))


def register(address: int, size: int) -> None:
    """Pin host memory. Blocks every launch of the process while it lasts: 37 ms a GB on an H200."""
    _call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(size), 0)


def unregister(address: int) -> None:
    _call("cuMemHostUnregister", ctypes.c_void_p(address))


def upload(device: int, data: NDArray[Any], stream: int) -> None:
    """Copy a small array to the device; it may be changed as soon as this returns."""
    _call("cuMemcpyHtoDAsync_v2", device, data.ctypes.data, data.nbytes, stream)


class CopyBatch:
    """DMA of n pieces, of which any range is ordered with one call; without order among them.

    Addresses and sizes: int64 arrays of shape (n,).
    """

    def __init__(self, destinations: Address, sources: Address, sizes: Address) -> None:
        self._arrays = [np.ascontiguousarray(array, np.int64) for array in (destinations, sources, sizes)]
        # Looked up once: `ctypes.data` takes as long as the rest of a call.
        self._addresses = [array.ctypes.data for array in self._arrays]

    def order(self, first: int, last: int, stream: int) -> None:
        """Pieces first .. last-1."""
        if first == last:
            return
        entry = _batch_entry()
        if entry is None:
            for piece in zip(*(array[first:last].tolist() for array in self._arrays), strict=True):
                _call("cuMemcpyAsync", *map(ctypes.c_uint64, (*piece, stream)))
            return
        offset = 8 * first
        _call(
            entry,
            *(address + offset for address in self._addresses),
            last - first,
            _ATTRIBUTES_AT,
            _FIRST_AT,
            1,
            *([] if entry.endswith("_v2") else [_FAILED_AT]),  # CUDA 12.8 and 12.9
            stream,
        )


def copy_batch(destinations: Address, sources: Address, sizes: Address, stream: int) -> None:
    """All pieces of a `CopyBatch`."""
    CopyBatch(destinations, sources, sizes).order(0, len(sizes), stream)


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2"""

    _fields_ = (
        ("function", _POINTER),
        ("grid", _NUMBER * 3),
        ("block", _NUMBER * 3),
        ("shared_bytes", _NUMBER),
        ("parameters", _POINTER),
        ("extra", _POINTER),
        ("kernel", _POINTER),
        ("context", _POINTER),
    )


class Kernel:
    """A kernel that a compiler has loaded, launched as a CUDA graph of its own.

    A plain launch beside a model that runs as CUDA graphs soon leaves an H200 in a state in which each kernel
    of those takes half a microsecond longer, 3.5 % of a decoding step, until another process uses the device.
    A launch as a graph does not, and takes the CPU as long (benchmarks/second_stream.py).

    function: its handle (CUfunction); parameters: how many it is given at a launch, the rest is set to zero.
    Any thread may launch it, several at once on different streams. Raises CudaError where the driver does not
    tell how they are laid out (before CUDA 12.4).
    """

    def __init__(self, function: int, parameters: int, threads: int, shared_bytes: int) -> None:
        places = _parameter_places(function)
        if len(places) < parameters:
            raise CudaError(f"a kernel of {len(places)} parameters can't take {parameters}")
        layout, end = "=", 0
        for offset, size in places:
            layout += f"{offset - end}x{'i' if size == 4 else 'q'}"
            end = offset + size
        self._pack_into = struct.Struct(layout).pack_into
        self._rest = (0,) * (len(places) - parameters)
        self._bytes = end
        self._node = {"function": function, "block": (threads, 1, 1), "shared_bytes": shared_bytes}
        self._graphs: dict[int, _KernelGraph] = {}  # by stream: no graph runs beside itself

    def launch(self, programs: int, stream: int, arguments: Sequence[int]) -> None:
        """arguments: integers and addresses."""
        graph = self._graphs.get(stream)
        if graph is None:
            graph = self._graphs[stream] = _KernelGraph(_KernelNode(**self._node), self._bytes)
        self._pack_into(graph.arguments, 0, *arguments, *self._rest)
        graph.launch(programs, stream)


class _KernelGraph:
    """A graph of one kernel, for one stream. Not freed: kernels stay loaded as long as the process, too."""

    def __init__(self, node: _KernelNode, argument_bytes: int) -> None:
        self.arguments = ctypes.create_string_buffer(argument_bytes)
        size = ctypes.c_size_t(argument_bytes)
        at, size_at = ctypes.addressof(self.arguments), ctypes.addressof(size)
        extra = (_POINTER * 5)(_ARGUMENTS, at, _ARGUMENTS_SIZE, size_at, None)
        node.extra = ctypes.addressof(extra)
        self._kept = size, extra  # what the node points to
        self._node, self._node_at = node, ctypes.addressof(node)
        self._handle = self._executable = 0

    def launch(self, programs: int, stream: int) -> None:
        """With the arguments as they are now: the driver copies them."""
        self._node.grid = (programs, 1, 1)
        if self._executable:
            _call("cuGraphExecKernelNodeSetParams_v2", self._executable, self._handle, self._node_at)
        else:
            self._handle, self._executable = self._instantiate()
        _call("cuGraphLaunch", self._executable, stream)

    def _instantiate(self) -> tuple[int, int]:
        graph, handle, executable = _POINTER(), _POINTER(), _POINTER()
        _call("cuGraphCreate", ctypes.byref(graph), 0)
        _call("cuGraphAddKernelNode_v2", ctypes.byref(handle), graph, None, _SIZE(0), _POINTER(self._node_at))
        _call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        return handle.value or 0, executable.value or 0


def _parameter_places(function: int) -> list[tuple[int, int]]:
    """Offset and size of each parameter of a kernel, in bytes."""
    if not hasattr(_library(), "cuFuncGetParamInfo"):
        raise CudaError("the driver does not tell the parameters of a kernel")
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    places: list[tuple[int, int]] = []
    while not _library().cuFuncGetParamInfo(
        ctypes.c_void_p(function),
        ctypes.c_size_t(len(places)),
        ctypes.byref(offset),
        ctypes.byref(size),
    ):
        places.append((offset.value, size.value))
    return places


@functools.cache
def _batch_entry() -> str | None:
    for name in ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync"):
        if hasattr(_library(), name):
            return name
    return None
