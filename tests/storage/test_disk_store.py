"""What only a store on local disks has: files, locks, room, and calls that are under way at a bad moment."""

import multiprocessing
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvbm.errors import CapacityError, StorageError
from kvbm.storage import containers, disk_store
from kvbm.storage.containers import ensure_room, paths_of, stride_of
from kvbm.storage.disk_store import DiskStore
from kvbm.storage.file_io import PosixFileIo
from kvbm.storage.store import Bytes, Identity
from tests.storage.harness import Backend, Host, NoFallocate, Opened, identity, key, open_disk, opened

DISK = Backend("buffered", lambda *args: open_disk(*args, o_direct=False))


class HoldingIo(PosixFileIo):
    """Writes of a record wait until they are let go."""

    def __init__(self) -> None:
        self.holding = False
        self.arrived = threading.Semaphore(0)
        self.let_go = threading.Event()

    def write(self, fd: int, offset: int, buffers: Sequence[Bytes]) -> None:
        if self.holding and len(buffers) == 2:
            self.arrived.release()
            assert self.let_go.wait(30)
        super().write(fd, offset, buffers)


def store_with(io: PosixFileIo, folder: Path, slots: int = 8) -> Opened:
    host = Host(slots, identity().record_bytes)
    it = Opened(open_disk(folder, identity(), slots, host.memory, host.slot_bytes, io=io), host)
    it.recover()
    return it


def failing_write(it: Opened, slot: int, number: int, failures: list[Exception]) -> threading.Thread:
    def work() -> None:
        try:
            it.write(slot, number)
        except (StorageError, OSError) as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


# ---- under way


def test_a_write_that_hangs_stops_no_other_call_and_is_cleared(tmp_path: Path) -> None:
    io = HoldingIo()
    it = store_with(io, tmp_path)
    it.write(1, 1)
    io.holding = True
    failures: list[Exception] = []
    threads = [failing_write(it, slot, 100 + slot, failures) for slot in (0, 4, 5)]  # 0, 4: one file
    assert all(io.arrived.acquire(timeout=10) for _ in threads)
    io.holding = False
    assert it.holds(1, 1)
    it.write(2, 2)
    it.store.discard(1)
    it.store.commit()
    it.store.clear()
    it.write(3, 3)
    io.let_go.set()
    for thread in threads:
        thread.join()
    assert len(failures) == 3
    assert not any(it.holds(slot, 100 + slot) for slot in (0, 4, 5))
    it.write(4, 204)
    it.store.close()
    for damaged in (False, True):
        if damaged:
            (tmp_path / "drive-0" / "index.kvbm").unlink()
        with opened(DISK, tmp_path, slots=8, recover=False) as again:
            assert again.recover() == {4: 204, 3: 3}


def test_a_clearing_counts_for_a_write_that_is_just_being_checksummed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = store_with(PosixFileIo(), tmp_path)
    arrived, let_go = threading.Event(), threading.Event()
    real = disk_store.record_digest

    def slow(data: Bytes, identity: Identity) -> int:
        if threading.current_thread() is thread:
            arrived.set()
            assert let_go.wait(30)
        return real(data, identity)

    failures: list[Exception] = []
    record = it.host.filled(0, 1)

    def work() -> None:
        try:
            it.store.write(0, key(1), record)
        except StorageError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    monkeypatch.setattr(disk_store, "record_digest", slow)
    thread.start()
    assert arrived.wait(10)
    it.store.clear()
    let_go.set()
    thread.join()
    assert len(failures) == 1
    it.store.close()
    with opened(DISK, tmp_path, slots=8, recover=False) as again:
        assert again.recover() == {}


# ---- whose folder it is


def test_a_folder_is_one_stores_at_a_time(tmp_path: Path) -> None:
    with opened(DISK, tmp_path):
        with pytest.raises(StorageError, match=rf"in use by another engine \(process {os.getppid()}\)"):
            with opened(DISK, tmp_path):
                pass
    with opened(DISK, tmp_path) as it:
        it.write(0, 1)


