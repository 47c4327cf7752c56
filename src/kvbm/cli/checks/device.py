"""Checks of GPUs: driver, torch, PCIe link, NUMA node, and how fast memory is copied."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbm.cli.checks.finding import Finding, State, read

_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI's vendor, and the class of display controllers
_LANE_GBS = {2.5: 0.25, 5.0: 0.5, 8.0: 0.985, 16.0: 1.969, 32.0: 3.938, 64.0: 7.563}  # by GT/s
_GENERATION = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
_GOOD_PART = 0.7  # of the link; a healthy one gives 0.85
_BATCH_COPY = 12080  # driver version since which one call orders many pieces
_PROBE_BYTES, _PROBES = 256 << 20, 4


@dataclass(frozen=True, slots=True)
class Gpu:
    """As PCI describes it. Speeds in GT/s a lane."""

    address: str
    model: str
    speed: float | None
    width: int | None
    max_speed: float | None
    max_width: int | None
    node: int | None


def find_gpus(root: Path = Path("/")) -> list[Gpu]:
    """NVIDIA's GPUs; in a container also those that it may not use."""
    found = []
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        if read(device / "vendor") != _NVIDIA or not (read(device / "class") or "").startswith(_DISPLAY):
            continue
        told = read(root / f"proc/driver/nvidia/gpus/{device.name}/information") or ""
        model = re.search(r"^Model:\s*(.+)$", told, re.MULTILINE)
        node = _number(device / "numa_node")
        found.append(
            Gpu(
                device.name,
                model[1].strip() if model else "NVIDIA GPU",
                _number(device / "current_link_speed"),
                _whole(_number(device / "current_link_width")),
                _number(device / "max_link_speed"),
                _whole(_number(device / "max_link_width")),
                None if node is None or node < 0 else int(node),
            )
        )
    return found


def _number(path: Path) -> float | None:
    match = re.match(r"-?\d+(\.\d+)?", read(path) or "")
    return float(match[0]) if match else None


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def has_gpu(root: Path = Path("/")) -> bool:
    return bool(find_gpus(root)) or (root / "proc/driver/nvidia/version").exists()


def check_driver(gpu: bool, kernel_module: str | None, cuda_version: Callable[[], int]) -> Finding:
    """kernel_module: version of NVIDIA's, None where none is loaded; cuda_version: raises without libcuda."""
    name = "CUDA driver"
    if not gpu:
        return Finding(name, State.OK, "no NVIDIA GPU here: engines run on CPUs")
    try:
        version = cuda_version()
    except Exception as error:
        return Finding(
            name,
            State.PROBLEM,
            f"there is a GPU, but CUDA's driver library can't be used: {error}",
            "Install NVIDIA's driver; docker: run with --gpus all.",
        )
    found = f"CUDA {version // 1000}.{version % 1000 // 10}, kernel module {kernel_module or 'unknown'}"
    if version < _BATCH_COPY:
        return Finding(
            name,
            State.ADVICE,
            f"{found}; many pieces can't be ordered in one call",
            "A driver for CUDA 12.8 or later copies small pieces faster.",
        )
    return Finding(name, State.OK, found)


def kernel_module_version(root: Path = Path("/")) -> str | None:
    told = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", read(root / "proc/driver/nvidia/version") or "")
    return told[1] if told else read(root / "sys/module/nvidia/version")


def check_torch(gpu: bool, torch: Any) -> Finding:
    """torch: the module, or None where it can't be imported."""
    name = "CUDA devices"
    if not gpu:
        return Finding(name, State.OK, "none")
    if torch is None:
        return Finding(
            name,
            State.UNKNOWN,
            "torch is not installed, so it is not known what CUDA makes of the GPU",
            "Install the engine into this Python environment, and run this again.",
        )
    if not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return Finding(
            name,
            State.PROBLEM,
            f"there is a GPU, but torch {torch.__version__}, built {built}, can't use it",
            "Install the torch that your engine asks for, built for CUDA; docker: run with --gpus all.",
        )
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    counted = ", ".join(f"{names.count(each)} x {each}" for each in dict.fromkeys(names))
    return Finding(name, State.OK, f"{counted}; torch {torch.__version__}")


def check_pcie(gpus: list[Gpu]) -> list[Finding]:
    return [_check_link(gpu) for gpu in gpus]


def _check_link(gpu: Gpu) -> Finding:
    name = f"PCIe {gpu.address}"
    if not gpu.speed or not gpu.width:
        return Finding(name, State.UNKNOWN, f"{gpu.model}: this system does not tell its link's speed")
    found = f"{gpu.model}: {link_words(gpu.speed, gpu.width)}"
    if gpu.max_width and gpu.width < gpu.max_width:
        return Finding(
            name,
            State.ADVICE,
            f"{found}, though it could use {gpu.max_width} lanes",
            "Copies are as slow as the lanes are few: look at the slot, the riser, and the BIOS.",
        )
    if gpu.max_speed and gpu.speed < gpu.max_speed:
        found += (
            f", of generation {_GENERATION.get(gpu.max_speed, '?')} at most (links of idle GPUs slow down)"
        )
    return Finding(name, State.OK, found)


