"""Container files: the pre-allocated files that hold the records of one rank, in one or several directories.

Records are dealt out over files in turn, as writes to one file wait for its inode's lock. A file has its full
size from the start and never grows. It begins with a page that says what it is, and a slot is a header page
and the record, both aligned for O_DIRECT. The page of file 0 also has the epoch of the records that count.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from kvbm.errors import CapacityError, StorageError
from kvbm.storage.record import FORMAT, HEADER_BYTES
from kvbm.storage.store import Bytes

logger = logging.getLogger(__name__)

PAGE = HEADER_BYTES
FILES_PER_DIRECTORY = 4

_libc = ctypes.CDLL(None, use_errno=True)
_MAGIC = b"KVBMFILE"
_TITLE = struct.Struct("<8sIIIQQ")  # magic, format, file number, files, slots in all, stride
_EPOCH = struct.Struct("<QQ")  # epoch, xxh3 of its eight bytes
_EPOCH_AT = 512  # in a sector of its own: a power cut leaves the old one or the new
_ZEROS = 8 << 20  # bytes written at once where a file must be filled with zeros


@dataclass(frozen=True, slots=True)
class Allocation:
    """How files are made. See the settings of the same names in kvbm.config."""

    zerofill_fallback: bool = False
    o_direct: bool = True
    open_direct: bool = False  # O_DIRECT when the file is opened, not afterwards
    min_free_bytes: int = 0


def stride_of(slot_bytes: int) -> int:
    """Bytes that a record takes on disk, given those that it takes in an arena."""
    return HEADER_BYTES + slot_bytes


def paths_of(folders: Sequence[Path]) -> list[Path]:
    """The container files of a store, in the order of their numbers."""
    count = FILES_PER_DIRECTORY * len(folders)
    return [folders[i % len(folders)] / f"records-{i:02d}.kvbm" for i in range(count)]


def size_of(number: int, files: int, num_slots: int, stride: int) -> int:
    """Bytes of container file `number`."""
    return PAGE + stride * (num_slots // files + (number < num_slots % files))


def rank_folder(replica: Path, rank: int, ranks: int) -> Path:
    """Where a rank's files lie in the folder of its engine: each number of ranks has its own."""
    return replica / (f"rank-{rank}-of-{ranks}" if ranks > 1 else f"rank-{rank}")


def numbers_of_ranks(folder: Path) -> list[int]:
    """Of all that have stored something beside a rank's folder, those first that did so last."""
    found = {}
    for index in folder.parent.glob("rank-0*/index.kvbm"):
        number = index.parent.name.removeprefix("rank-0").removeprefix("-of-") or "1"
        if number.isdecimal() and rank_folder(folder.parent, 0, int(number)) == index.parent:
            with contextlib.suppress(OSError):
                found[int(number)] = index.stat().st_mtime_ns
    return sorted(found, key=found.__getitem__, reverse=True)


def ensure_room(folders: Sequence[Path], num_slots: int, stride: int, min_free_bytes: int) -> None:
    """Make the folders; CapacityError where they can't be made or their drives lack the room.

    What the files of an earlier run occupy counts as room.
    """
    needed: dict[int, int] = {}
    free: dict[int, int] = {}
    paths = paths_of(folders)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stat = os.statvfs(folder)
            if stat.f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            free[folder.stat().st_dev] = stat.f_bavail * stat.f_frsize
        except OSError as error:
            raise CapacityError(
                f"The disk cache can't be kept in {folder}: {error.strerror}. Name another directory with "
                f"DYN_KVBM_DISK_CACHE_DIR."
            ) from error
    for number, path in enumerate(paths):
        device = path.parent.stat().st_dev
        needed[device] = needed.get(device, 0) + size_of(number, len(paths), num_slots, stride)
    for path in _files_in(folders):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            free[stat.st_dev] += stat.st_blocks * 512
    for folder in folders:
        device = folder.stat().st_dev
        if needed[device] + min_free_bytes > free[device]:
            others = " ".join(sorted({str(path.parent) for path in _files_of_other_splits(folder)}))
            advice = f" Or delete what another number of ranks has stored: {others}" if others else ""
            raise CapacityError(
                f"The disk cache needs {needed[device] / 1e9:.2f} GB in {folder} and leaves "
                f"{min_free_bytes / 1e9:.2f} GB free, but only {free[device] / 1e9:.2f} GB are to be had. "
                f"Lower DYN_KVBM_DISK_CACHE_GB (or KVBM_DISK_MIN_FREE_GB), or name another directory with "
                f"DYN_KVBM_DISK_CACHE_DIR.{advice}"
            )


def _files_in(folders: Sequence[Path]) -> Iterator[Path]:
    """All container files, half-made ones and those of other numbers of folders among them."""
    for folder in dict.fromkeys(folders):
        yield from folder.glob("records-*")


def _files_of_other_splits(folder: Path) -> Iterator[Path]:
    """Container files of other numbers of ranks beside those of a rank's folder."""
    for path in folder.parent.glob("rank-*/records-*"):
        if path.parent.name.partition("-of-")[2] != folder.name.partition("-of-")[2]:
            yield path


