"""What the tests of storage share: host memory, keys, contents that numbers stand for, and opening stores."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kvbm.errors import StorageError
from kvbm.storage.containers import PAGE, Allocation, paths_of, stride_of
from kvbm.storage.disk_store import DiskStore
from kvbm.storage.file_io import FileIo
from kvbm.storage.store import Bytes, Found, Identity, Key, RecordStore
from kvbm.transfer.arena import slot_bytes

NAMESPACE = b"a namespace here"


def identity(
    record_bytes: int = 5000, namespace: bytes = NAMESPACE, rank: int = 0, ranks: int = 1
) -> Identity:
    return Identity(namespace, record_bytes, rank, ranks)


def key(number: int, group: int = 0) -> Key:
    return Key(number.to_bytes(8, "little") + bytes([7] * 8), group)


def number_of(hash_: np.ndarray) -> int:
    """Of a key made by `key`."""
    return int(hash_[0])


def content(number: int, size: int) -> Bytes:
    """The bytes that `number` stands for."""
    return np.random.default_rng(number).integers(0, 256, size, np.uint8)


def digest(data: Bytes) -> int:
    return xxhash.xxh3_64_intdigest(data.data)


class Host:
    """Host memory of `slots` records, as an arena has it."""

    def __init__(self, slots: int, record_bytes: int) -> None:
        self.record_bytes = record_bytes
        self.slot_bytes = slot_bytes(record_bytes)
        self.memory = np.frombuffer(mmap.mmap(-1, slots * self.slot_bytes), np.uint8)
        self.slots = self.memory.reshape(slots, self.slot_bytes)

    def filled(self, slot: int, number: int) -> Bytes:
        """A slot with the bytes that `number` stands for."""
        self.slots[slot, : self.record_bytes] = content(number, self.record_bytes)
        return self.slots[slot]

    def data(self, slot: int) -> Bytes:
        return self.slots[slot, : self.record_bytes]


def needs_nixl() -> None:
    if find_spec("nixl_cu12") is None and find_spec("nixl_cu13") is None:
        pytest.skip("NIXL is not installed (scripts/test.sh installs it)")


def open_nixl(folder: Path, who: Identity, slots: int, memory: Bytes, size: int) -> DiskStore:
    needs_nixl()
    from kvbm.storage.nixl_io import NixlFileIo

    return open_disk(folder, who, slots, memory, size, io=NixlFileIo("POSIX"))


class NoFallocate:
    """In place of `containers._libc`: a file system that can't take room beforehand."""

    def fallocate(self, *_: object) -> int:
        ctypes.set_errno(errno.EOPNOTSUPP)
        return -1


@dataclass(frozen=True, slots=True)
class Backend:
    """A kind of store. open: folder, identity, number of slots, host memory, bytes of a host slot."""

    name: str
    open: Callable[[Path, Identity, int, Bytes, int], RecordStore]


class Opened:
    """An open store with one slot of host memory to a store's slot, and calls in terms of numbers."""

    def __init__(self, store: RecordStore, host: Host) -> None:
        self.store = store
        self.host = host

    def write(self, slot: int, number: int, *, of: int | None = None, group: int = 0) -> None:
        """Under key `number` the bytes of `of` (default: of the same number)."""
        record = self.host.filled(slot, number if of is None else of)
        self.store.write(slot, key(number, group), record, digest(self.host.data(slot)))

    def holds(self, slot: int, number: int, *, of: int | None = None, group: int = 0) -> bool:
        """Whether the slot gives the bytes of key `number`. Other bytes than those of `of` fail the test."""
        self.host.slots[slot] = 0xEE
        try:
            checksum = self.store.read(slot, key(number, group), self.host.slots[slot])
        except (StorageError, OSError):
            return False
        expected = content(number if of is None else of, self.host.record_bytes)
        assert (self.host.data(slot) == expected).all(), f"slot {slot} gave wrong bytes for key {number}"
        assert checksum == digest(expected)
        return True

    def recover(self) -> dict[int, int]:
        """Slot to number of what was found, in its order."""
        return as_dict(self.store.recover())


def as_dict(found: Found) -> dict[int, int]:
    return {int(slot): number_of(hash_) for slot, hash_ in zip(found.slots, found.hashes, strict=True)}


@contextmanager
def record_places(folder: Path, slots: int, host: Host) -> Iterator[list[tuple[int, int]]]:
    """Descriptor and offset of each slot of a closed or open disk store in one directory."""
    fds = [os.open(path, os.O_RDWR) for path in paths_of([folder / "drive-0"])]
    stride = stride_of(host.slot_bytes)
    try:
        yield [(fds[slot % len(fds)], PAGE + slot // len(fds) * stride) for slot in range(slots)]
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def opened(
    backend: Backend, folder: Path, *, slots: int = 16, who: Identity | None = None, recover: bool = True
) -> Iterator[Opened]:
    who = who or identity()
    host = Host(slots, who.record_bytes)
    store = backend.open(folder, who, slots, host.memory, host.slot_bytes)
    try:
        it = Opened(store, host)
        if recover:
            it.recover()
        yield it
    finally:
        store.close()


def open_disk(
    folder: Path,
    who: Identity,
    slots: int,
    memory: Bytes,
    size: int,
    *,
    io: FileIo | None = None,
    o_direct: bool = True,
    directories: int = 1,
    threads: int = 8,
) -> DiskStore:
    folders = [folder / f"drive-{i}" for i in range(directories)]
    for each in folders:
        each.mkdir(parents=True, exist_ok=True)
    how = Allocation(o_direct=o_direct)
    return DiskStore(folders, who, slots, memory, slot_bytes=size, io=io, how=how, threads=threads)
