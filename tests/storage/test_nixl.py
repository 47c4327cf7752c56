"""NIXL below the disk store: its errors, its threads, and what takes the kernel's calls instead."""

import os
import threading
from importlib import metadata
from pathlib import Path

import pytest

from kvbm.errors import StorageError
from kvbm.storage.file_io import PosixFileIo
from kvbm.storage.messages import Status
from tests.storage.harness import Host, Opened, identity, key, needs_nixl, open_nixl
from tests.storage.rank import DISK_SLOTS, Rank, numbers, rank


@pytest.fixture(autouse=True)
def _nixl() -> None:
    needs_nixl()


def opened_store(folder: Path, slots: int = 32) -> Opened:
    host = Host(slots, identity().record_bytes)
    it = Opened(open_nixl(folder, identity(), slots, host.memory, host.slot_bytes), host)
    it.recover()
    return it


def test_records_go_by_nixl_and_the_index_by_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = opened_store(tmp_path)
    names: set[str] = set()
    real = PosixFileIo.write

    def write(self: PosixFileIo, fd: int, *arguments: object) -> None:
        names.add(os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2])
        real(self, fd, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PosixFileIo, "write", write)
    it.write(0, 1)
    it.store.commit()
    it.store.discard(0)
    it.store.clear()
    assert names == {"index.kvbm"}
    it.store.close()


def test_what_can_not_be_read_is_an_error_of_its_own_request_only(tmp_path: Path) -> None:
    """Short reads: one file has lost its records, the others are read by other threads all the while."""
    it = opened_store(tmp_path)
    for slot in range(32):
        it.write(slot, slot)
    it.store.commit()
    os.truncate(tmp_path / "drive-0" / "records-01.kvbm", 4096 + 6000)  # within a record
    wrong: list[int] = []

    def work(slot: int) -> None:
        for _ in range(30):
            if it.holds(slot, slot) == (slot % 4 == 1):
                wrong.append(slot)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with pytest.raises(StorageError, match="NIXL READ at 4096"):
        it.store.read(1, key(1), it.host.slots[1])
    it.write(5, 5)  # and it goes on there
    assert it.holds(5, 5)
    it.store.close()


def test_what_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    it = opened_store(tmp_path)
    it.write(0, 1)
    file = tmp_path / "drive-0" / "records-00.kvbm"
    readonly = os.open(file, os.O_RDONLY)
    # All there are: late in a whole run the store does not get one of the first 256.
    numbers = sorted(map(int, os.listdir("/proc/self/fd")))
    writable = [fd for fd in numbers if _names(fd, file) and fd != readonly]
    assert writable
    saved = [(fd, os.dup(fd)) for fd in writable]
    for fd, _ in saved:
        os.dup2(readonly, fd)
    with pytest.raises(StorageError, match="NIXL WRITE"):
        it.write(4, 4)
    for fd, copy in saved:
        os.dup2(copy, fd)
    it.write(4, 4)
    assert it.holds(4, 4)
    assert it.holds(0, 1)
    it.store.close()


def _names(fd: int, file: Path) -> bool:
    try:
        return Path(f"/proc/self/fd/{fd}").readlink() == file
    except OSError:
        return False


def test_a_version_with_silent_errors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbm.storage.nixl_io import NixlFileIo

    monkeypatch.setattr(metadata, "version", lambda package: "1.4.1")
    with pytest.raises(StorageError, match=r"nixl_cu12 1\.4\.1 takes failed .* 1\.5\.0 is needed"):
        NixlFileIo("POSIX")


def test_a_plugin_that_is_not_there_is_refused() -> None:
    from kvbm.storage.nixl_io import NixlFileIo

    with pytest.raises(StorageError, match=r"plugin NOTHING can't be used .*KVBM_DISK_BACKEND=posix"):
        NixlFileIo("NOTHING")


def test_in_an_io_process(tmp_path: Path) -> None:
    everything = numbers(range(DISK_SLOTS))
    with rank(tmp_path, backend="nixl-posix", threads=16) as it:
        for _ in range(5):
            assert it.wrote(everything)
            assert it.held(everything) == everything
    with rank(tmp_path) as it:  # the files are the same
        assert it.found_records() == everything
        assert it.held(everything) == everything


def test_an_io_process_says_why_it_can_not_have_gpudirect_storage(tmp_path: Path) -> None:
    it = Rank(tmp_path, backend="nixl-gds-mt")
    it.wait(lambda: it.client.ready or it.client.refused is not None)
    if it.client.ready:
        assert it.wrote({0: 0})  # this machine has it
        assert it.held({0: 0}) == {0: 0}
    else:
        assert "GDS_MT can't be used" in str(it.client.refused)
        assert it.result(it.write({0: 0})).status == Status.UNAVAILABLE
    it.close()
