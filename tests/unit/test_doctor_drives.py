"""What `kvbm doctor` says of the disk tier's directories."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.cli.checks import drive
from kvbm.cli.checks.finding import State
from kvbm.config import load_config

GB, MB = 10**9, 10**6

MOUNTS = """\
27 1 254:0 / / rw - ext4 /dev/vda rw
24 27 0:23 / /dev/shm rw - tmpfs tmpfs rw
25 27 8:1 / /mnt/nvme rw shared:1 master:2 - xfs /dev/nvme0n1 rw
26 27 0:99 / /mnt/my\\040share rw - nfs4 server:/ rw
28 27 0:98 / /mnt/ssh rw - fuse.sshfs me@there rw
29 25 0:97 / /mnt/nvme rw - btrfs /dev/nvme1n1 rw
what is this
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/tmp/x", "ext4"),
        ("/dev/shm", "tmpfs"),
        ("/dev/shmoo", "ext4"),
        ("/mnt/nvme/a/b", "btrfs"),
        ("/mnt/my share/x", "nfs4"),
        ("/mnt/ssh", "fuse.sshfs"),
    ],
)
def test_file_system_of_a_directory(folder: str, kind: str) -> None:
    assert drive.file_system(Path(folder), MOUNTS) == kind


def test_file_system_is_judged() -> None:
    def judge(kind: str | None, fallocate: bool = True, o_direct: bool = True) -> tuple[State, str]:
        found = drive.check_file_system(Path("/x"), kind, drive.Abilities(fallocate, o_direct))
        assert bool(found.to_do) == (found.state != State.OK)
        return found.state, found.found

    assert judge("ext4") == (State.OK, "file system ext4, fallocate yes, O_DIRECT yes")
    assert judge(None)[0] == State.OK
    assert judge("tmpfs")[0] == State.ADVICE
    assert judge("nfs4")[0] == State.ADVICE
    assert judge("fuse.sshfs")[0] == State.ADVICE
    assert judge("zfs", fallocate=False)[0] == State.ADVICE
    assert judge("zfs", o_direct=False)[0] == State.ADVICE
    refused = drive.check_file_system(Path("/x"), "ext4", PermissionError(errno.EACCES, "Permission denied"))
    assert refused.state == State.PROBLEM
    assert "Permission denied" in refused.found


def test_room() -> None:
    def judge(free: dict[Path, tuple[int, int]], **disk: Any) -> list[State]:
        return [f.state for f in drive.check_room(load_config(environ={}, disk=disk), free)]

    one, two = Path("/a"), Path("/b")
    assert judge({one: (1, 11 * GB)}, cache_gb=10) == [State.OK]
    assert judge({one: (1, 11 * GB - 1)}, cache_gb=10) == [State.PROBLEM]
    assert judge({one: (1, 11 * GB)}, cache_gb=10, min_free_gb=2) == [State.PROBLEM]
    assert judge({one: (1, 6 * GB), two: (2, 6 * GB)}, cache_gb=10) == [State.OK] * 2
    assert judge({one: (1, 6 * GB), two: (1, 6 * GB)}, cache_gb=10) == [State.PROBLEM] * 2
    assert judge({one: (1, 1)}, num_blocks=10) == [State.UNKNOWN]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    """What the drive has free, whatever others write to it meanwhile: CI sets up SGLang beside this."""
    drive_has = SimpleNamespace(f_bavail=250_000, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: drive_has)
    return drive_has.f_bavail * drive_has.f_frsize


def test_records_of_an_earlier_run_count_as_room(tmp_path: Path, free: int) -> None:
    records = tmp_path / "cache/kvbm-0/rank-1/records-00.kvbm"
    records.parent.mkdir(parents=True)
    records.write_bytes(bytes(64 * MB))
    assert drive.room_in(tmp_path / "cache")[1] == pytest.approx(free + 64 * MB, abs=MB)


def test_records_of_another_number_of_ranks_do_not(tmp_path: Path, free: int) -> None:
    """The next engine like the last one has no use for them."""
    for name, written_at in (("rank-0", 1), ("rank-0-of-2", 3), ("rank-1-of-2", 3), ("rank-0-of-4", 2)):
        rank = tmp_path / "kvbm-0" / name
        rank.mkdir(parents=True)
        (rank / "records-00.kvbm").write_bytes(bytes(16 * MB))
        (rank / "index.kvbm").touch()
        os.utime(rank / "index.kvbm", (written_at, written_at))
    assert drive.room_in(tmp_path)[1] == pytest.approx(free + 2 * 16 * MB, abs=MB)


def test_real_directory(tmp_path: Path) -> None:
    abilities = drive.abilities_of(tmp_path / "not/yet/there")
    assert isinstance(abilities, drive.Abilities)
    rate = drive.measure_disk(tmp_path / "not/yet/there", 8 << 20)
    assert rate.write > 0
    assert rate.read > 0
    assert rate.direct == abilities.o_direct
    assert list(tmp_path.iterdir()) == []
    assert isinstance(drive.abilities_of(Path("/proc/self")), OSError)


def test_rate_is_judged() -> None:
    def judge(read: float, direct: bool = True) -> State:
        return drive.check_rate(Path("/x"), drive.DiskRate(1 * GB, read, direct)).state

    assert judge(3 * GB) == State.OK
    assert judge(0.4 * GB) == State.ADVICE
    assert judge(3 * GB, direct=False) == State.UNKNOWN
    assert drive.check_rate(Path("/x"), OSError(errno.ENOSPC, "No space left")).state == State.UNKNOWN
