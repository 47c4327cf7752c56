import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kvbm

ImportedBy = Callable[[str], set[str]]

HEAVY = ("numpy", "torch", "vllm", "sglang", "tensorrt_llm")


@pytest.fixture
def imported_by(tmp_path: Path) -> ImportedBy:
    """What a fresh process imports; heavy packages are empty stand-ins, so that their import always shows."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").touch()

    def run(code: str) -> set[str]:
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        process = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        return {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}

    return run


def test_the_probe_sees_heavy_imports(imported_by: ImportedBy) -> None:
    assert set(HEAVY) <= imported_by(f"import {', '.join(HEAVY)}")


@pytest.mark.parametrize(
    "code",
    ["import kvbm", "import kvbm; kvbm.load_config(environ={}); raise SystemExit(kvbm.ConfigError is None)"],
)
def test_import_is_light(imported_by: ImportedBy, code: str) -> None:
    modules = imported_by(code)
    assert "kvbm" in modules
    assert not modules & set(HEAVY)


def test_import_defers_everything(imported_by: ImportedBy) -> None:
    assert {name for name in imported_by("import kvbm") if name.startswith("kvbm.")} == set()


def test_exports() -> None:
    for name in kvbm.__all__:
        assert name in dir(kvbm)
        value = getattr(kvbm, name)
        assert getattr(value, "__name__", name) == name


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Blocks'"):
        kvbm.Blocks  # type: ignore[attr-defined]  # noqa: B018
