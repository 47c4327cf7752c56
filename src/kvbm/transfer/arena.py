"""Host arena: the memory of the host tier of one rank.

An anonymous shared mapping (memfd): a process that inherits its descriptor, or is told of it, can attach to
the same bytes, nothing appears in a file system, and nothing is left behind when the engine is killed.
"""

import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvbm.errors import CapacityError, LayoutError
from kvbm.memory import collapse, map_shared, populate, reserved_huge_pages

RECORD_ALIGNMENT = 4096  # a record is one O_DIRECT-capable I/O on the tiers below


def slot_bytes(record_bytes: int) -> int:
    """Bytes that a record takes in an arena."""
    return -(-record_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


@dataclass(frozen=True, slots=True)
class ArenaHandle:
    """Names an arena to other processes of the machine, as long as the one that made it lives."""

    pid: int
    fd: int
    size: int  # of records and checksums; the file is larger in reserved huge pages
    device: int  # with the inode: a number of a process or descriptor may have been given anew
    inode: int


class HostArena:
    """`num_slots` records of `record_bytes` each; pages are taken from the system when first written.

    In reserved huge pages where enough are free, else in transparent ones where the system gives them, which
    it does more readily to what is touched before its use.
    same_as: another process's arena of the same size, to use its memory; LayoutError where it can't be had.
    """

    def __init__(self, num_slots: int, record_bytes: int, same_as: ArenaHandle | None = None) -> None:
        self.num_slots = num_slots
        self.record_bytes = record_bytes
        self.slot_bytes = slot_bytes(record_bytes)
        size = num_slots * self.slot_bytes
        with_checksums = size + 8 * num_slots
        if same_as is not None:
            self.fd, memory = _attach(same_as, with_checksums)
        else:
            self.fd, memory = _map_huge_pages(with_checksums) or _map(with_checksums)
        self._close_fd = weakref.finalize(self, os.close, self.fd)  # also where nobody calls `close`
        self._collapses = True
        self.slots: NDArray[np.uint8] = memory[:size].reshape(num_slots, self.slot_bytes)
        # Beside the records: whoever shares them has to be able to check them.
        self.checksums: NDArray[np.uint64] = memory[size:with_checksums].view(np.uint64)

    @property
    def handle(self) -> ArenaHandle:
        stat = os.fstat(self.fd)
        size = self.slots.nbytes + self.checksums.nbytes
        return ArenaHandle(os.getpid(), self.fd, size, stat.st_dev, stat.st_ino)

    def records(self) -> NDArray[np.uint8]:
        """View of all records, shape (num_slots, record_bytes)."""
        return self.slots[:, : self.record_bytes]

    @property
    def address(self) -> int:
        """Of the first record."""
        return self.slots.ctypes.data

    def touch(self, first: int, last: int) -> None:
        """Take the memory of slots first .. last-1, still unused, from the system. Without the GIL.

        OSError when there is none.
        """
        unused = self.slots[first:last]
        if self._collapses:  # where it once did not, it would be tried in vain and at length
            self._collapses = collapse(unused)
        populate(unused)

    def close(self) -> None:
        """Give the memory back once no view of it is left."""
        del self.slots, self.checksums
        self._close_fd()


def _map(size: int, flags: int = 0) -> tuple[int, NDArray[np.uint8]]:
    fd = os.memfd_create("kvbm-host-arena", os.MFD_CLOEXEC | flags)
    try:
        os.ftruncate(fd, size)
        return fd, map_shared(fd, size)
    except (OSError, ValueError, OverflowError) as error:
        os.close(fd)
        raise CapacityError(
            f"The host tier of {size / 1e9:.2f} GB can't be mapped: {error}. Lower DYN_KVBM_CPU_CACHE_GB."
        ) from error


def _attach(handle: ArenaHandle, size: int) -> tuple[int, NDArray[np.uint8]]:
    try:
        fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise LayoutError(f"The host tier of process {handle.pid} can't be shared: {error}.") from error
    try:
        stat = os.fstat(fd)
        same = (stat.st_dev, stat.st_ino) == (handle.device, handle.inode) and stat.st_size >= size
        if not same or handle.size != size:
            raise LayoutError(f"Process {handle.pid} has no host tier of {size} bytes any more.")
        return fd, map_shared(fd, stat.st_size)
    except BaseException:
        os.close(fd)
        raise


def _map_huge_pages(size: int) -> tuple[int, NDArray[np.uint8]] | None:
    page, free = reserved_huge_pages()
    pages = -(-size // page) if page else 0
    if not pages or pages > free:
        return None
    try:
        return _map(pages * page, os.MFD_HUGETLB)
    except (CapacityError, OSError):  # somebody else took them meanwhile, or they are of another size
        return None


def ensure_fits(total_bytes: int, root: Path = Path("/")) -> None:
    """Raise CapacityError when this machine, or the cgroup we run in, can't hold `total_bytes` more."""
    available = available_memory(root)
    if available is not None and total_bytes > available:
        raise CapacityError(
            f"The host tier needs {total_bytes / 1e9:.2f} GB but only {available / 1e9:.2f} GB of memory are "
            f"available here. Lower DYN_KVBM_CPU_CACHE_GB (or DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS), or "
            f"give the machine or container more memory."
        )


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be taken: the least of /proc/meminfo's MemAvailable and the cgroup's headroom."""
    limits: list[int] = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    for folder, limit_file, usage_file in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),  # cgroup v2
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),  # v1
    ):
        group = root / folder
        try:
            limit = int((group / limit_file).read_text())  # "max" where there is no limit: ValueError
            used = int((group / usage_file).read_text()) - _page_cache(group)
            limits.append(max(0, limit - used))
        except (OSError, ValueError):
            continue
    return min(limits) if limits else None


def _page_cache(group: Path) -> int:
    """Bytes that a cgroup is charged for file contents that the kernel drops when memory is wanted."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0
