"""The host arena, and whether there is memory for one."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from kvbm.errors import CapacityError
from kvbm.transfer.arena import RECORD_ALIGNMENT, HostArena, available_memory, ensure_fits, slot_bytes


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
    assert os.fstat(arena.fd).st_size == 1000 * 2**20
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
