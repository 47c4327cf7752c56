"""Which CPUs are near a device."""

import os
from pathlib import Path

import pytest

from kvbm.transfer.numa import cpus_near

DEVICE = "0000:c5:00.0"


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The CPUs that this process may use."""
    cpus = set(range(64))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cpus))
    return cpus


def machine(root: Path, node: str, cpus: str) -> Path:
    device = root / "sys/bus/pci/devices" / DEVICE
    device.mkdir(parents=True)
    (device / "numa_node").write_text(node)
    folder = root / "sys/devices/system/node/node1"
    folder.mkdir(parents=True)
    (folder / "cpulist").write_text(cpus)
    return root


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("4-7\n", {4, 5, 6, 7}),
        ("3\n", {3}),
        ("0-1,8,10-11\n", {0, 1, 8, 10, 11}),
        ("60-70\n", {60, 61, 62, 63}),  # not all exist for us
        ("100-120\n", set()),
    ],
)
def test_cpus_of_the_device_s_node(tmp_path: Path, listed: str, expected: set[int]) -> None:
    assert cpus_near(DEVICE, machine(tmp_path, "1\n", listed)) == expected


def test_only_cpus_that_this_process_may_use(tmp_path: Path, allowed: set[int]) -> None:
    allowed.intersection_update({5, 9})
    assert cpus_near(DEVICE, machine(tmp_path, "1\n", "4-7\n")) == {5}


def test_addresses_are_written_in_either_case(tmp_path: Path) -> None:
    assert cpus_near(DEVICE.upper(), machine(tmp_path, "1\n", "4\n")) == {4}


@pytest.mark.parametrize(
    ("node", "cpus"),
    [("-1\n", "4-7\n"), ("0\n", "4-7\n"), ("", "4-7\n"), ("x\n", "4-7\n"), ("1\n", "\n"), ("1\n", "4-x\n")],
)
def test_no_node_that_could_be_read(tmp_path: Path, node: str, cpus: str) -> None:
    assert cpus_near(DEVICE, machine(tmp_path, node, cpus)) == set()


@pytest.mark.parametrize("address", [DEVICE, "0000:00:00.0", ""])
def test_no_such_device(tmp_path: Path, address: str) -> None:
    assert cpus_near(address, tmp_path) == set()
    assert cpus_near("0000:00:00.0", machine(tmp_path, "1\n", "4\n")) == set()
