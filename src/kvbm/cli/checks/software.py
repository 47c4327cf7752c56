"""Checks of versions and settings."""

import platform
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

from kvbm.cli.checks.finding import Finding, State
from kvbm.config import Config, load_config
from kvbm.engines import SGLANG, TENSORRT_LLM, VLLM, Engine
from kvbm.errors import ConfigError

Version = Callable[[str], str | None]
"""Version of an installed distribution, None where it is not installed."""

_NIXL = ("nixl-cu12", "nixl-cu13")
_OLDEST_NIXL = (1, 5)  # see storage.nixl_io


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first(version: Version, names: tuple[str, ...]) -> str | None:
    return next((found for name in names if (found := version(name))), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def check_settings(environ: Mapping[str, str]) -> tuple[Config, list[Finding]]:
    """The effective settings, or the defaults where they are wrong."""
    try:
        config = load_config(environ=environ)
    except ConfigError as error:
        _, *problems = str(error).split("\n- ")
        findings = [
            Finding("settings", State.PROBLEM, problem, "Mend it: the engine will not start with it.")
            for problem in problems or [str(error)]
        ]
        return load_config(environ={}), findings
    changed = sum(source != "default" for source in config.sources.values())
    findings = [Finding("settings", State.OK, f"valid, {changed} set; `kvbm config` shows them")]
    findings += [
        Finding("settings", State.ADVICE, notice, "Remove what has no effect.") for notice in config.notices
    ]
    return config, findings


def requirements() -> dict[str, str]:
    """The packages that KVBM needs, and the oldest version of each."""
    try:
        needed = metadata.requires("kvbm") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        return {"msgspec": "0", "numpy": "0", "xxhash": "0"}
    matches = (re.match(r"([\w-]+)\s*>=\s*([\d.]+)$", line) for line in needed)
    return {match[1]: match[2] for match in matches if match}


def check_packages(needed: Mapping[str, str], version: Version = installed) -> Finding:
    found = {"kvbm": version("kvbm") or "from source", **{name: version(name) for name in needed}}
    wrong = [
        f"{name}>={oldest}"
        for name, oldest in needed.items()
        if _numbers(found[name] or "") < _numbers(oldest)
    ]
    parts = [f"Python {platform.python_version()}"]
    parts += [f"{name} {number or 'not installed'}" for name, number in found.items()]
    parts.append(f"torch {version('torch') or 'not installed'}")
    if wrong:
        to_do = "pip install " + " ".join(f"'{name}'" for name in wrong)
        return Finding("packages", State.PROBLEM, ", ".join(parts), to_do)
    return Finding("packages", State.OK, ", ".join(parts))


def check_engines(allow_untested: bool, version: Version = installed) -> list[Finding]:
    engines = (VLLM, SGLANG, TENSORRT_LLM)
    found = {engine: _first(version, engine.distributions) for engine in engines}
    if any(found.values()):
        return [_judge(engine, found[engine], allow_untested) for engine in engines]
    to_do = "To serve with KVBM, install an engine into this environment, or install KVBM into the engine's."
    supported = ", ".join(f"{engine.name} {engine.supported}" for engine in engines)
    return [Finding("engine", State.ADVICE, f"none is installed (supported: {supported})", to_do)]


def _judge(engine: Engine, found: str | None, allow_untested: bool) -> Finding:
    if found is None or engine.supports(found):
        text = f"{found or 'not installed'} (supported: {engine.supported})"
        return Finding(engine.name, State.OK, text)
    text = f"{found}, not among those that KVBM is tested with ({engine.supported})"
    if allow_untested:
        to_do = "It is tried, as KVBM_ALLOW_UNTESTED_ENGINE asks; watch for its warnings."
        return Finding(engine.name, State.ADVICE, text, to_do)
    to_do = "Install one of those, or set KVBM_ALLOW_UNTESTED_ENGINE=1 to try this one."
    return Finding(engine.name, State.PROBLEM, text, to_do)


def check_nixl(backend: str, root: Path = Path("/"), version: Version = installed) -> Finding:
    """backend: `disk.backend`, as set."""
    nixl = _first(version, _NIXL)
    wanted = backend != "posix"
    to_do = "pip install 'nixl>=1.5.0', or set KVBM_DISK_BACKEND=posix." if wanted else ""
    if nixl is None:
        state = State.PROBLEM if wanted else State.OK
        needed = f"but disk.backend is {backend}" if wanted else "and not needed"
        return Finding("NIXL", state, f"not installed, {needed}", to_do)
    if _numbers(nixl) < _OLDEST_NIXL:
        found = f"{nixl}: it takes failed transfers for complete ones, 1.5.0 is needed"
        return Finding("NIXL", State.PROBLEM if wanted else State.OK, found, to_do)
    if backend == "nixl-gds-mt" and not (root / "proc/driver/nvidia-fs").exists():
        return Finding(
            "NIXL",
            State.ADVICE,
            f"{nixl}; disk.backend is nixl-gds-mt, but the kernel module nvidia-fs is not loaded",
            "Load it (modprobe nvidia-fs): without it GPUDirect Storage goes through host memory.",
        )
    return Finding("NIXL", State.OK, f"{nixl}, {'used' if wanted else 'not used'} by the disk tier")