def test_directories_are_not_shared_in_part_either(tmp_path: Path) -> None:
    host = Host(8, identity().record_bytes)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()

    def store(*names: str) -> DiskStore:
        folders = [tmp_path / name for name in names]
        return DiskStore(folders, identity(), 8, host.memory, slot_bytes=host.slot_bytes)

    first = store("a", "c")
    with pytest.raises(StorageError, match="in use"):
        store("b", "c")
    first.close()
    second = store("b", "c")
    second.close()
    store("c", "c").close()  # named twice by mistake: it works, and is not in its own way


# ---- files


def test_lost_or_truncated_files_are_made_anew_and_empty(tmp_path: Path) -> None:
    for damage in (Path.unlink, lambda path: os.truncate(path, 9000), lambda path: path.write_bytes(b"")):
        with opened(DISK, tmp_path, recover=False) as it:
            it.store.recover()
            for slot in range(16):
                it.write(slot, slot)
        damage(tmp_path / "drive-0" / "records-02.kvbm")
        with opened(DISK, tmp_path, recover=False) as it:
            assert it.recover() == {}
            assert not any(it.holds(slot, slot) for slot in range(16))
            it.write(2, 102)
        (tmp_path / "drive-0" / "index.kvbm").unlink()
        with opened(DISK, tmp_path, recover=False) as it:
            assert it.recover() == {2: 102}


def test_another_number_of_slots_starts_empty(tmp_path: Path) -> None:
    for slots in (16, 17, 5):
        with opened(DISK, tmp_path, slots=slots, recover=False) as it:
            assert it.recover() == {}
            for slot in range(slots):
                it.write(slot, slot)
            assert all(it.holds(slot, slot) for slot in range(slots))


def test_a_truncated_file_costs_only_what_it_held(tmp_path: Path) -> None:
    with opened(DISK, tmp_path) as it:
        for slot in range(16):
            it.write(slot, slot)
        os.truncate(tmp_path / "drive-0" / "records-01.kvbm", 4096)
        assert [slot for slot in range(16) if not it.holds(slot, slot)] == [1, 5, 9, 13]
        it.write(13, 113)
        assert it.holds(13, 113)


def test_files_that_are_no_longer_used_give_their_room_back(tmp_path: Path) -> None:
    with opened(Backend("", lambda *args: open_disk(*args, directories=2)), tmp_path):
        pass
    left = tmp_path / "drive-0" / "records-03.new"  # of a process killed while it filled a file
    left.write_bytes(bytes(1 << 20))
    with opened(DISK, tmp_path):
        names = sorted(path.name for path in (tmp_path / "drive-0").iterdir())
    assert names == ["index.kvbm", "lock", *(f"records-0{i}.kvbm" for i in range(4))]


def _die_when_made(folder: Path, files: int) -> None:
    """Open a store of more slots, and be killed when so many of its files are about to take their names."""
    left = [files]
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if not left[0]:
            os._exit(7)
        left[0] -= 1
        real(source, target)

    os.replace = replace
    with opened(DISK, folder, slots=32):
        os._exit(0)


@pytest.mark.parametrize("files", range(4))
def test_a_process_killed_while_it_makes_its_files(tmp_path: Path, files: int) -> None:
    with opened(DISK, tmp_path, slots=16) as it:
        for slot in range(16):
            it.write(slot, slot)
    process = multiprocessing.get_context("fork").Process(target=_die_when_made, args=(tmp_path, files))
    process.start()
    process.join(30)
    assert process.exitcode == 7
    assert list((tmp_path / "drive-0").glob("*.new"))
    for slots in (32, 16):
        with opened(DISK, tmp_path, slots=slots, recover=False) as it:
            assert it.recover() == {}
            assert not any(it.holds(slot, slot) for slot in range(slots))
            it.write(3, 103)
            assert it.holds(3, 103)
        assert not list((tmp_path / "drive-0").glob("*.new"))


def test_where_fallocate_is_missing_files_are_sparse_or_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_libc", NoFallocate())
    host = Host(8, identity().record_bytes)
    for name, fill in (("sparse", False), ("filled", True)):
        folder = tmp_path / name
        folder.mkdir()
        how = containers.Allocation(zerofill_fallback=fill)
        store = DiskStore([folder], identity(), 8, host.memory, slot_bytes=host.slot_bytes, how=how)
        it = Opened(store, host)
        it.recover()
        taken = sum(path.stat().st_blocks * 512 for path in paths_of([folder]))
        assert (taken >= 8 * stride_of(host.slot_bytes)) is fill
        it.write(0, 1)
        assert it.holds(0, 1)
        store.close()


