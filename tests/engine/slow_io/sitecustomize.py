"""On PYTHONPATH of an engine: makes its I/O processes as slow as a file says, at any moment."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

_FILE = os.environ.get("SLOW_IO_FILE", "")

if _FILE and "kvbm.storage.process" in sys.orig_argv:
    import time

    from kvbm.storage import file_io

    _BIG = 8192  # records, not headers or entries of the index

    def _slowed(call: Callable[..., int], position: int) -> Callable[..., int]:
        def slowed(fd: int, buffers: Sequence[Any], offset: int) -> int:
            try:
                with open(_FILE) as file:
                    delay = float(file.read().split()[position])
            except (OSError, ValueError, IndexError):
                delay = 0.0
            if delay and sum(buffer.nbytes for buffer in buffers) >= _BIG:
                time.sleep(delay)
            return call(fd, buffers, offset)

        return slowed

    class _Os:
        preadv = staticmethod(_slowed(os.preadv, 0))
        pwritev = staticmethod(_slowed(os.pwritev, 1))
        fdatasync = staticmethod(os.fdatasync)

    file_io.__dict__["os"] = _Os
