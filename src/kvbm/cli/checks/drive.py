"""Checks of the disk tier's directories: what they lie on, how much room there is, how fast it is."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvbm.cli.checks.finding import Finding, State, read
from kvbm.cli.output import size
from kvbm.config import Config

_IN_MEMORY = ("tmpfs", "ramfs")
_OVER_NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "ceph",
    "glusterfs",
    "lustre",
    "beegfs",
    "virtiofs",
    "fuse",
)
_PROBE_BYTES, _RECORD = 256 << 20, 2 << 20
_READERS, _WRITERS = 8, 4  # as many records as a rank reads and writes at once by default
_SLOW = 0.5e9  # bytes per second read; computing is seldom slower

_libc = ctypes.CDLL(None, use_errno=True)


def folders_of(config: Config) -> list[Path]:
    return [Path(folder.strip()) for folder in config.disk.dir.split(":") if folder.strip()]


def existing(folder: Path) -> Path:
    """The directory, or the nearest one above it that exists: KVBM makes the rest."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def file_system(folder: Path, mountinfo: str) -> str | None:
    """Kind of the file system that holds an absolute path, by /proc/self/mountinfo."""
    best, kind = -1, None
    for line in mountinfo.splitlines():
        fields = line.split()
        try:
            mount = Path(_unescaped(fields[4]))
            found = fields[fields.index("-") + 1]
        except (IndexError, ValueError):
            continue
        if folder.is_relative_to(mount) and len(mount.parts) >= best:  # a later mount hides an earlier one
            best, kind = len(mount.parts), found
    return kind


def _unescaped(text: str) -> str:
    for code in ("\\040", "\\011", "\\012", "\\134"):
        text = text.replace(code, chr(int(code[1:], 8)))
    return text


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a file system does with a file of ours."""

    fallocate: bool
    o_direct: bool


def check_file_system(folder: Path, kind: str | None, abilities: Abilities | OSError) -> Finding:
    name = f"disk {folder}"
    found = f"file system {kind or 'of unknown kind'}"
    if isinstance(abilities, OSError):
        return Finding(
            name,
            State.PROBLEM,
            f"{found}; no file can be made there: {abilities.strerror or abilities}",
            "Let the engine's user write there, or name another directory with DYN_KVBM_DISK_CACHE_DIR.",
        )
    if kind in _IN_MEMORY:
        return Finding(
            name,
            State.ADVICE,
            f"{found}: it lies in memory, which the host tier uses better, and is empty after a reboot",
            "Name a directory on a drive with DYN_KVBM_DISK_CACHE_DIR.",
        )
    if kind and kind.split(".")[0] in _OVER_NETWORK:
        return Finding(
            name,
            State.ADVICE,
            f"{found}: it lies across a network or in another system",
            "A drive of this machine is faster, and keeps its promises in a power cut.",
        )
    found += f", fallocate {_yes(abilities.fallocate)}, O_DIRECT {_yes(abilities.o_direct)}"
    if not abilities.fallocate:
        return Finding(
            name,
            State.ADVICE,
            found,
            "Files are sparse here, and room may lack later; DYN_KVBM_DISK_ZEROFILL_FALLBACK=1 takes it now.",
        )
    if not abilities.o_direct:
        return Finding(
            name,
            State.ADVICE,
            found,
            "Records go through the page cache, which costs memory and CPU: ext4 and xfs have O_DIRECT.",
        )
    return Finding(name, State.OK, found)


def _yes(has: bool) -> str:
    return "yes" if has else "no"


def check_room(config: Config, free: dict[Path, tuple[int, int]]) -> list[Finding]:
    """free: for each directory the number of its device, and bytes that are free or KVBM's already."""
    share = config.disk.cache_gb * 1e9 / len(free)
    findings = []
    for folder, (device, room) in free.items():
        together = sum(other == device for other, _ in free.values())
        name, found = f"room in {folder}", f"{size(room)} free or KVBM's already"
        if config.disk.num_blocks:
            findings.append(
                Finding(
                    name,
                    State.UNKNOWN,
                    f"{found}; the size is set to {config.disk.num_blocks:,} blocks, and how large one is "
                    f"depends on the model",
                    "The engine says so at start if it is too much.",
                )
            )
            continue
        needed = share * together
        found += f"; {size(needed)} wanted, and {size(config.disk.min_free_gb * 1e9)} to stay free"
        if needed + config.disk.min_free_gb * 1e9 > room:
            to_do = "Lower DYN_KVBM_DISK_CACHE_GB (or KVBM_DISK_MIN_FREE_GB), or name another directory."
            findings.append(Finding(name, State.PROBLEM, found, to_do))
        else:
            findings.append(Finding(name, State.OK, found))
    return findings


