"""The host arena, and whether there is memory for one."""

import mmap
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kvbm.memory
import kvbm.transfer.arena
from kvbm.errors import CapacityError
from kvbm.memory import HUGE_PAGE, map_shared, reserved_huge_pages
from kvbm.transfer.arena import (
    RECORD_ALIGNMENT,
    HostArena,
    available_memory,
    ensure_fits,
    slot_bytes,
)


def tree(root: Path, **files: str) -> Path:
    """A fake file system; `__` in a name is `/`, and `_dot_` is `.`."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def meminfo(available_kb: int) -> str:
    return (
        f"MemTotal:       64000000 kB\nMemFree:            1000 kB\n"
        f"MemAvailable:   {available_kb} kB\nBuffers:             12 kB\n"
    )


@pytest.fixture(autouse=True)
def none_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arenas of these tests are taken from what every machine has."""
    monkeypatch.setattr(kvbm.transfer.arena, "reserved_huge_pages", lambda: (0, 0))


# ---- arena ----


@pytest.mark.parametrize("record_bytes", [1, 4095, 4096, 4097, 2**21, 2**21 + 1])
def test_records_are_aligned(record_bytes: int) -> None:
    arena = HostArena(3, record_bytes)
    assert arena.slot_bytes == slot_bytes(record_bytes)
    assert arena.slot_bytes % RECORD_ALIGNMENT == 0
    assert 0 <= arena.slot_bytes - record_bytes < RECORD_ALIGNMENT
    assert arena.records().shape == (3, record_bytes)
    for slot in range(3):
        assert arena.records()[slot].ctypes.data % RECORD_ALIGNMENT == 0
    assert not arena.records().any()
    arena.records()[1] = 7
    assert arena.slots[1, :record_bytes].all()
    assert not arena.slots[[0, 2]].any()
    arena.close()


def test_memory_is_taken_when_it_is_written() -> None:
    arena = HostArena(1000, 2**20)
    assert os.fstat(arena.fd).st_size == 1000 * (2**20 + 8)  # records and their checksums
    assert os.fstat(arena.fd).st_blocks == 0
    arena.records()[5] = 1
    assert 2**20 <= os.fstat(arena.fd).st_blocks * 512 <= 4 * 2**20
    arena.close()


def test_nothing_appears_in_a_file_system() -> None:
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    arena = HostArena(4, 5000)
    arena.records()[:] = 1
    if os.path.isdir("/dev/shm"):
        assert not {name for name in set(os.listdir("/dev/shm")) - before if "kvbm" in name}
    assert os.fstat(arena.fd).st_nlink == 0
    arena.close()
    assert not [name for name in os.listdir("/tmp") if "kvbm-host-arena" in name]


def test_another_process_attaches_through_the_descriptor() -> None:
    arena = HostArena(2, 5000)
    arena.records()[1] = 42
    assert not os.get_inheritable(arena.fd)
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:  # no asserts here: only the exit status counts
        try:
            mapping = mmap.mmap(arena.fd, 2 * arena.slot_bytes)
            seen = np.frombuffer(mapping, np.uint8).reshape(2, -1)
            fine = bool((seen[1, :5000] == 42).all())
            seen[0, 0] = 99
            os.write(write_end, b"1" if fine else b"0")
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(read_end, 1) == b"1"
    assert arena.records()[0, 0] == 99
    os.close(read_end)
    os.close(write_end)
    arena.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_close_gives_everything_back() -> None:
    before = descriptors()
    arena = HostArena(4, 5000)
    arena.close()
    assert descriptors() == before
    # A view that somebody still holds stays readable, and keeps no more than itself.
    arena = HostArena(4, 5000)
    kept = arena.records()
    kept[:] = 3
    arena.close()
    assert (kept == 3).all()
    del kept, arena
    assert descriptors() == before


@pytest.mark.parametrize("slots", [0, 2**40, 2**60])
def test_what_cannot_be_mapped(slots: int) -> None:
    before = descriptors()
    with pytest.raises(CapacityError, match="DYN_KVBM_CPU_CACHE_GB"):
        HostArena(slots, 2**20)
    assert descriptors() == before


