"""What a rank's half of an integration is made of, whatever the engine."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvbm.config import Config
from kvbm.errors import CapacityError, ConfigError, LayoutError
from kvbm.logic.hashing import Hashes
from kvbm.logic.operations import BlockIds
from kvbm.runtime.worker import Worker
from kvbm.storage.client import StorageClient
from kvbm.storage.store import Found
from kvbm.transfer.arena import ArenaHandle, HostArena
from kvbm.transfer.calibration import Method
from kvbm.transfer.copy import CopyEngine, CpuCopyEngine
from kvbm.transfer.layout import KvLayout, recognise, tensor_view
from kvbm.transfer.proof import prove
from kvbm.transfer.records import HostRecords

logger = logging.getLogger(__name__)


def make_worker(
    config: Config,
    kv_caches: Mapping[str, Any],
    num_device_blocks: int,
    record_bytes: int,
    *,
    num_slots: int,
    start_disk: Callable[[HostArena], StorageClient],
    views: Sequence[NDArray[Any]] | None = None,
    shared: ArenaHandle | None = None,
) -> Worker:
    """A worker for an engine's KV tensors, with `num_slots` records of host memory.

    start_disk: asked where a disk tier is configured. views: see `CpuCopyEngine`. shared: the records of
    another rank, whose blocks have the same bytes; that one stores, and this one loads. LayoutError where the
    tensors are not understood.
    """
    layout = recognise(
        (tensor_view(name, tensor) for name, tensor in kv_caches.items()), num_device_blocks, record_bytes
    )
    arena = HostArena(num_slots, layout.record_bytes, shared)
    device = next(iter(kv_caches.values())).device
    wanted = config.transfer.copy_method
    method = None if wanted == "auto" else Method(wanted)
    engine = (
        make_copy_engine(layout, arena, device, method)
        if views is None
        else CpuCopyEngine(layout, arena, views)
    )
    prove(kv_caches, layout, engine, arena)
    checksum = config.host.checksum
    return Worker(
        HostRecords(arena, engine, checksum=device.type == "cpu" if checksum is None else checksum),
        # More threads than half the cores would take them from the model.
        threads=max(1, min(config.transfer.max_concurrent, (os.cpu_count() or 2) // 2)),
        disk=start_disk(arena) if config.has_disk and shared is None else None,
        stores=shared is None,
    )


def worker_or_reason(make: Callable[[], Worker]) -> Worker | str:
    """The worker that `make` makes, or why the KV cache can't be cached.

    CapacityError and ConfigError go through: the user asked for what this machine does not have.
    """
    try:
        return make()
    except LayoutError as error:
        return str(error)
    except (CapacityError, ConfigError):
        raise
    except Exception as error:  # a driver without a call that we need, for one
        logger.exception("KVBM: the KV cache can't be copied")
        return f"the KV cache can't be copied: {error}"


def make_copy_engine(
    layout: KvLayout, arena: HostArena, device: torch.device, method: Method | None = None
) -> CopyEngine:
    """The engine for KV tensors on `device`."""
    if device.type == "cpu":
        return CpuCopyEngine(layout, arena)
    if device.type == "cuda":
        from kvbm.transfer.cuda.engine import CudaCopyEngine

        return CudaCopyEngine(layout, arena, device, method=method)
    raise LayoutError(f"The KV cache lies on {device}: KVBM copies from CPU and CUDA devices only.")


class FoundRecords:
    """What an earlier run left on disk, told to the leader in pieces that no step notices."""

    _PIECE = 32768

    def __init__(self) -> None:
        self._slots = np.empty(0, np.int32)
        self._hashes = np.empty((0, 2), np.uint64)
        self._told = 0
        self.foreign = False
        self.wants_report = False

    def add(self, found: Sequence[Found]) -> None:
        """All of it, once."""
        if found:
            self._slots = np.concatenate([part.slots for part in found])
            self._hashes = np.concatenate([part.hashes for part in found])
            self.foreign = any(part.foreign for part in found)
            self.wants_report = True

    def next_piece(self) -> tuple[tuple[BlockIds, Hashes] | None, bool]:
        """The next piece and whether it is the last."""
        if not self.wants_report:
            return None, False
        part = slice(self._told, self._told + self._PIECE)
        self._told += self._PIECE
        piece = self._slots[part], self._hashes[part]
        self.wants_report = self._told < len(self._slots)
        if not self.wants_report:  # 20 bytes a record, which nobody needs any more
            self._slots, self._hashes = self._slots[:0].copy(), self._hashes[:0].copy()
        return piece, not self.wants_report
