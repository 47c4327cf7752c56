"""How large the tiers are, and what an I/O process is started with."""

from pathlib import Path
from typing import Any

import pytest

from kvbm.config import Config, load_config
from kvbm.errors import CapacityError, ConfigError
from kvbm.runtime import disk as disk_module
from kvbm.runtime.disk import disk_record_bytes, num_disk_slots, num_host_slots, start_storage
from kvbm.storage.messages import Options
from kvbm.storage.record import HEADER_BYTES
from kvbm.transfer.arena import HostArena
from kvbm.vllm_integration.identity import Geometry
from kvbm.vllm_integration.scheduler import disk_slots_of, slots_of

RECORD = 5000  # bytes: two pages
SLOT = 8192


def config(**settings: Any) -> Config:
    return load_config(environ={}, **settings)


# ---- sizes ----


def test_a_record_on_disk_has_a_header_on_every_rank() -> None:
    assert disk_record_bytes([RECORD]) == SLOT + HEADER_BYTES
    assert disk_record_bytes([RECORD] * 4) == 4 * (SLOT + HEADER_BYTES)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_gigabytes_are_the_sum_over_all_ranks(ranks: int) -> None:
    for blocks in (1, 10, 1000):
        size = blocks * ranks * (SLOT + HEADER_BYTES) / 1e9
        assert num_disk_slots(config(disk__cache_gb=size * 1.0001), [RECORD] * ranks) == blocks
        assert num_disk_slots(config(disk__cache_gb=size * 0.9999), [RECORD] * ranks) == blocks - 1
        size = blocks * ranks * SLOT / 1e9
        assert num_host_slots(config(host__cache_gb=size * 1.0001), [RECORD] * ranks) == blocks
        assert num_host_slots(config(host__cache_gb=size * 0.9999), [RECORD] * ranks) == blocks - 1


def test_a_number_of_blocks_wins() -> None:
    both = config(disk__cache_gb=5, disk__num_blocks=7, host__cache_gb=5, host__num_blocks=3)
    assert num_disk_slots(both, [RECORD] * 2) == 7
    assert num_host_slots(both, [RECORD] * 2) == 3


def test_no_disk() -> None:
    assert num_disk_slots(config(host__cache_gb=1), [RECORD]) == 0


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_disk_alone_has_a_small_host_tier(ranks: int) -> None:
    """At most 1 GB over all ranks, and no more than the disk has blocks."""
    record = 1_000_000
    slot = 1_003_520
    assert num_host_slots(config(disk__cache_gb=500), [record] * ranks) == int(1e9 // (slot * ranks))
    assert num_host_slots(config(disk__num_blocks=100), [record] * ranks) == 100
    assert num_host_slots(config(disk__num_blocks=3), [record] * ranks) == 16
    assert num_host_slots(config(disk__cache_gb=500), [10**9] * ranks) == 16  # blocks as large as that
    # A host tier that was asked for stays as it is, however small.
    assert num_host_slots(config(disk__cache_gb=500, host__num_blocks=2), [record] * ranks) == 2


def test_less_than_one_block_is_an_error() -> None:
    shape = Geometry(block_size=16, record_bytes=RECORD, num_device_blocks=7, ranks=2)
    size = 2 * (SLOT + HEADER_BYTES) / 1e9
    with pytest.raises(CapacityError, match="DYN_KVBM_DISK_CACHE_GB"):
        disk_slots_of(shape, config(disk__cache_gb=size * 0.99))
    assert disk_slots_of(shape, config(disk__cache_gb=size * 1.01)) == 1
    assert disk_slots_of(shape, config(host__cache_gb=1)) == 0
    assert slots_of(shape, config(disk__cache_gb=size * 1.01)) == 16


# ---- the I/O process ----


class FakeClient:
    def __init__(self, options: Options, arena_fd: int) -> None:
        self.options = options
        self.arena_fd = arena_fd


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(disk_module, "StorageClient", FakeClient)
    monkeypatch.setattr(disk_module, "lies_in_memory", lambda folder: "shm" in str(folder))
    arena = HostArena(6, RECORD)

    def start_(replica: int = 0, **settings: Any) -> Options:
        client: Any = start_storage(
            config(disk__num_blocks=10, **settings),
            arena,
            num_slots=10,
            namespace=b"n" * 16,
            rank=1,
            ranks=2,
            replica=replica,
        )
        assert client.arena_fd == arena.fd
        return client.options

    yield start_
    arena.close()


def test_it_is_told_of_the_arena_and_the_rank(start: Any, tmp_path: Path) -> None:
    options = start(disk__dir=str(tmp_path))
    assert options == Options(
        folders=[str(tmp_path / "kvbm-0" / "rank-1-of-2")],
        namespace=b"n" * 16,
        rank=1,
        ranks=2,
        record_bytes=RECORD,
        slot_bytes=SLOT,
        host_slots=6,
        disk_slots=10,
        backend="posix",
        threads=8,
        zerofill_fallback=False,
        o_direct=True,
        open_direct=False,
        min_free_bytes=10**9,
    )


def test_settings_reach_it(start: Any, tmp_path: Path) -> None:
    options = start(
        replica=3,
        disk__dir=f"{tmp_path}/a: :{tmp_path}/b:",
        disk__threads=3,
        disk__zerofill_fallback=True,
        disk__disable_o_direct=True,
        disk__allocator="open-direct",
        disk__min_free_gb=0.25,
    )
    assert options.folders == [f"{tmp_path}/{name}/kvbm-3/rank-1-of-2" for name in "ab"]
    assert (options.threads, options.zerofill_fallback) == (3, True)
    assert (options.o_direct, options.open_direct, options.min_free_bytes) == (False, True, 250_000_000)


def test_a_folder_in_memory_is_said(start: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(disk__dir=f"{tmp_path}/shm:{tmp_path}/drive")
    assert caplog.text.count("lies in memory") == 1
    assert "shm/kvbm-0/rank-1-of-2" in caplog.text


def test_a_backend_that_is_not_installed(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="KVBM_DISK_BACKEND=posix"):
        start(disk__dir=str(tmp_path), disk__backend="nixl-posix")
    monkeypatch.setattr(disk_module, "find_spec", lambda name: name == "nixl_cu13" or None)
    assert start(disk__dir=str(tmp_path), disk__backend="nixl-posix").backend == "nixl-posix"


def test_more_than_the_drive_has_is_an_error(start: Any, tmp_path: Path) -> None:
    with pytest.raises(CapacityError):
        start(disk__dir=str(tmp_path), disk__min_free_gb=10**9)
