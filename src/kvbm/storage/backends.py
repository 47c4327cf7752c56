"""The storage that the settings name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvbm.storage.adoption import Adoption
from kvbm.storage.containers import Allocation
from kvbm.storage.disk_store import DiskStore
from kvbm.storage.file_io import FileIo, PosixFileIo
from kvbm.storage.messages import Options
from kvbm.storage.store import Identity, RecordStore

# A new engine may start while the I/O process of the one before still writes its last records.
_LOCK_PATIENCE_S = 10.0


def open_store(options: Options, memory: NDArray[np.uint8], alive: Callable[[], bool]) -> RecordStore:
    """StorageError or OSError where it can't be opened. alive: see `Adoption`."""
    return DiskStore(
        [Path(folder) for folder in options.folders],
        Identity(options.namespace, options.record_bytes, options.rank, options.ranks),
        options.disk_slots,
        memory,
        slot_bytes=options.slot_bytes,
        io=_file_io(options.backend),
        how=Allocation(
            options.zerofill_fallback, options.o_direct, options.open_direct, options.min_free_bytes
        ),
        threads=options.threads,
        patience_s=_LOCK_PATIENCE_S,
        adoption=Adoption(options.split, alive) if options.split is not None else None,
    )


def _file_io(backend: str) -> FileIo:
    if backend == "posix":
        return PosixFileIo()
    from kvbm.storage.nixl_io import NixlFileIo

    return NixlFileIo("GDS_MT" if backend == "nixl-gds-mt" else "POSIX")
