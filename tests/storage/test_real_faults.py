"""Drives that are full, read-only or broken, made for real with mounts of our own. They need root."""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvbm.errors import CapacityError, StorageError
from kvbm.storage import containers
from kvbm.storage.containers import Allocation, ensure_room, lies_in_memory, stride_of
from kvbm.storage.disk_store import DiskStore
from tests.storage.harness import Host, NoFallocate, Opened, identity, key

SLOTS = 64
WHO = identity(60_000)


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this machine can't: {' '.join(map(str, command))}: {done.stderr.strip()[:200]}")
    return done.stdout.strip()


@contextmanager
def mounted(where: Path, *arguments: object) -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("mounting needs root")
    where.mkdir(parents=True)
    run("mount", *arguments, where)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@contextmanager
def drive(folder: Path, size: int, backing: Path | None = None) -> Iterator[tuple[Path, str, Path]]:
    """An ext4 on a loop device: where it is mounted, the device's name, its backing file."""
    if not shutil.which("mkfs.ext4") or not shutil.which("losetup"):
        pytest.skip("needs losetup and mkfs.ext4")
    image = (backing or folder) / f"image-{uuid.uuid4().hex}"
    image.touch()
    os.truncate(image, size)
    # Without a journal or lazily made inodes nothing but the test writes to it.
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,nodiscard", "-O", "^has_journal", image)
    device = run("losetup", "-f", "--show", "--direct-io=off", image)
    try:
        with mounted(folder / "mnt", device) as where:
            yield where, Path(device).name, image
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
        image.unlink()


def open_store(folder: Path, **how: bool) -> Opened:
    host = Host(SLOTS, WHO.record_bytes)
    store = DiskStore(
        [folder], WHO, SLOTS, host.memory, slot_bytes=host.slot_bytes, how=Allocation(**how), threads=4
    )
    it = Opened(store, host)
    it.recover()
    return it


def fails_to_write(it: Opened, slot: int, number: int) -> bool:
    try:
        it.write(slot, number)
    except (StorageError, OSError):
        return True
    return False


def test_a_drive_without_room_is_refused_at_start(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m", "kvbm-test") as folder:
        assert lies_in_memory(folder)
        assert not lies_in_memory(Path("/proc"))
        stride = stride_of(Host(1, WHO.record_bytes).slot_bytes)
        with pytest.raises(CapacityError, match=r"needs 0.00 GB in .* but only 0.00 GB are to be had"):
            ensure_room([folder], SLOTS, stride, 0)
        with pytest.raises(StorageError, match=r"records-00.kvbm can't be prepared: No space left on device"):
            open_store(folder)
        assert not list(folder.glob("records-*"))  # and takes nothing of what little there is
        ensure_room([folder], 8, stride, 0)


def test_a_drive_that_fills_up_costs_only_what_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_libc", NoFallocate())  # tmpfs has it: then no write can find it full
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=2m", "kvbm-test") as folder:
        it = open_store(folder)
        written = [slot for slot in range(SLOTS) if not fails_to_write(it, slot, slot)]
        assert 10 < len(written) < 40
        assert all(it.holds(slot, slot) == (slot in written) for slot in range(SLOTS))
        assert not fails_to_write(it, 0, 100)  # in place of another one there is room
        it.store.commit()
        it.store.discard(1)
        it.store.close()
        it = open_store(folder)
        assert [it.holds(slot, slot) for slot in written] == [slot > 1 for slot in written]
        assert it.holds(0, 100)
        run("mount", "-o", "remount,size=8m", folder)
        assert not fails_to_write(it, SLOTS - 1, 200)
        assert it.holds(SLOTS - 1, 200)
        it.store.close()


def test_a_drive_that_was_mounted_read_only(tmp_path: Path) -> None:
    with drive(tmp_path, 32 << 20) as (folder, _, _):
        it = open_store(folder)
        it.write(0, 1)
        it.store.close()
        run("mount", "-o", "remount,ro", folder)
        with pytest.raises(CapacityError, match=r"can't be kept in .*: Read-only file system\. Name another"):
            ensure_room([folder], SLOTS, stride_of(it.host.slot_bytes), 0)
        with pytest.raises((StorageError, OSError), match="Read-only file system"):
            open_store(folder)
        run("mount", "-o", "remount,rw", folder)
        it = open_store(folder)
        assert it.holds(0, 1)
        it.store.close()


@pytest.mark.parametrize("o_direct", [True, False])
def test_a_drive_that_turns_read_only_while_it_is_used(tmp_path: Path, o_direct: bool) -> None:
    with drive(tmp_path, 32 << 20) as (folder, device, _):
        trigger = Path(f"/sys/fs/ext4/{device}/trigger_fs_error")
        if not trigger.exists():
            pytest.skip("this kernel's ext4 can't be told to fail")
        run("mount", "-o", "remount,errors=remount-ro", folder)
        it = open_store(folder, o_direct=o_direct)
        for slot in range(10):
            it.write(slot, slot)
        it.store.commit()
        trigger.write_text("a test of KVBM")
        failed = [fails_to_write(it, slot, 100 + slot) for slot in range(10, 20)]
        assert all(failed)
        assert all(it.holds(slot, slot) for slot in range(10))
        assert not any(it.holds(slot, 100 + slot) for slot in range(10, 20))
        it.store.close()
        with pytest.raises((StorageError, OSError), match="Read-only file system"):
            open_store(folder)


def test_sectors_that_can_not_be_read(tmp_path: Path) -> None:
    """EIO from the kernel: the device has lost the end of its backing file."""
    with drive(tmp_path, 32 << 20) as (folder, _, image):
        it = open_store(folder)
        for slot in range(SLOTS):
            it.write(slot, slot)
        it.store.commit()
        whole = image.stat().st_size
        data = image.read_bytes()
        middle = max(data.find(it.host.data(slot)[:64].tobytes()) for slot in range(SLOTS)) // 8192 * 4096
        os.truncate(image, middle)
        read = [slot for slot in range(SLOTS) if it.holds(slot, slot)]
        assert 0 < len(read) < SLOTS
        kinds = set()
        for slot in set(range(SLOTS)) - set(read):
            try:
                it.store.read(slot, key(slot), it.host.slots[slot])
            except (StorageError, OSError) as error:
                kinds.add(getattr(error, "errno", None))
        os.truncate(image, whole)
        image.write_bytes(data)
        it.store.close()
        if kinds != {5}:
            pytest.skip(f"this kernel's loop device reads zeros there: {kinds}")


def test_sectors_that_can_not_be_written(tmp_path: Path) -> None:
    """EIO from the kernel: the device's backing file finds no room."""
    with mounted(tmp_path / "backing", "-t", "tmpfs", "-o", "size=3m", "kvbm-test") as backing:
        with drive(tmp_path, 32 << 20, backing) as (folder, _, _):
            it = open_store(folder)
            written = [slot for slot in range(SLOTS) if not fails_to_write(it, slot, slot)]
            if len(written) == SLOTS:
                pytest.skip("this kernel's loop device keeps what finds no room")
            # Near the limit ext4 takes bytes into its cache and loses them: no error, until they are read.
            assert 10 < sum(it.holds(slot, slot) for slot in written) >= len(written) - 4
            assert not any(it.holds(slot, slot) for slot in range(SLOTS) if slot not in written)
            it.store.close()
