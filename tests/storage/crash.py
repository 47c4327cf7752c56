"""Power cuts: what a drive may hold afterwards, from a log of all that was written and synced.

Of writes that a sync confirmed every byte is there. Of the others any subset is, and each of those may be
torn at sectors of 512 bytes.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvbm.storage.file_io import PosixFileIo
from kvbm.storage.store import Bytes

SECTOR = 512

Image = dict[str, bytes]
"""Contents of all files, by their paths inside the folder."""


def take_image(folder: Path) -> Image:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def lay_out(image: Image, folder: Path) -> Path:
    for name, data in image.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@dataclass(frozen=True, slots=True)
class Event:
    """A write, or a sync where `data` is None. note: what the test knew when it was over."""

    file: str
    offset: int
    data: bytes | None
    note: Any


@dataclass(slots=True)
class RecordingIo(PosixFileIo):
    """Logs what is done to the files of a folder. note: called at each event."""

    folder: Path
    note: Callable[[], Any]
    events: list[Event] = field(default_factory=list)

    def write(self, fd: int, offset: int, buffers: Sequence[Bytes]) -> None:
        PosixFileIo.write(self, fd, offset, buffers)
        data = b"".join(buffer.tobytes() for buffer in buffers)
        self.events.append(Event(self._name(fd), offset, data, self.note()))

    def sync(self, fd: int) -> None:
        self.events.append(Event(self._name(fd), 0, None, self.note()))

    def _name(self, fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(self.folder))


class UnsyncedIo(PosixFileIo):
    """For looking at an image: nothing has to be safe there."""

    def sync(self, fd: int) -> None:
        pass


def cut(base: Image, events: Sequence[Event], at: int, chance: random.Random) -> Image:
    """What the drive may hold when the power goes before event `at`."""
    files = {name: bytearray(data) for name, data in base.items()}
    synced = {event.file: i for i, event in enumerate(events[:at]) if event.data is None}
    kept = chance.choice([0.0, 0.5, 0.9, 1.0])
    for i, event in enumerate(events[:at]):
        if event.data is None:
            continue
        file = files.setdefault(event.file, bytearray())
        if i < synced.get(event.file, -1):
            _put(file, event.offset, event.data)
        elif chance.random() < kept:
            if chance.random() < 0.5:
                _put(file, event.offset, event.data)
            else:
                for start, part in _sectors(event.offset, event.data):
                    if chance.random() < 0.5:
                        _put(file, start, part)
    return {name: bytes(file) for name, file in files.items()}


def kill(base: Image, events: Sequence[Event], at: int) -> Image:
    """What the drive holds when the process is killed before event `at`."""
    files = {name: bytearray(data) for name, data in base.items()}
    for event in events[:at]:
        if event.data is not None:
            _put(files.setdefault(event.file, bytearray()), event.offset, event.data)
    return {name: bytes(file) for name, file in files.items()}


def _put(file: bytearray, offset: int, data: bytes) -> None:
    file.extend(bytes(max(0, offset + len(data) - len(file))))
    file[offset : offset + len(data)] = data


def _sectors(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    """The data in pieces that a drive writes whole or not at all."""
    pieces = []
    start = offset
    while start < offset + len(data):
        end = min((start // SECTOR + 1) * SECTOR, offset + len(data))
        pieces.append((start, data[start - offset : end - offset]))
        start = end
    return pieces


def flip_bits(data: bytes, count: int, chance: random.Random) -> bytes:
    flipped = np.frombuffer(data, np.uint8).copy()
    for _ in range(count):
        flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
    return flipped.tobytes()
