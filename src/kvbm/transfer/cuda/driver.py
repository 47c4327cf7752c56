"""The calls of the CUDA driver that torch doesn't offer. Through ctypes, which gives up the GIL meanwhile."""

import ctypes
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ON_STREAM = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: sources are read in stream order
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

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


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


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
    _call(
        "cuMemcpyHtoDAsync_v2",
        ctypes.c_uint64(device),
        ctypes.c_void_p(data.ctypes.data),
        ctypes.c_size_t(data.nbytes),
        ctypes.c_void_p(stream),
    )


def copy_batch(destinations: Address, sources: Address, sizes: Address, stream: int) -> None:
    """DMA of n pieces, shape (n,) each, in one call; without order among them."""
    if not len(sizes):
        return
    entry = _batch_entry()
    if entry is None:
        for destination, source, size in zip(
            destinations.tolist(), sources.tolist(), sizes.tolist(), strict=True
        ):
            _call("cuMemcpyAsync", *map(ctypes.c_uint64, (destination, source, size, stream)))
        return
    arrays = [np.ascontiguousarray(array, np.int64) for array in (destinations, sources, sizes)]
    failed_at = ctypes.c_size_t()
    _call(
        entry,
        *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
        ctypes.c_size_t(len(sizes)),
        ctypes.byref(_ATTRIBUTES),
        ctypes.byref(_FIRST),
        ctypes.c_size_t(1),
        *([] if entry.endswith("_v2") else [ctypes.byref(failed_at)]),  # CUDA 12.8 and 12.9
        ctypes.c_void_p(stream),
    )


@functools.cache
def _batch_entry() -> str | None:
    for name in ("cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync"):
        if hasattr(_library(), name):
            return name
    return None