def lies_in_memory(folder: Path) -> bool:
    """Whether a folder is on a file system without a drive, as /tmp may be."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return False
    # Behind the separator "-" comes the kind of file system.
    return any(m[2] == number and m[m.index("-") + 1] in ("tmpfs", "ramfs") for m in mounts)


class Containers:
    """The open files. Those of another size or geometry are made anew; StorageError where that fails.

    read_only: nothing is changed, and files that are not as they should be are a StorageError.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        num_slots: int,
        slot_bytes: int,
        how: Allocation,
        *,
        read_only: bool = False,
    ) -> None:
        self.stride = stride_of(slot_bytes)
        self.num_slots = num_slots
        self.kept = True  # all files are those of an earlier run
        self.foreign = False  # there were files, with records of another size
        self.direct = how.o_direct
        self.sparse = False  # the file system may run out of room while records are written
        self.epoch = 0  # of the last clearing
        self.fds: list[int] = []
        self._folders = folders
        self._how = how
        self._read_only = read_only
        paths = paths_of(folders)
        path = paths[0]
        try:
            for path in set() if read_only else set(_files_in(folders)) - set(paths):
                path.unlink()
            for number, path in enumerate(paths):
                size = size_of(number, len(paths), num_slots, self.stride)
                self.fds.append(self._open(path, self._title(number), size))
            self.epoch = _read_epoch(paths[0])
        except OSError as error:
            self.close()
            raise StorageError(f"{path} can't be prepared: {error.strerror or error}") from error

    def place(self, slot: int) -> tuple[int, int]:
        """Descriptor of the file and offset of a slot's header."""
        return self.fds[slot % len(self.fds)], PAGE + slot // len(self.fds) * self.stride

    def encode_epoch(self, page: Bytes, epoch: int) -> tuple[int, int]:
        """Fill the page that gives the store another epoch; its file's descriptor and its offset."""
        page[:] = 0
        title = self._title(0)
        page[: len(title)] = np.frombuffer(title, np.uint8)
        _EPOCH.pack_into(page.data, _EPOCH_AT, epoch, _check(epoch))
        return self.fds[0], 0

    @property
    def free_bytes(self) -> int:
        """Least room left on any of the drives."""
        stats = [os.statvfs(folder) for folder in self._folders]
        return min(stat.f_bavail * stat.f_frsize for stat in stats)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def _title(self, number: int) -> bytes:
        files = FILES_PER_DIRECTORY * len(self._folders)
        return _TITLE.pack(_MAGIC, FORMAT, number, files, self.num_slots, self.stride)

    # ---- opening ----

    def _open(self, path: Path, title: bytes, size: int) -> int:
        if not _is_intact(path, title, size):
            if self._read_only:
                raise FileNotFoundError(errno.ENOENT, "it is missing or of another size")
            self.kept = False
            self.foreign |= _is_foreign(path, self.stride)
            # A new file takes the name when it is whole: a crash leaves the old one or none.
            fresh = path.with_suffix(".new")
            path.unlink(missing_ok=True)
            self._make(fresh, title, size)
            os.replace(fresh, path)
        self.sparse |= path.stat().st_blocks * 512 < size
        flags = (os.O_RDONLY if self._read_only else os.O_RDWR) | os.O_CLOEXEC
        if self.direct:
            try:
                return self._open_direct(path, flags)
            except OSError as error:
                self._without_direct(path, error)
        return os.open(path, flags)

    def _open_direct(self, path: Path, flags: int) -> int:
        """A descriptor through which a page can be read and written as records will be; else OSError."""
        fd = os.open(path, flags | os.O_DIRECT if self._how.open_direct else flags)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
            with mmap.mmap(-1, PAGE) as page:
                if os.preadv(fd, [page], 0) != PAGE or (
                    not self._read_only and os.pwritev(fd, [page], 0) != PAGE
                ):
                    raise OSError(errno.EIO, "a page could not be read and written whole")
        except OSError:
            os.close(fd)
            raise
        return fd

    def _without_direct(self, path: Path, error: OSError) -> None:
        if error.errno != errno.EINVAL:
            raise error
        logger.warning("%s: no O_DIRECT here; records go through the page cache", path)
        self.direct = False

    def _make(self, path: Path, title: bytes, size: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self._allocate(fd, path, size)
            os.pwrite(fd, title.ljust(PAGE, b"\0"), 0)
            os.fsync(fd)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def _allocate(self, fd: int, path: Path, size: int) -> None:
        # Not os.posix_fallocate: where the file system can't, it writes the file full, asked or not.
        status = _libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(size))
        code = ctypes.get_errno() if status else 0
        if code and code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
        if not code:
            return
        if self._how.zerofill_fallback:
            logger.warning("%s: no fallocate here; the file is filled with zeros", path)
            zeros = np.zeros(_ZEROS, np.uint8)
            for start in range(0, size, _ZEROS):
                part = zeros[: min(_ZEROS, size - start)]
                if os.pwrite(fd, part.data, start) != len(part):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            logger.warning(
                "%s: no fallocate here; the file is sparse, and room may lack later "
                "(DYN_KVBM_DISK_ZEROFILL_FALLBACK=1 takes it now)",
                path,
            )
            os.ftruncate(fd, size)


def _read_epoch(path: Path) -> int:
    """0 where none was ever written, or it is damaged: then the index or the headers know."""
    with path.open("rb") as file:
        epoch, check = _EPOCH.unpack_from(file.read(PAGE), _EPOCH_AT)
    return epoch if check == _check(epoch) else 0


def _check(epoch: int) -> int:
    return xxhash.xxh3_64_intdigest(epoch.to_bytes(8, "little"))


def _is_foreign(path: Path, stride: int) -> bool:
    try:
        with path.open("rb") as file:
            magic, _, _, _, _, theirs = _TITLE.unpack(file.read(_TITLE.size))
    except (OSError, struct.error):
        return False
    return magic == _MAGIC and theirs != stride


def _is_intact(path: Path, title: bytes, size: int) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(title)) == title and os.fstat(file.fileno()).st_size == size
    except OSError:
        return False
