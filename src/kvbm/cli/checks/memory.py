"""Checks of memory: is there enough, can it be pinned, does it come in huge pages."""

import os
import re
import resource
from pathlib import Path

from kvbm.cli.checks.finding import Finding, State, read
from kvbm.cli.output import size
from kvbm.config import Config

_STAGING_BYTES = 1e9  # the most that a disk tier alone takes of host memory
_LITTLE_SHM = 1e9
_SHMEM_HUGE = "sys/kernel/mm/transparent_hugepage/shmem_enabled"


def host_bytes(config: Config) -> float | None:
    """Size of the host tier; None where it is given in blocks, whose size only the engine knows."""
    if config.host.num_blocks:
        return None
    return config.host.cache_gb * 1e9 or (_STAGING_BYTES if config.has_disk else 0.0)


def check_host_memory(config: Config, root: Path = Path("/")) -> Finding:
    from kvbm.transfer.arena import available_memory

    name = "host memory"
    available = available_memory(root)
    if available is None:
        return Finding(name, State.UNKNOWN, "this system does not tell how much memory is available")
    room = f"{size(available)} available ({_limits(root)})"
    if not config.enabled:
        return Finding(
            name,
            State.ADVICE,
            f"{room}; no cache is configured, so KVBM is off",
            "Give it memory, for example DYN_KVBM_CPU_CACHE_GB="
            f"{max(1, int(available * 0.5 / 1e9))} (GB, the sum over all ranks).",
        )
    needed = host_bytes(config)
    if needed is None:
        return Finding(
            name,
            State.UNKNOWN,
            f"{room}; the host tier is set to {config.host.num_blocks:,} blocks, whose size is the model's",
            "The engine says so at start if it is too much.",
        )
    found = f"{room}, the host tier takes {size(needed)}"
    if needed > available:
        return Finding(
            name,
            State.PROBLEM,
            found,
            "Lower DYN_KVBM_CPU_CACHE_GB, or give the machine or container more memory. (An engine that runs "
            "with KVBM already has taken its own.)",
        )
    return Finding(name, State.OK, found)


def _limits(root: Path) -> str:
    """What bounds memory here, in words."""
    for file in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = read(root / file) or ""
        # cgroup v1 writes "no limit" as a number near 2**63.
        if text.isdigit() and int(text) < 2**60:
            return f"the container's limit is {size(int(text))}"
    total = re.search(r"^MemTotal:\s+(\d+) kB", read(root / "proc/meminfo") or "", re.MULTILINE)
    return f"the machine has {size(int(total[1]) * 1024)}" if total else "no limit by a container"


def check_shared_memory(total: float | None) -> Finding:
    """Of /dev/shm. The arena is a memfd and takes nothing of it, the engine's processes do."""
    name = "shared memory"
    if total is None:
        return Finding(
            name,
            State.ADVICE,
            "no /dev/shm here: KVBM does not need it, but engines talk between their processes through it",
            "Mount a tmpfs there (docker: --shm-size 8g).",
        )
    found = f"/dev/shm holds {size(total)} (for the engine; KVBM's host tier is not limited by it)"
    if total < _LITTLE_SHM:
        return Finding(
            name, State.ADVICE, found, "Give the container more: --shm-size 8g (docker), or --ipc=host."
        )
    return Finding(name, State.OK, found)


def shared_memory_bytes(root: Path = Path("/")) -> float | None:
    try:
        stat = os.statvfs(root / "dev/shm")
    except OSError:
        return None
    return float(stat.f_blocks * stat.f_frsize)


def check_locked_memory(config: Config, has_gpu: bool, limit: int) -> Finding:
    """limit: bytes that may be locked, as resource.getrlimit gives it."""
    name = "locked memory"
    shown = "unlimited" if limit == resource.RLIM_INFINITY else size(limit)
    found = f"ulimit -l is {shown}"
    if not has_gpu:
        return Finding(name, State.OK, f"{found}; without a GPU nothing is locked")
    needed = host_bytes(config)
    if limit == resource.RLIM_INFINITY or (needed is not None and needed <= limit):
        return Finding(name, State.OK, found)
    return Finding(
        name,
        State.ADVICE,
        f"{found}, less than the host tier that is to be pinned for the GPU",
        "Not every driver counts this. If the engine's log says that the host tier can't be pinned: "
        "ulimit -l unlimited; docker: --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity.",
    )


def check_huge_pages(config: Config, root: Path = Path("/")) -> Finding:
    name = "huge pages"
    info = dict(re.findall(r"^(\w+):\s+(\d+)", read(root / "proc/meminfo") or "", re.MULTILINE))
    try:
        page = int(info["Hugepagesize"]) * 1024
        total, free = int(info["HugePages_Total"]), int(info["HugePages_Free"])
    except KeyError:
        page = total = free = 0
    reserved = (
        f"{free:,} of {total:,} reserved pages are free ({size(free * page)})" if total else "none reserved"
    )
    transparent = _transparent(root)
    found = f"{reserved}; transparent ones for shared memory: {transparent or 'not in this kernel'}"
    needed = host_bytes(config)
    wanted = -(-int(needed or 0) // page) if page else 0
    if wanted and free >= wanted:
        return Finding(name, State.OK, found)
    if transparent in ("always", "within_size", "advise", "force"):
        return Finding(name, State.OK, found)
    if transparent == "never" and _linux(root) >= (6, 1):
        return Finding(name, State.OK, f"{found}, but KVBM asks for them itself where it pins memory")
    to_do = f"As root: echo advise > /{_SHMEM_HUGE}" if transparent else ""
    if wanted:
        to_do += f"{'; or reserve' if to_do else 'As root, reserve'} them: sysctl vm.nr_hugepages={wanted}"
    return Finding(
        name,
        State.ADVICE,
        found,
        f"{to_do}. Small pages work; they take longer to touch and to pin." if to_do else "",
    )


def _linux(root: Path) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", read(root / "proc/sys/kernel/osrelease") or "")
    return tuple(map(int, found.groups())) if found else (0, 0)


def _transparent(root: Path) -> str | None:
    chosen = re.search(r"\[(\w+)\]", read(root / _SHMEM_HUGE) or "")
    return chosen[1] if chosen else None
