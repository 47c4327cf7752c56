"""A disk that fails while the engine runs: whatever becomes of it, the answers stay the same."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import disk_tools as disk
from tests.engine import scenarios
from tests.engine.conftest import Expect
from tests.engine.disk_tools import SMALL, SlowIo, settings
from tests.engine.harness import KVBM, Child, Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

TIMEOUT_S = 1.0


@contextlib.contextmanager
def drive(folder: Path, kind: str, megabytes: int) -> Iterator[Path]:
    """A small file system of its own. Skips the test where none can be made."""
    image, mount = folder / "image", folder / "drive"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    commands = [
        ["mkfs", "-t", kind, "-q", str(image)],
        ["mount", "-t", kind, "-o", "loop,errors=remount-ro", str(image), str(mount)],
    ]
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"{command[0]}: {error}")
        if done.returncode:
            pytest.skip(f"{command[0]}: {done.stderr.strip()} (this needs root and loop devices)")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.fixture(scope="module")
def slow_io(tmp_path_factory: pytest.TempPathFactory) -> SlowIo:
    return SlowIo(tmp_path_factory.mktemp("slow"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults") / "disk"


@pytest.fixture(scope="module")
def engine(keen: Path, keen_baseline: Engine, folder: Path, slow_io: SlowIo) -> Iterator[Engine]:
    env = settings(folder, more={"KVBM_DISK_TIMEOUT_S": str(TIMEOUT_S), **slow_io.env})
    with Engine(keen, kvbm={}, env=env, prepare=disk.quick_restarts, **SMALL) as engine:
        engine.wait_ready()
        yield engine


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    with contextlib.closing(Child()) as child:
        yield child


def start(child: Child, tiny: Path, env: dict[str, str]) -> str:
    options = {
        "dtype": "float32",
        "load_format": "dummy",
        "enforce_eager": True,
        "block_size": 32,
        "kv_transfer_config": {**KVBM, "kv_connector_extra_config": {}},
        **SMALL,
    }
    return child.call(scenarios.try_start, str(tiny), env, options)


@pytest.fixture
def patient(engine: Engine) -> Iterator[Engine]:
    """The same, but nothing is given up because the machine is busy with other things."""
    engine.call(disk.set_timeout, 60.0)
    yield engine
    engine.call(disk.set_timeout, TIMEOUT_S)


@pytest.mark.usefixtures("patient")
def test_truncated_containers(engine: Engine, folder: Path, expect_keen: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt, 12) for prompt in prompts.batch(800, [100, 170, 257])]
    want = expect_keen(asks)
    engine.call(disk.store, asks)
    files = sorted((folder / "kvbm-0" / "rank-0").glob("records-*"))
    sizes = [path.stat().st_size for path in files]
    for path in files:
        os.truncate(path, 10_000)  # in the midst of the first record
    got = engine.call(disk.from_disk, asks)
    assert got.tokens == want()
    assert (got.read, got.cached) == (0, [0, 0, 0])
    assert got.disk_after.failures["READ", "ERROR"] == 3 + 5 + 8
    assert got.at_rest
    # What was lost is written anew, where it was.
    engine.call(disk.store, asks)
    again = engine.call(disk.from_disk, asks)
    assert again.tokens == want()
    assert again.read == 3 + 5 + 8
    for path, size in zip(files, sizes, strict=True):
        os.truncate(path, size)


def test_process_that_is_stopped_for_good(engine: Engine, expect_keen: Expect, prompts: Prompts) -> None:
    """Requests go on without it after a while. It is killed in the end, and another one started."""
    asks = [Ask(prompt, 12) for prompt in prompts.batch(810, [100, 170])]
    want = expect_keen(asks)
    engine.call(disk.store, asks)
    (pid,) = disk.io_processes(engine)
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    got = engine.call(disk.from_disk, asks)
    assert time.monotonic() - start < 5 * TIMEOUT_S
    assert got.tokens == want()
    assert (got.read, got.cached) == (0, [0, 0])

    while pid in disk.io_processes(engine):  # until it shows that it hangs; an idle engine does not look
        engine.call(disk.run, [Ask(prompts.make(819, 8), 1)])
        assert time.monotonic() - start < 10 * TIMEOUT_S
    engine.call(disk.wait_io)
    again = engine.call(disk.from_disk, asks)
    assert again.tokens == want()
    assert again.read == 3 + 5
    reasons = {reason for direction, reason in again.disk_after.failures if direction == "READ"}
    assert reasons & {"TIMEOUT", "UNAVAILABLE"}
    assert again.at_rest


def test_process_that_is_stopped_for_a_while(engine: Engine, expect_keen: Expect, prompts: Prompts) -> None:
    """It writes into the host tier when nobody waits for that any more."""
    asks = [Ask(prompt, 12) for prompt in prompts.batch(820, [100, 170])]
    want = expect_keen(asks)
    engine.call(disk.store, asks)
    (pid,) = disk.io_processes(engine)
    os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    answer = engine.begin(disk.from_disk, asks)
    time.sleep(1.3 * TIMEOUT_S)
    assert time.monotonic() - start < 1.9 * TIMEOUT_S, "too slow a machine: the process counts as hanging"
    os.kill(pid, signal.SIGCONT)
    got = answer()
    assert got.tokens == want()
    assert got.read == 0
    engine.call(disk.wait_io)
    again = engine.call(disk.from_disk, asks)
    assert again.tokens == want()
    assert again.read == 3 + 5
    assert again.at_rest
    late = again.disk_after.failures["READ", "TIMEOUT"] - got.disk_before.failures.get(("READ", "TIMEOUT"), 0)
    assert late == 3 + 5
    assert disk.io_processes(engine) == [pid]


def test_slow_loads_are_made_where_that_is_wanted(
    engine: Engine, slow_io: SlowIo, expect_keen: Expect, prompts: Prompts
) -> None:
    """KVBM_DISK_SKIP_SLOW_LOADS=0; see test_disk_slow.py for the default."""
    asks = [Ask(prompts.make(830, 257), 12)]
    want = expect_keen(asks)
    engine.call(disk.store, asks)
    slow_io.set(read_s=0.3)
    slow = [engine.call(disk.from_disk, asks) for _ in range(2)]
    slow_io.set()
    assert [ran.read for ran in slow] == [8, 8]
    assert [ran.tokens for ran in slow] == [want()] * 2


def test_second_engine_in_one_folder(
    engine: Engine, keen: Path, folder: Path, expect_keen: Expect, prompts: Prompts
) -> None:
    """It runs without a disk, and says whose the folder is."""
    asks = [Ask(prompt, 12) for prompt in prompts.batch(840, [100, 170])]
    want = expect_keen(asks)
    engine.call(disk.store, asks)
    with Engine(keen, kvbm={}, env=settings(folder), **SMALL) as second:
        second.wait_ready()
        start = time.monotonic()
        first = second.call(disk.run, asks)
        assert time.monotonic() - start < 8  # requests wait 5 s for what lies on disk
        host = second.call(disk.run_again, asks)
        while not host.disk_after.off_reason:
            assert time.monotonic() - start < 20
            host = second.call(disk.run_again, asks)
        assert [first.tokens, host.tokens] == [want()] * 2
        assert (first.cached, host.cached) == ([0, 0], [96, 160])
        assert (host.disk_after.ready, host.disk_after.read, host.disk_after.written) == (False, 0, 0)
        reason = f"is in use by another engine (process {engine.pid})"
        assert reason in host.disk_after.off_reason
        assert reason in second.log(100_000)
        assert host.at_rest
    again = engine.call(disk.from_disk, asks)
    assert again.tokens == want()
    assert again.read == 3 + 5


def test_drive_that_fills_up(keen: Path, tmp_path: Path, expect_keen: Expect, prompts: Prompts) -> None:
    """Where files can't be allocated room may lack later: what can't be written is not cached."""
    asks = [Ask(prompt, 12) for prompt in prompts.batch(850, [100, 170, 257])]
    more = [Ask(prompt, 12) for prompt in prompts.batch(860, [130, 200])]
    want, want_more = expect_keen(asks), expect_keen(more)
    with drive(tmp_path, "ext2", 16) as mount:  # which has no fallocate
        env = {"KVBM_DISK_MIN_FREE_GB": "0", "DYN_KVBM_DISK_DISABLE_O_DIRECT": "1"}
        with Engine(
            keen, kvbm={}, env=settings(mount, more=env), prepare=disk.quick_restarts, **SMALL
        ) as engine:
            first = engine.call(disk.store, asks)
            filler = mount / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 12)):
                    pass
            full = engine.call(disk.run, more)
            assert full.disk_after.failures["WRITE", "ERROR"] > 0
            assert "No space left" in engine.log(100_000)
            reads = engine.call(disk.from_disk, asks)  # are served all the same
            assert [first.tokens, full.tokens, reads.tokens] == [want(), want_more(), want()]
            assert reads.read == 3 + 5 + 8
            assert reads.at_rest

            filler.unlink()
            engine.call(disk.store, more)
            again = engine.call(disk.from_disk, more)
            assert again.tokens == want_more()
            assert again.read == 4 + 6


def test_drive_that_turns_read_only(
    child: Child, keen: Path, tiny: Path, tmp_path: Path, expect_keen: Expect, prompts: Prompts
) -> None:
    """As ext4 does after an error; and no engine starts on it then."""
    asks = [Ask(prompt, 12) for prompt in prompts.batch(870, [100, 170, 257])]
    more = [Ask(prompt, 12) for prompt in prompts.batch(880, [130, 200])]
    want, want_more = expect_keen(asks), expect_keen(more)
    with drive(tmp_path, "ext4", 64) as mount:
        env = settings(mount, more={"KVBM_DISK_MIN_FREE_GB": "0"})
        with Engine(keen, kvbm={}, env=env, prepare=disk.quick_restarts, **SMALL) as engine:
            engine.call(disk.store, asks)
            subprocess.run(["mount", "-o", "remount,abort", str(mount)], check=True)
            cold = engine.call(disk.run, more)
            assert cold.tokens == want_more()
            assert (cold.written, cold.read) == (0, 0)
            assert cold.disk_after.failures["WRITE", "ERROR"] > 0
            reads = engine.call(disk.from_disk, asks)
            assert reads.tokens == want()
            assert reads.read == 3 + 5 + 8
            assert reads.at_rest
        subprocess.run(["umount", str(mount)], check=True)
        subprocess.run(["mount", "-o", "loop", str(tmp_path / "image"), str(mount)], check=True)
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        error = start(child, tiny, env)
    assert error.startswith("kvbm.errors.CapacityError")
    assert "Read-only file system" in error


def test_folder_that_can_not_be_made(child: Child, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    error = start(child, tiny, settings(tmp_path / "file"))
    assert error.startswith("kvbm.errors.CapacityError: The disk cache can't be kept in")
    assert "Not a directory" in error
    assert "DYN_KVBM_DISK_CACHE_DIR" in error


def test_too_little_room(child: Child, tiny: Path, tmp_path: Path) -> None:
    env = {**settings(tmp_path), "DYN_KVBM_DISK_CACHE_GB": "1e6"}
    del env["DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS"]
    error = start(child, tiny, env)
    assert error.startswith("kvbm.errors.CapacityError: The disk cache needs 1000000.00 GB in")
    assert "DYN_KVBM_DISK_CACHE_GB" in error
    assert not list(tmp_path.rglob("records-*"))
