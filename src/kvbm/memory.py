"""Shared memory that lies in huge pages where the system gives them.

They matter to all that handles records: CUDA pins them twice as fast (1 GiB in 29 ms instead of 61, H100) and
they are taken from the system in less than half the time (0.2 s a GiB instead of 0.5), a virtual disk reads
8 to 25 % more into them, and a checksum is a third faster.
"""

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE = 2 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
]
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MADV_COLLAPSE = 25  # Linux 6.1


def map_shared(fd: int, size: int) -> NDArray[np.uint8]:
    """The first `size` bytes of a file. They are unmapped with the last view of them. OSError, ValueError."""
    try:
        memory = _map_at_huge_page(fd, size)
    except OSError:  # a limit on what is reserved, for one
        memory = np.frombuffer(mmap.mmap(fd, size), np.uint8, size)
    _advise(memory.ctypes.data, size, mmap.MADV_HUGEPAGE)
    return memory


def collapse(unused: NDArray[np.uint8]) -> bool:
    """Take unused memory as huge pages, as far as it covers whole ones.

    False where the system has none: it is too old, forbids them, or its memory is too scattered.
    """
    first = -(-unused.ctypes.data // HUGE_PAGE) * HUGE_PAGE
    end = (unused.ctypes.data + unused.nbytes) // HUGE_PAGE * HUGE_PAGE
    for at in range(first, end, HUGE_PAGE):  # what has no page at all is not collapsed
        _advise(at, mmap.PAGESIZE, _MADV_POPULATE_WRITE)
    return first >= end or not _advise(first, end - first, _MADV_COLLAPSE)


def populate(unused: NDArray[np.uint8]) -> None:
    """Take unused memory, of any shape, from the system. Without the GIL. OSError when there is none."""
    start = unused.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    error = _advise(start, unused.ctypes.data + unused.nbytes - start, _MADV_POPULATE_WRITE)
    if error == errno.EINVAL:
        unused.reshape(-1)[:: mmap.PAGESIZE] = 0
    elif error:  # no memory: to write there would kill the process
        raise OSError(error, os.strerror(error))


def reserved_huge_pages(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of a huge page, and how many are reserved and free."""
    try:
        lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        return int(lines["Hugepagesize"].split()[0]) * 1024, int(lines["HugePages_Free"])
    except (OSError, ValueError, KeyError, IndexError):
        return 0, 0


def _map_at_huge_page(fd: int, size: int) -> NDArray[np.uint8]:
    """A system that was not told to use huge pages for shared memory maps it anywhere."""
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    # A file in reserved huge pages is mapped in whole ones, over whatever lies behind `size`.
    page = max(HUGE_PAGE, os.fstat(fd).st_blksize)
    reserved = mmap.mmap(-1, -(-size // page) * page + page, flags=kind)
    start = np.frombuffer(reserved, np.uint8).ctypes.data
    offset = -start % page
    wanted: Any = start + offset
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if _libc.mmap(wanted, size, access, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != wanted:
        raise OSError(ctypes.get_errno(), "can't be mapped at a huge page")
    return np.frombuffer(reserved, np.uint8, size, offset)


def _advise(address: int, size: int, advice: int) -> int:
    """The error's number, or 0."""
    failed = _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)
    return ctypes.get_errno() if failed else 0