def room_in(folder: Path) -> tuple[int, int]:
    """Number of the device, and bytes that are free there or held by records of an earlier run."""
    place = existing(folder)
    stat = os.statvfs(place)
    room = stat.f_bavail * stat.f_frsize
    for rank in _last_ranks(folder):
        for file in rank.glob("records-*"):
            with contextlib.suppress(OSError):
                room += file.stat().st_blocks * 512
    return place.stat().st_dev, room


def _last_ranks(folder: Path) -> Iterator[Path]:
    """Folders of the ranks that stored last: an engine with another number of them makes files of its own."""
    from kvbm.storage.containers import numbers_of_ranks, rank_folder  # slow: it imports numpy

    for replica in folder.glob("kvbm-*"):
        numbers = numbers_of_ranks(rank_folder(replica, 0, 1))
        if numbers:
            yield from (rank_folder(replica, rank, numbers[0]) for rank in range(numbers[0]))
        else:
            yield from replica.glob("rank-*")


@contextlib.contextmanager
def _probe(folder: Path, bytes_: int) -> Iterator[tuple[int, Abilities]]:
    """A nameless file of so many bytes, gone when this ends, and what the file system did for it."""
    with tempfile.TemporaryFile(dir=existing(folder), prefix="kvbm-doctor-", buffering=0) as file:
        fd = file.fileno()
        # Not os.posix_fallocate: where the file system can't, it writes the file full.
        fallocate = not _libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(bytes_))
        if not fallocate:
            code = ctypes.get_errno()
            if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(code, os.strerror(code))
            os.ftruncate(fd, bytes_)
        yield fd, Abilities(fallocate, _make_direct(fd))


def _make_direct(fd: int) -> bool:
    """Whether the descriptor goes past the page cache from here on."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            if os.pwritev(fd, [page], 0) == os.preadv(fd, [page], 0) == mmap.PAGESIZE:
                return True
    except OSError:
        pass
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return False


def abilities_of(folder: Path) -> Abilities | OSError:
    try:
        with _probe(folder, 1 << 20) as (_, abilities):
            return abilities
    except OSError as error:
        return error


@dataclass(frozen=True, slots=True)
class DiskRate:
    """Bytes per second."""

    write: float
    read: float
    direct: bool  # else the page cache was measured as well


def measure_disk(folder: Path, bytes_: int = _PROBE_BYTES) -> DiskRate:
    """Records of 2 MiB, several at once, in a pre-allocated file that is gone afterwards. OSError."""
    with _probe(folder, bytes_) as (fd, abilities):
        _move(fd, bytes_, write=True)  # the first write converts the file's extents
        write = _move(fd, bytes_, write=True)
        return DiskRate(write, _move(fd, bytes_, write=False), abilities.o_direct)


def _move(fd: int, bytes_: int, *, write: bool) -> float:
    """Bytes per second."""
    workers = _WRITERS if write else _READERS
    buffers = [mmap.mmap(-1, _RECORD) for _ in range(workers)]  # aligned, as O_DIRECT wants it
    for buffer in buffers:
        buffer[:] = os.urandom(_RECORD)  # nothing that a drive could make smaller

    def work(first: int) -> None:
        for offset in range(first * _RECORD, bytes_, workers * _RECORD):
            piece = [buffers[first]]
            if (os.pwritev(fd, piece, offset) if write else os.preadv(fd, piece, offset)) != _RECORD:
                raise OSError(errno.EIO, "a record was moved in part only")

    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))
    if write:
        os.fdatasync(fd)
    seconds = time.perf_counter() - started
    for buffer in buffers:
        buffer.close()
    return bytes_ / seconds


def check_rate(folder: Path, rate: DiskRate | OSError) -> Finding:
    name = f"speed of {folder}"
    if isinstance(rate, OSError):
        return Finding(name, State.UNKNOWN, f"could not be measured: {rate.strerror or rate}")
    found = f"writes {rate.write / 1e9:.2f} GB/s, reads {rate.read / 1e9:.2f} GB/s"
    if not rate.direct:
        return Finding(name, State.UNKNOWN, f"{found}, through the page cache: the drive may be slower")
    if rate.read < _SLOW:
        return Finding(
            name,
            State.ADVICE,
            found,
            "KVBM reads only what is had sooner than by computing it, which from so slow a drive is little.",
        )
    return Finding(name, State.OK, found)


def mounts(root: Path = Path("/")) -> str:
    return read(root / "proc/self/mountinfo") or ""