def link_words(speed: float, width: int) -> str:
    rate = _LANE_GBS.get(speed)
    most = f", {rate * width:.0f} GB/s at most" if rate else ""
    return f"generation {_GENERATION.get(speed, '?')}, {width} lanes{most}"


def check_numa(nodes: list[int], gpus: list[Gpu], allowed_near: dict[str, int]) -> Finding:
    """allowed_near: for each GPU's address, how many CPUs of its node this process may use."""
    name = "NUMA"
    found = "one node" if len(nodes) <= 1 else f"{len(nodes)} nodes"
    if len(nodes) <= 1:
        return Finding(name, State.OK, f"{found}: all memory is equally near")
    if not gpus:
        return Finding(name, State.OK, f"{found}, no GPU to be near to")
    places = ", ".join(f"{gpu.address} {'unknown' if gpu.node is None else gpu.node}" for gpu in gpus)
    found = f"{found}; nodes of GPUs: {places}"
    if any(gpu.node is None for gpu in gpus):
        return Finding(
            name,
            State.ADVICE,
            found,
            "Without a node, host memory may lie far from the GPU: pass the host's topology to the VM.",
        )
    far = [gpu.address for gpu in gpus if not allowed_near.get(gpu.address)]
    if far:
        return Finding(
            name,
            State.ADVICE,
            f"{found}; this process may use no CPU near {', '.join(far)}",
            "Host memory will lie on another node: allow CPUs of the GPU's (taskset, numactl, cpuset).",
        )
    return Finding(name, State.OK, found)


def numa_nodes(root: Path = Path("/")) -> list[int]:
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    return sorted(int(folder.name.removeprefix("node")) for folder in folders)


@dataclass(frozen=True, slots=True)
class CopyRate:
    """Bytes per second between pinned host memory and a device."""

    device: str
    address: str | None
    to_device: float
    from_device: float


def measure_copies(torch: Any) -> list[CopyRate]:
    """Of each device that torch sees, one contiguous piece; the best of some tries."""
    host = torch.empty(_PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
    rates = []
    for i in range(torch.cuda.device_count()):
        device = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=f"cuda:{i}")
        best = []
        for target, source in ((device, host), (host, device)):
            seconds = []
            for _ in range(_PROBES):
                torch.cuda.synchronize(i)
                start = time.perf_counter()
                target.copy_(source, non_blocking=True)
                torch.cuda.synchronize(i)
                seconds.append(time.perf_counter() - start)
            best.append(_PROBE_BYTES / min(seconds))
        rates.append(CopyRate(f"cuda:{i}", _address(torch, i), *best))
    return rates


def _address(torch: Any, index: int) -> str | None:
    at = torch.cuda.get_device_properties(index)
    try:
        return f"{at.pci_domain_id:04x}:{at.pci_bus_id:02x}:{at.pci_device_id:02x}.0"
    except AttributeError:  # an older torch
        return None


def check_copies(rates: list[CopyRate], gpus: list[Gpu]) -> list[Finding]:
    """gpus: as they were just after the measurement, when their links were awake."""
    return [_check_rate(rate, next((g for g in gpus if g.address == rate.address), None)) for rate in rates]


def _check_rate(rate: CopyRate, gpu: Gpu | None) -> Finding:
    name = f"copies {rate.device}"
    found = f"{rate.to_device / 1e9:.1f} GB/s to the GPU, {rate.from_device / 1e9:.1f} GB/s from it"
    lane = _LANE_GBS.get(gpu.speed or 0.0) if gpu else None
    if not gpu or not lane or not gpu.width:
        return Finding(name, State.OK, f"{found}; what the link allows is not known")
    limit = lane * gpu.width * 1e9
    found += f" ({link_words(gpu.speed or 0.0, gpu.width)})"
    if min(rate.to_device, rate.from_device) < _GOOD_PART * limit:
        return Finding(
            name,
            State.ADVICE,
            found,
            "Less than the link should give: is the GPU busy, or the memory on another NUMA node?",
        )
    return Finding(name, State.OK, found)


def cpus_allowed_near(gpus: list[Gpu], root: Path = Path("/")) -> dict[str, int]:
    from kvbm.transfer.numa import cpus_near

    return {gpu.address: len(cpus_near(gpu.address, root)) for gpu in gpus}


def load_torch() -> Any:
    """The module, or None. Its import takes seconds and is made only where there is a GPU."""
    try:
        import torch
    except (ImportError, OSError):
        return None
    return torch


def cuda_version() -> int:
    from kvbm.transfer.cuda import driver

    return driver.version()