# ---- room


def test_the_free_space_floor_stops_writes_to_sparse_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "_libc", NoFallocate())
    room = [1 << 40]
    monkeypatch.setattr(containers.Containers, "free_bytes", property(lambda self: room[0]))
    host = Host(8, identity().record_bytes)
    how = containers.Allocation(min_free_bytes=1 << 30)
    store = DiskStore([tmp_path], identity(), 8, host.memory, slot_bytes=host.slot_bytes, how=how)
    it = Opened(store, host)
    it.recover()
    it.write(0, 1)
    room[0] = 1 << 20
    store.commit()
    with pytest.raises(StorageError, match="free-space floor"):
        it.write(1, 2)
    assert it.holds(0, 1)
    room[0] = 1 << 40
    store.commit()
    it.write(1, 2)
    store.close()


def test_ensure_room_says_what_is_lacking(tmp_path: Path) -> None:
    stat = os.statvfs(tmp_path)
    free = stat.f_bavail * stat.f_frsize
    ensure_room([tmp_path / "a" / "b", tmp_path / "c"], 100, 8192, 0)
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(CapacityError, match=r"needs [\d.]+ GB in .*/a and leaves 0.00 GB free, but only"):
        ensure_room([tmp_path / "a"], free // 8192 + 100, 8192, 0)
    with pytest.raises(CapacityError, match=r"Lower DYN_KVBM_DISK_CACHE_GB \(or KVBM_DISK_MIN_FREE_GB\)"):
        ensure_room([tmp_path / "a"], 10, 8192, free)
    # What another number of ranks holds there may be deleted; what this one holds counts as room.
    for name in ("rank-0-of-2", "rank-1-of-4", "rank-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records-00.kvbm").touch()
    with pytest.raises(CapacityError, match=f"stored: {tmp_path}/rank-0 {tmp_path}/rank-1-of-4$"):
        ensure_room([tmp_path / "rank-1-of-2"], 10, 8192, free)
    # The drive of both has to hold both halves.
    with pytest.raises(CapacityError, match="needs"):
        ensure_room([tmp_path / "a", tmp_path / "c"], int(1.5 * free) // 8192, 8192, 0)


def test_ensure_room_says_why_a_folder_is_of_no_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "sub", "Not a directory")):
        with pytest.raises(CapacityError, match=rf"can't be kept in .*{why}.*DYN_KVBM_DISK_CACHE_DIR"):
            ensure_room([folder], 10, 8192, 0)


def test_files_of_an_earlier_run_are_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, stride = 16, stride_of(8192)
    with opened(DISK, tmp_path, slots=slots):
        pass
    left = tmp_path / "drive-0" / "records-09.new"
    left.write_bytes(bytes(10 * stride))
    real = os.statvfs(tmp_path)

    def full(path: object) -> object:
        return os.statvfs_result([real.f_bsize, real.f_frsize, real.f_blocks, 0, 0, *real[5:]])

    monkeypatch.setattr(os, "statvfs", full)
    ensure_room([tmp_path / "drive-0"], slots, stride, 0)
    ensure_room([tmp_path / "drive-0"], slots + 9, stride, 0)
    with pytest.raises(CapacityError):
        ensure_room([tmp_path / "drive-0"], slots + 12, stride, 0)


# ---- whose records these are


def test_records_of_another_model_or_size_are_told_of_once(tmp_path: Path) -> None:
    def found_foreign(namespace: bytes, record_bytes: int, slots: int) -> bool:
        host = Host(slots, record_bytes)
        store = open_disk(
            tmp_path, Identity(namespace, record_bytes), slots, host.memory, host.slot_bytes, o_direct=False
        )
        foreign = store.recover().foreign
        store.close()
        return foreign

    a, b = b"a" * 16, b"b" * 16
    assert not found_foreign(a, 5000, 8), "nothing was there"
    assert not found_foreign(a, 5000, 8)
    assert found_foreign(b, 5000, 8), "another model, of the same geometry"
    assert not found_foreign(b, 5000, 8)
    assert found_foreign(b, 9000, 8), "records of another size"
    assert not found_foreign(b, 9000, 8)
    assert not found_foreign(b, 9000, 12), "a larger cache of the same model"
