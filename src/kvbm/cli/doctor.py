"""`kvbm doctor`: is this machine ready for KVBM, and what would make it better."""

import argparse
import functools
import os
import resource
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvbm.bench.report import progress
from kvbm.cli.checks import device, drive, memory, software
from kvbm.cli.checks.finding import Finding, State
from kvbm.cli.output import print_json
from kvbm.config import Config

_MOST_SHOWN = 300  # characters; an unknown name is answered with all known ones

Check = Callable[[], Finding | list[Finding]]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="is this machine ready for KVBM, and what would make it better",
        description="Looks at the settings, versions, memory, GPUs and drives, measures copies and drives "
        "for some seconds, and says what to do. Run it in the environment, container and user of the engine, "
        "before the engine starts. Exit status 1: there is a problem; advice alone is none.",
    )
    parser.add_argument(
        "--no-measure", action="store_true", help="without measurements: neither copies nor drives"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config, findings = software.check_settings(os.environ)
    checks = [*quick_checks(config)]
    if not args.no_measure:
        checks += measurements(config)
    for name, check in progress(checks, "checking"):
        findings += run_check(name, check)
    counts = Counter(finding.state for finding in findings)
    if args.json:
        print_json(
            {
                "findings": [finding.to_json() for finding in findings],
                "problems": counts[State.PROBLEM],
                "advice": counts[State.ADVICE],
            }
        )
    else:
        show(findings, shutil.get_terminal_size((100, 0)).columns)
        print(f"\n{_summary(counts)}")
    return 1 if counts[State.PROBLEM] else 0


def quick_checks(config: Config) -> Iterator[tuple[str, Check]]:
    """All that takes no measuring, by the name that is shown should a check itself fail."""
    gpu = device.has_gpu()
    gpus = device.find_gpus()
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield "packages", lambda: software.check_packages(software.requirements())
    yield "engines", lambda: software.check_engines(config.engine.allow_untested)
    yield "NIXL", lambda: software.check_nixl(config.disk.backend)
    yield "host memory", lambda: memory.check_host_memory(config)
    yield "shared memory", lambda: memory.check_shared_memory(memory.shared_memory_bytes())
    yield "locked memory", lambda: memory.check_locked_memory(config, gpu, limit)
    yield "huge pages", lambda: memory.check_huge_pages(config)
    yield "NUMA", lambda: device.check_numa(device.numa_nodes(), gpus, device.cpus_allowed_near(gpus))
    yield (
        "CUDA driver",
        lambda: device.check_driver(gpu, device.kernel_module_version(), device.cuda_version),
    )
    yield "CUDA devices", lambda: device.check_torch(gpu, device.load_torch() if gpu else None)
    yield "PCIe", lambda: device.check_pcie(gpus)
    yield "disk", lambda: check_disk(config)


def check_disk(config: Config) -> list[Finding]:
    if not config.has_disk:
        return [
            Finding("disk", State.OK, "no disk cache is configured (DYN_KVBM_DISK_CACHE_GB, docs/disk.md)")
        ]
    folders = drive.folders_of(config)
    mounts = drive.mounts()
    findings = []
    for folder in folders:
        kind = drive.file_system(drive.existing(folder).resolve(), mounts)
        findings.append(drive.check_file_system(folder, kind, drive.abilities_of(folder)))
    return findings + drive.check_room(config, {folder: drive.room_in(folder) for folder in folders})


def measurements(config: Config) -> Iterator[tuple[str, Check]]:
    if device.has_gpu():
        yield "copies", check_copies
    if config.has_disk:
        for folder in drive.folders_of(config):
            yield f"speed of {folder}", functools.partial(check_speed, folder)


def check_copies() -> list[Finding]:
    torch = device.load_torch()
    if torch is None or not torch.cuda.is_available():
        return []  # said already
    rates = device.measure_copies(torch)
    return device.check_copies(rates, device.find_gpus())


def check_speed(folder: Path) -> Finding:
    try:
        return drive.check_rate(folder, drive.measure_disk(folder))
    except OSError as error:
        return drive.check_rate(folder, error)


def run_check(name: str, check: Check) -> list[Finding]:
    """What a check says; a doctor that falls over what it finds would be no help."""
    try:
        found = check()
    except Exception as error:
        what = f"could not be checked: {type(error).__name__}: {error}"
        return [Finding(name, State.UNKNOWN, what.splitlines()[0])]
    return found if isinstance(found, list) else [found]


def show(findings: list[Finding], columns: int) -> None:
    width = max(len(finding.name) for finding in findings)
    wrap = textwrap.TextWrapper(
        max(60, columns), subsequent_indent=" " * (width + 11), break_long_words=False, break_on_hyphens=False
    )
    for finding in findings:
        found = textwrap.shorten(finding.found, _MOST_SHOWN, placeholder=" ...")
        print(wrap.fill(f"{finding.state:<9}{finding.name:<{width}}  {found}"))
        if finding.to_do:
            print(wrap.fill(f"{'':<{width + 9}}  -> {finding.to_do}"))


def _summary(counts: Counter[State]) -> str:
    problems, advice, unknown = (counts[s] for s in (State.PROBLEM, State.ADVICE, State.UNKNOWN))
    parts = [f"{problems or 'no'} {'problem' if problems == 1 else 'problems'}"]
    parts += [f"{advice} {'piece' if advice == 1 else 'pieces'} of advice"] if advice else []
    parts += [f"{unknown} unknown"] if unknown else []
    text = ", ".join(parts)
    return text[0].upper() + text[1:] + "."
