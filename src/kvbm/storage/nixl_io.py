"""Records by way of NIXL: its plugin POSIX (Linux AIO), or GDS_MT (GPUDirect Storage) where a machine has it.

One agent for all threads of the I/O process, which polls: NIXL has nothing to wait on, and gets on with its
requests only while it is asked about them.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Any

import numpy as np

from kvbm.errors import StorageError
from kvbm.storage.file_io import PosixFileIo
from kvbm.storage.store import Bytes

_PACKAGES = ("nixl_cu12", "nixl_cu13")  # the first one's plugins load without CUDA too
_OLDEST = (1, 5)  # before it, reads that came short and writes without room passed for complete
_POLL_S = 1e-4  # a record takes some 500 µs; shorter pauses cost a core and gain nothing
_INIT = {"POSIX": {"use_aio": "true"}}  # after an error its POSIXAIO fails for ever


class NixlFileIo(PosixFileIo):
    """StorageError where NIXL or the plugin can't be used, or is too old.

    Buffers outside attached memory, and syncs, take the kernel's calls.
    """

    def __init__(self, plugin: str) -> None:
        self._plugin = plugin
        self._agent = _make_agent(plugin)
        self._lock = threading.Lock()
        self._attached: list[tuple[int, int]] = []  # first address and end
        self._registered: list[Any] = []
        self._files: set[int] = set()

    def attach(self, memory: Bytes) -> None:
        begin = memory.ctypes.data
        self._register((begin, memory.nbytes, 0, ""), "DRAM")
        self._attached.append((begin, begin + memory.nbytes))

    def read(self, fd: int, offset: int, buffers: Sequence[Bytes]) -> None:
        if self._covers(buffers):
            self._transfer("READ", fd, offset, buffers)
        else:
            super().read(fd, offset, buffers)

    def write(self, fd: int, offset: int, buffers: Sequence[Bytes]) -> None:
        if self._covers(buffers):
            self._transfer("WRITE", fd, offset, buffers)
        else:
            super().write(fd, offset, buffers)

    def close(self) -> None:
        for descriptors in self._registered:
            self._agent.deregister_memory(descriptors, backends=[self._plugin])
        self._registered, self._attached = [], []
        self._files.clear()

    # ---- inside ----

    def _covers(self, buffers: Sequence[Bytes]) -> bool:
        return all(
            any(
                begin <= buffer.ctypes.data and buffer.ctypes.data + buffer.nbytes <= end
                for begin, end in self._attached
            )
            for buffer in buffers
        )

    def _register(self, region: tuple[int, int, int, str], kind: str) -> None:
        try:
            descriptors = self._agent.register_memory([region], kind, backends=[self._plugin])
        except Exception as error:  # its exceptions have no base of their own
            raise StorageError(f"NIXL can't register {kind}: {_name(error)}") from error
        self._registered.append(descriptors)

    def _transfer(self, operation: str, fd: int, offset: int, buffers: Sequence[Bytes]) -> None:
        with self._lock:
            if fd not in self._files:
                self._register((0, os.fstat(fd).st_size, fd, ""), "FILE")
                self._files.add(fd)
        sizes = [buffer.nbytes for buffer in buffers]
        starts = np.cumsum([offset, *sizes[:-1]]).tolist()
        memory = [(buffer.ctypes.data, buffer.nbytes, 0) for buffer in buffers]
        file = [(start, size, fd) for start, size in zip(starts, sizes, strict=True)]
        agent = self._agent
        try:
            local, remote = agent.get_xfer_descs(memory, "DRAM"), agent.get_xfer_descs(file, "FILE")
            if local is None or remote is None:
                raise StorageError("NIXL refuses the descriptors")
            request = agent.initialize_xfer(operation, local, remote, agent.name, backends=[self._plugin])
        except Exception as error:
            raise StorageError(f"NIXL {operation} at {offset}: {_name(error)}") from error
        try:
            state = agent.transfer(request)
            while state == "PROC":
                time.sleep(_POLL_S)
                state = agent.check_xfer_state(request)
        except Exception as error:
            raise StorageError(f"NIXL {operation} at {offset}: {_name(error)}") from error
        finally:
            self._release(request)
        if state != "DONE":
            raise StorageError(f"NIXL {operation} at {offset}: {state}")

    def _release(self, request: Any) -> None:
        """Not before the last part of a failed request has let go of the memory."""
        while True:
            try:
                request.release()
                return
            except Exception:
                time.sleep(_POLL_S)


def _make_agent(plugin: str) -> Any:
    reasons = []
    for package in _PACKAGES:
        try:
            version = metadata.version(package.replace("_", "-"))
        except metadata.PackageNotFoundError:
            continue
        if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
            reasons.append(f"{package} {version} takes failed transfers for complete ones: 1.5.0 is needed")
            continue
        try:
            return _agent_of(package, plugin)
        except Exception as error:
            reasons.append(f"{package} {version}: {_name(error)}")
    raise StorageError(
        f"NIXL's plugin {plugin} can't be used ({'; '.join(reasons) or 'NIXL is not installed'}): "
        f"pip install 'nixl>=1.5.0', or set KVBM_DISK_BACKEND=posix"
    )


def _agent_of(package: str, plugin: str) -> Any:
    api = import_module(f"{package}._api")
    logging.getLogger("nixl").setLevel(logging.WARNING)
    logging.getLogger(package).setLevel(logging.WARNING)
    config = api.nixl_agent_config(
        enable_prog_thread=False,  # it would only turn
        backends=[],
        sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,  # else threads crash the process
    )
    agent = api.nixl_agent("kvbm", config)
    agent.create_backend(plugin, _INIT.get(plugin, {}))
    return agent


def _name(error: Exception) -> str:
    return str(error) or type(error).__name__