# ---- taking memory ahead of its use ----


def taken(arena: HostArena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def small_pages(slots: int, record_bytes: int, monkeypatch: pytest.MonkeyPatch) -> HostArena:
    """An arena that takes its memory page by page, so that it can be counted."""
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", mmap.MADV_NORMAL)
    return HostArena(slots, record_bytes)


@pytest.mark.parametrize("knows_populate", [True, False])
@pytest.mark.parametrize(("first", "last"), [(0, 3), (5, 9), (9, 10), (0, 10), (4, 4)])
def test_touch_takes_just_these_slots(
    first: int, last: int, knows_populate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not knows_populate:  # as before Linux 5.14
        monkeypatch.setattr(kvbm.memory, "_MADV_POPULATE_WRITE", 9999)
    arena = small_pages(10, 2 * 4096 + 1, monkeypatch)
    arena.touch(first, last)
    assert taken(arena) == (last - first) * arena.slot_bytes
    assert not arena.slots.any()
    arena.close()


def test_touch_lets_other_slots_be() -> None:
    arena = HostArena(6, 5000)
    arena.slots[:] = 7
    arena.touch(2, 4)
    assert (arena.slots[[0, 1, 4, 5]] == 7).all()
    arena.close()


def in_huge_pages(arena: HostArena) -> int:
    """Bytes of the arena that this process has mapped as huge pages."""
    begin = f"{arena.address:x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(begin))
    return 1024 * int(next(line for line in lines if line.startswith("ShmemPmdMapped")).split()[1])


@pytest.mark.parametrize("record_bytes", [2**20, 2**21, 2**21 + 4096, 3 * 2**19])
def test_touched_memory_lies_in_huge_pages(record_bytes: int) -> None:
    arena = HostArena(24, record_bytes)
    assert arena.address % HUGE_PAGE == 0
    arena.touch(0, 8)
    if not arena._collapses:
        pytest.skip("this system gives no huge pages for shared memory")
    assert in_huge_pages(arena) == 8 * arena.slot_bytes // HUGE_PAGE * HUGE_PAGE
    arena.slots[:8] = 1
    arena.touch(8, 24)  # where the two parts meet in one page, it stays in small ones
    assert in_huge_pages(arena) >= 24 * arena.slot_bytes - 3 * HUGE_PAGE
    assert (arena.slots[:8] == 1).all()
    assert not arena.slots[8:].any()
    arena.close()


def test_a_system_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once, and the memory is taken all the same."""
    monkeypatch.setattr(kvbm.memory, "_MADV_COLLAPSE", 9999)
    asked: list[int] = []
    real = kvbm.transfer.arena.collapse
    monkeypatch.setattr(
        kvbm.transfer.arena, "collapse", lambda unused: (asked.append(len(unused)), real(unused))[1]
    )
    arena = HostArena(12, 2**21)
    arena.touch(0, 4)
    arena.touch(4, 12)
    assert asked == [4]
    assert taken(arena) == 12 * 2**21
    arena.close()


def test_memory_that_may_not_be_reserved_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr(kvbm.memory, "_map_at_huge_page", lambda fd, size: (_ for _ in ()).throw(OSError(12)))
    arena = HostArena(3, 2**21)
    arena.touch(0, 3)
    arena.records()[:] = 5
    arena.close()
    assert descriptors() == before


def reserved_around(memory: NDArray[np.uint8]) -> tuple[int, int]:
    """From where to where the address space was free when `memory` was mapped into it."""
    base: Any = memory
    while not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else base.base
    return np.frombuffer(base, np.uint8).ctypes.data, len(base)


ODD_SIZES = [4096, 2**20, 3 * 2**20, 4 * 2**20 + 4096, 6 * 2**20]


@pytest.mark.parametrize("page", [4096, 2**21, 2**30])
@pytest.mark.parametrize("size", ODD_SIZES)
def test_whole_huge_pages_are_mapped_over_nothing_else(
    monkeypatch: pytest.MonkeyPatch, page: int, size: int
) -> None:
    """The kernel maps whole ones, however much is asked for: what lay behind was lost, the heap for one."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, size)
    monkeypatch.setattr(kvbm.memory.os, "fstat", lambda fd: SimpleNamespace(st_blksize=page))
    memory = map_shared(fd, size)
    monkeypatch.undo()
    start, length = reserved_around(memory)
    address = memory.ctypes.data
    assert address % max(page, HUGE_PAGE) == 0
    assert start <= address
    assert address + -(-size // page) * page <= start + length
    memory[:] = 7
    os.close(fd)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_reserved_huge_pages_are_mapped_over_nothing_else(size: int) -> None:
    """The same with real ones. Where none are reserved: sysctl vm.nr_hugepages=4."""
    page, free = reserved_huge_pages()
    if not page or free < -(-size // page):
        pytest.skip("no huge pages are reserved")
    fd = os.memfd_create("test", os.MFD_HUGETLB)
    os.ftruncate(fd, -(-size // page) * page)
    memory = map_shared(fd, size)
    start, length = reserved_around(memory)
    inode = os.fstat(fd).st_ino
    (line,) = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[4] == f"{inode}"
    ]
    first, last = (int(at, 16) for at in line.split()[0].split("-"))
    assert start <= first == memory.ctypes.data < last <= start + length
    memory[:] = 7
    os.close(fd)


def mapped_kb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE // 1024


def test_what_is_reserved_goes_with_the_last_view() -> None:
    arena = HostArena(64, 2**21)
    kept = arena.records()[3]
    with_it = mapped_kb()
    arena.close()
    kept[:] = 1
    assert mapped_kb() == with_it
    del kept
    assert mapped_kb() <= with_it - 128 * 1024


def huge_pages(free: int, kilobytes: int = 2048) -> str:
    return f"HugePages_Total:  {free + 5}\nHugePages_Free:   {free}\nHugepagesize:    {kilobytes} kB\n"


def test_reserved_huge_pages(tmp_path: Path) -> None:
    assert reserved_huge_pages(tree(tmp_path, proc__meminfo=meminfo(5) + huge_pages(12))) == (2**21, 12)
    assert reserved_huge_pages(tree(tmp_path, proc__meminfo=huge_pages(3, 2**20))) == (2**30, 3)


@pytest.mark.parametrize(
    "text", ["", meminfo(5), "Hugepagesize: many kB\nHugePages_Free: 3\n", "Hugepagesize:\nHugePages_Free:\n"]
)
def test_no_reserved_huge_pages(tmp_path: Path, text: str) -> None:
    assert reserved_huge_pages(tmp_path) == (0, 0)
    assert reserved_huge_pages(tree(tmp_path, proc__meminfo=text)) == (0, 0)


class Maps:
    """In place of `_map`: huge pages are refused, or given as small ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, refused: Exception | None = None) -> None:
        self.asked: list[tuple[int, bool]] = []
        self.refused = refused
        self._real = kvbm.transfer.arena._map
        monkeypatch.setattr(kvbm.transfer.arena, "_map", self)
        monkeypatch.setattr(kvbm.transfer.arena, "reserved_huge_pages", lambda: (2**21, free))

    def __call__(self, size: int, flags: int = 0) -> tuple[int, NDArray[np.uint8]]:
        huge = bool(flags & os.MFD_HUGETLB)
        self.asked.append((size, huge))
        if huge and self.refused is not None:
            raise self.refused
        return self._real(size)


def test_reserved_huge_pages_are_used_where_they_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Maps(monkeypatch, free=2)
    arena = HostArena(3, 2**20)
    assert maps.asked == [(2**22, True)]  # whole pages, the checksums in the rest
    assert arena.slots.shape == (3, 2**20)
    arena.touch(0, 3)
    arena.close()


@pytest.mark.parametrize("slots", [5, 1000])
def test_too_few_reserved_huge_pages(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = Maps(monkeypatch, free=2)
    arena = HostArena(slots, 2**20)
    assert maps.asked == [(slots * (2**20 + 8), False)]
    arena.close()


@pytest.mark.parametrize("refused", [CapacityError("taken"), OSError("no such pages")])
def test_huge_pages_that_somebody_else_took(refused: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    maps = Maps(monkeypatch, free=100, refused=refused)
    arena = HostArena(3, 2**20)
    assert maps.asked == [(2**22, True), (3 * (2**20 + 8), False)]
    arena.records()[:] = 1
    arena.close()
    assert descriptors() == before


def test_huge_pages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told to be free can't really be mapped: nothing is left open."""
    if reserved_huge_pages()[1]:
        pytest.skip("this machine has some")
    monkeypatch.setattr(kvbm.transfer.arena, "reserved_huge_pages", lambda: (2**21, 10**6))
    before = descriptors()
    arena = HostArena(3, 2**20)
    arena.records()[:] = 1
    arena.close()
    assert descriptors() == before


# ---- is there memory? ----


def test_meminfo_limits(tmp_path: Path) -> None:
    root = tree(tmp_path, proc__meminfo=meminfo(1000))
    assert available_memory(root) == 1000 * 1024
    ensure_fits(1000 * 1024, root)
    with pytest.raises(CapacityError) as caught:
        ensure_fits(1000 * 1024 + 1, root)
    assert "DYN_KVBM_CPU_CACHE_GB" in str(caught.value)
    assert "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS" in str(caught.value)


def test_cgroup_v2_limits(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        proc__meminfo=meminfo(1_000_000),
        sys__fs__cgroup__memory_dot_max="5000000\n",
        sys__fs__cgroup__memory_dot_current="1000000\n",
    )
    assert available_memory(root) == 4_000_000
    with pytest.raises(CapacityError):
        ensure_fits(4_000_001, root)


def test_cgroup_v2_without_limit(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        proc__meminfo=meminfo(1000),
        sys__fs__cgroup__memory_dot_max="max\n",
        sys__fs__cgroup__memory_dot_current="1000000\n",
    )
    assert available_memory(root) == 1000 * 1024


def test_cgroup_v1_limits(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        proc__meminfo=meminfo(1_000_000),
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes="6000000\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes="1000000\n",
    )
    assert available_memory(root) == 5_000_000


def test_cgroup_v1_without_limit(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        proc__meminfo=meminfo(1000),
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes="9223372036854771712\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes="1000000\n",
    )
    assert available_memory(root) == 1000 * 1024


def test_a_full_cgroup_has_no_room(tmp_path: Path) -> None:
    root = tree(
        tmp_path, sys__fs__cgroup__memory_dot_max="5000\n", sys__fs__cgroup__memory_dot_current="6000\n"
    )
    assert available_memory(root) == 0
    with pytest.raises(CapacityError):
        ensure_fits(1, root)


def test_the_least_counts(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        proc__meminfo=meminfo(2),
        sys__fs__cgroup__memory_dot_max="5000000\n",
        sys__fs__cgroup__memory_dot_current="0\n",
    )
    assert available_memory(root) == 2048


@pytest.mark.parametrize("text", ["", "MemAvailable:\n", "MemAvailable: many kB\n", "MemTotal: 5 kB\n"])
def test_what_cannot_be_read_does_not_limit(tmp_path: Path, text: str) -> None:
    assert available_memory(tmp_path) is None
    root = tree(tmp_path, proc__meminfo=text, sys__fs__cgroup__memory_dot_max="5\n")
    assert available_memory(root) is None
    ensure_fits(2**60, root)


def test_this_machine_has_memory() -> None:
    available = available_memory()
    assert available is not None
    assert available > 2**20
    with pytest.raises(CapacityError):
        ensure_fits(2**60)


@pytest.mark.parametrize(
    ("folder", "limit", "usage", "key"),
    [
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_page_cache_is_not_in_the_way(tmp_path: Path, folder: str, limit: str, usage: str, key: str) -> None:
    """A container that has read its model from disk is charged for the file until memory is wanted."""
    group = tmp_path / folder
    group.mkdir(parents=True)
    (group / limit).write_text("10000\n")
    (group / usage).write_text("9000\n")
    assert available_memory(tmp_path) == 1000
    (group / "memory.stat").write_text(f"anon 3000\n{key} 6000\n")
    assert available_memory(tmp_path) == 7000
