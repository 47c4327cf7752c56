"""KvBlockManager over a real disk: an I/O process, files, and what a later manager finds."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm import CapacityError, ConfigError, KvBlockManager
from kvbm.logic.pool import BlockEvent, EventKind

BLOCK_SIZE = 16
BLOCKS = 64


def tokens(sequence: int, blocks: int = 4) -> list[int]:
    return [1000 * sequence + i for i in range(blocks * BLOCK_SIZE)]


class Device:
    """KV of sequences of four blocks in the first half; the second half is where it comes back to."""

    def __init__(self, dtype: Any = np.float32) -> None:
        self.kv = np.random.default_rng(0).random((BLOCKS, 2, BLOCK_SIZE, 8)).astype(dtype)
        self.original = self.kv.copy()

    def offload(self, manager: KvBlockManager, sequence: int, salt: str | None = None) -> int:
        return manager.offload(tokens(sequence), list(range(4 * sequence, 4 * sequence + 4)), salt=salt)

    def onboard(self, manager: KvBlockManager, sequence: int, salt: str | None = None) -> int:
        """Blocks that came back, each bit as it was."""
        self.kv[BLOCKS // 2 :] = 0
        target = list(range(BLOCKS // 2, BLOCKS // 2 + 4))
        count = manager.onboard(tokens(sequence), target, salt=salt)
        assert (self.kv[target[:count]] == self.original[4 * sequence : 4 * sequence + count]).all()
        assert not self.kv[target[count:]].any()
        return count


@contextmanager
def managing(device: Device, folder: Path, **settings: Any) -> Iterator[KvBlockManager]:
    defaults: dict[str, Any] = {
        "host__num_blocks": 8,
        "disk__num_blocks": 40,
        "disk__dir": str(folder),
        "disk__disable_filter": True,
        "disk__max_queued_blocks": 100,
    }
    with KvBlockManager(
        block_size=BLOCK_SIZE, kv_caches={"layer.0": device.kv}, **{**defaults, **settings}
    ) as manager:
        yield manager


def fill(device: Device, manager: KvBlockManager, sequences: int = 6) -> None:
    for sequence in range(sequences):
        assert device.offload(manager, sequence) == 4
        assert manager.flush()


def test_what_the_host_tier_has_lost_comes_back_from_disk(tmp_path: Path) -> None:
    device = Device()
    with managing(device, tmp_path) as manager:
        fill(device, manager)
        assert [device.onboard(manager, i) for i in range(6)] == [4] * 6
        stats = manager.stats()
        assert stats.disk is not None
        assert (stats.disk.written_blocks, stats.disk.read_blocks) == (24, 24)
        assert stats.onboarded == 24
        assert device.onboard(manager, 7) == 0


def test_a_later_manager_finds_it(tmp_path: Path) -> None:
    device = Device()
    with managing(device, tmp_path) as manager:
        fill(device, manager)
    with managing(device, tmp_path) as manager:
        assert [device.onboard(manager, i) for i in range(6)] == [4] * 6
        stats = manager.stats().disk
        assert stats is not None
        assert stats.recovered_blocks == 24
        assert stats.written_blocks == 0


@pytest.mark.parametrize("changed", ["dtype", "namespace", "salt"])
def test_other_contents_are_not_found(tmp_path: Path, changed: str) -> None:
    with managing(Device(), tmp_path) as manager:
        fill(Device(), manager)
    if changed == "salt":
        with managing(device := Device(), tmp_path) as manager:
            assert device.onboard(manager, 0, salt="other") == 0
    elif changed == "dtype":
        # int32 takes the same bytes a block: only the name of the type tells.
        with managing(device := Device(np.int32), tmp_path) as manager:
            assert device.onboard(manager, 0) == 0
    else:
        device = Device()
        with KvBlockManager(
            block_size=BLOCK_SIZE,
            kv_caches={"layer.0": device.kv},
            namespace={"model": "other"},
            host__num_blocks=8,
            disk__num_blocks=40,
            disk__dir=str(tmp_path),
        ) as manager:
            assert device.onboard(manager, 0) == 0


def test_the_filter_lets_only_what_is_used_again_on_disk(tmp_path: Path) -> None:
    device = Device()
    with managing(device, tmp_path, disk__disable_filter=None) as manager:
        device.offload(manager, 0)
        device.offload(manager, 1)
        assert device.onboard(manager, 1) == 4
        assert manager.flush()
        stats = manager.stats().disk
        assert stats is not None
        assert stats.written_blocks == 4
        assert stats.not_admitted_blocks == 8
    with managing(device, tmp_path) as manager:
        assert [device.onboard(manager, i) for i in (0, 1)] == [0, 4]


def test_disk_alone(tmp_path: Path) -> None:
    device = Device()
    with managing(device, tmp_path, host__num_blocks=None, disk__disable_filter=None) as manager:
        assert 16 <= manager.stats().capacity <= 40
        fill(device, manager)
    with managing(device, tmp_path, host__num_blocks=None) as manager:
        assert [device.onboard(manager, i) for i in range(6)] == [4] * 6


def test_clear_is_for_good(tmp_path: Path) -> None:
    device = Device()
    with managing(device, tmp_path) as manager:
        fill(device, manager)
        manager.clear()
        assert device.onboard(manager, 0) == 0
        device.offload(manager, 1)
        assert manager.flush()
    with managing(device, tmp_path) as manager:
        assert [device.onboard(manager, i) for i in range(6)] == [0, 4, 0, 0, 0, 0]


def test_a_damaged_record_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    device = Device()
    with managing(device, tmp_path) as manager:
        fill(device, manager)
        for file in tmp_path.rglob("records-*"):
            data = bytearray(file.read_bytes())
            data[4096:] = bytes(len(data) - 4096)
            with file.open("r+b") as opened:
                opened.write(data)
                os.fsync(opened.fileno())
        with caplog.at_level(logging.WARNING):
            assert [device.onboard(manager, i) for i in range(4)] == [0] * 4
            assert device.onboard(manager, 5) == 4  # still in host memory
        stats = manager.stats().disk
        assert stats is not None
        assert sum(stats.failures.values()) >= 4
    assert "damaged" in caplog.text


def test_it_goes_on_when_the_io_process_dies(tmp_path: Path) -> None:
    device = Device()
    with managing(device, tmp_path) as manager:
        fill(device, manager)
        disk = manager._store._disk
        assert disk is not None
        assert disk._worker._disk is not None
        os.kill(disk._worker._disk.pid or 0, signal.SIGKILL)
        assert device.onboard(manager, 5) == 4  # in host memory
        assert device.onboard(manager, 0) == 0  # a miss at worst
        end = time.monotonic() + 20
        while device.onboard(manager, 0) != 4:
            assert time.monotonic() < end
            time.sleep(0.1)


def test_events_name_the_tier(tmp_path: Path) -> None:
    device = Device()
    heard: list[BlockEvent] = []
    with managing(device, tmp_path) as manager:
        unsubscribe = manager.subscribe(heard.append)
        device.offload(manager, 0)
        assert manager.flush()
        manager.clear()
        unsubscribe()
        device.offload(manager, 1)
    assert [(event.kind, event.tier, len(event.hashes)) for event in heard] == [
        (EventKind.STORED, "host", 4),
        (EventKind.STORED, "disk", 4),
        (EventKind.REMOVED, "host", 4),
        (EventKind.REMOVED, "disk", 4),
    ]


def test_mistakes(tmp_path: Path) -> None:
    device = Device()
    with pytest.raises(CapacityError, match="less than one block"):
        with managing(device, tmp_path, disk__num_blocks=None, disk__cache_gb=1e-9):
            pass
    with pytest.raises(CapacityError, match="DYN_KVBM_DISK_CACHE_GB"):
        with managing(device, tmp_path, disk__min_free_gb=1e6):
            pass
    (tmp_path / "file").write_text("")
    with pytest.raises(CapacityError, match="can't be kept in"):
        with managing(device, tmp_path / "file"):
            pass
    with pytest.raises(ConfigError, match="wrong KVBM configuration"):
        with managing(device, tmp_path, disk__backend="other"):
            pass
