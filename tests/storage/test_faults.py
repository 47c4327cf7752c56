"""Injected faults: calls that fail or do half of their work, damaged bytes. Nothing wrong is ever served."""

import errno
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvbm.errors import StorageError
from kvbm.storage.file_io import PosixFileIo
from kvbm.storage.record import HEADER_BYTES
from kvbm.storage.store import Bytes
from tests.storage.harness import Backend, Host, Opened, identity, key, open_disk, opened, record_places

DISK = Backend("buffered", lambda *args: open_disk(*args, o_direct=False))
ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS)


class FaultyIo(PosixFileIo):
    """Calls fail by chance: before, in the middle of or after their work."""

    def __init__(self, seed: int, rate: float) -> None:
        self._chance = random.Random(seed)
        self.rate = rate
        self.failed = 0

    def read(self, fd: int, offset: int, buffers: Sequence[Bytes]) -> None:
        if self._fails():
            super().read(fd, offset, buffers[: self._chance.randrange(len(buffers) + 1)])
            self._fail()
        super().read(fd, offset, buffers)

    def write(self, fd: int, offset: int, buffers: Sequence[Bytes]) -> None:
        if self._fails():
            data = b"".join(buffer.tobytes() for buffer in buffers)
            done = self._chance.choice([0, len(data), self._chance.randrange(len(data) + 1) // 512 * 512])
            os.pwrite(fd, data[:done], offset)
            self._fail()
        super().write(fd, offset, buffers)

    def sync(self, fd: int) -> None:
        if self._fails():
            self._fail()
        super().sync(fd)

    def _fails(self) -> bool:
        return self._chance.random() < self.rate

    def _fail(self) -> None:
        self.failed += 1
        code = self._chance.choice([0, *ERRORS])
        raise OSError(code, os.strerror(code)) if code else StorageError("a short write")


@pytest.mark.parametrize("rate", [0.02, 0.3])
@pytest.mark.parametrize("seed", range(15))
def test_calls_that_fail_serve_no_wrong_bytes(tmp_path: Path, seed: int, rate: float) -> None:
    io = FaultyIo(seed, 0.0)
    who = identity(1500)
    host = Host(12, who.record_bytes)
    it = Opened(open_disk(tmp_path, who, 12, host.memory, host.slot_bytes, io=io, o_direct=False), host)
    it.recover()
    io.rate = rate
    holding: dict[int, int] = {}  # written without an error, and not touched since
    all_numbers: dict[int, list[int]] = {slot: [] for slot in range(12)}
    cleared: set[int] = set()

    def attempt(slot: int, call: str, number: int) -> None:
        if call == "write":
            all_numbers[slot].append(number)
            it.write(slot, number)
            holding[slot] = number
        elif call == "discard":
            it.store.discard(slot)
            cleared.update(all_numbers[slot])
        elif call == "commit":
            it.store.commit()
        else:
            holding.clear()
            it.store.clear()
            cleared.update(number for numbers in all_numbers.values() for number in numbers)

    chance = random.Random(seed)
    for number in range(150):
        slot = chance.randrange(12)
        call = chance.choices(["write", "discard", "commit", "clear"], [60, 15, 20, 5])[0]
        if call in ("write", "discard"):
            holding.pop(slot, None)
        try:
            attempt(slot, call, number)
        except (StorageError, OSError):
            assert io.failed
            if call == "clear":  # what is written after a clearing that failed may be lost
                break
        asked = chance.randrange(12)
        assert not any(it.holds(asked, old) for old in all_numbers[asked] if old in cleared)
    io.rate = 0.0
    assert io.failed
    assert all(it.holds(slot, number) for slot, number in holding.items())
    it.store.close()
    with opened(DISK, tmp_path, slots=12, who=who, recover=False) as again:
        found = again.recover()
        for slot, number in holding.items():
            assert found.get(slot) == number
            assert again.holds(slot, number)
        assert not cleared & set(found.values())
        for slot, numbers in all_numbers.items():
            served = {number for number in numbers if again.holds(slot, number)}
            assert not served & cleared


@pytest.mark.parametrize("code", ERRORS)
def test_a_store_gets_over_errors(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def fails(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with opened(DISK, tmp_path) as it:
        it.write(0, 1)
        monkeypatch.setattr(os, "pwritev", fails)
        with pytest.raises(OSError, match=os.strerror(code)):
            it.write(1, 2)
        assert it.holds(0, 1)
        monkeypatch.setattr(os, "pwritev", real)
        assert not it.holds(1, 2)
        it.write(1, 3)
        assert it.holds(1, 3)


def test_short_reads_and_writes_are_errors_unless_a_second_try_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shortened = 0

    def shorten(name: str, times: int) -> None:
        real = getattr(os, name)
        left = [times]

        def call(fd: int, buffers: Sequence[Bytes], offset: int) -> int:
            nonlocal shortened
            if len(buffers) == 2 and left[0]:
                left[0] -= 1
                shortened += 1
                return real(fd, [buffers[0], buffers[1][:512]], offset)
            return real(fd, buffers, offset)

        patch.setattr(os, name, call)

    with opened(DISK, tmp_path) as it:
        it.write(0, 1)
        for name in ("preadv", "pwritev"):
            with monkeypatch.context() as patch:
                shorten(name, 1)
                it.write(1, 2)
                assert it.holds(1, 2)
        with monkeypatch.context() as patch:
            shorten("pwritev", 2)
            with pytest.raises(StorageError, match="wrote 4608 of 12288 bytes"):
                it.write(1, 3)
            assert not it.holds(1, 3)
        with monkeypatch.context() as patch:
            shorten("preadv", 2)
            with pytest.raises(StorageError, match="read 4608 of 12288 bytes"):
                it.store.read(0, key(1), it.host.slots[0])
            assert it.holds(0, 1)
    assert shortened == 6


def test_of_ten_thousand_damaged_records_none_is_served(tmp_path: Path) -> None:
    """One to eight bits flipped in the header or the data: refused, or it was a bit that means nothing."""
    chance = random.Random(1)
    who = identity(700)
    slots, rounds = 1000, 10
    whole = 0
    with opened(DISK, tmp_path, slots=slots, who=who) as it:
        for number in range(slots):
            it.write(number, number)
        with record_places(tmp_path, slots, it.host) as places:
            for slot, (fd, offset) in rounds * list(enumerate(places)):
                in_data = chance.random() < 0.5
                # Of the header page some 100 bytes have a meaning.
                at = offset + (HEADER_BYTES + chance.randrange(700) if in_data else chance.randrange(130))
                bits = 1 << chance.randrange(8) | (chance.randrange(256) if chance.random() < 0.2 else 0)
                old = os.pread(fd, 1, at)
                os.pwrite(fd, bytes([old[0] ^ bits]), at)
                served = it.holds(slot, slot)  # other bytes than those that were written fail the test
                assert not (served and in_data)
                whole += served
                os.pwrite(fd, old, at)
                assert served or slot % 50 or it.holds(slot, slot)
        # Only a flip behind the header's last field may go unnoticed.
        assert whole < 0.15 * slots * rounds


def test_records_that_change_places_are_refused(tmp_path: Path) -> None:
    """As where a drive writes to, or reads from, a wrong place."""
    with opened(DISK, tmp_path) as it:
        for slot in range(16):
            it.write(slot, slot)
        stride = it.host.slot_bytes + HEADER_BYTES
        with record_places(tmp_path, 16, it.host) as places:
            records = [os.pread(fd, stride, offset) for fd, offset in places]
            for slot, (fd, offset) in enumerate(places):
                os.pwrite(fd, records[(slot + 1) % 16], offset)
            assert not any(it.holds(slot, number) for slot in range(16) for number in range(16))
            for slot, (fd, offset) in enumerate(places):
                os.pwrite(fd, records[slot][:HEADER_BYTES] + records[slot - 1][HEADER_BYTES:], offset)
            assert not any(it.holds(slot, number) for slot in range(16) for number in range(16))


def test_threads_and_faults(tmp_path: Path) -> None:
    io = FaultyIo(7, 0.0)
    host = Host(8, identity().record_bytes)
    it = Opened(open_disk(tmp_path, identity(), 8, host.memory, host.slot_bytes, io=io, o_direct=False), host)
    it.recover()
    io.rate = 0.1
    last: dict[int, int] = {}

    def work(slot: int) -> None:
        for step in range(100):
            last.pop(slot, None)
            try:
                it.write(slot, 1000 * slot + step)
            except (StorageError, OSError):
                continue
            last[slot] = 1000 * slot + step

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert io.failed > 10
    io.rate = 0.0
    assert all(it.holds(slot, number) for slot, number in last.items())
    it.store.close()
