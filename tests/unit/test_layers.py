"""Imports run downward only: the layer rule of docs/architecture.md, held against every file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "kvbm"

BASE = {"config", "settings", "errors", "memory", "digest", "engines"}
BELOW_INTEGRATIONS = BASE | {"logic", "transfer", "storage", "observe", "runtime"}
ENGINES = {
    "vllm_integration": "vllm",
    "trtllm_integration": "tensorrt_llm",
    "sglang_integration": "sglang",
}
# What each part of the package may import from the others. `kvbm` is the package's own __init__.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "settings": set(),
    "memory": set(),
    "digest": set(),
    "engines": {"errors"},
    "config": {"settings", "errors"},
    "logic": BASE,
    "transfer": BASE,
    "storage": BASE,
    "observe": BASE | {"logic"},
    "runtime": BELOW_INTEGRATIONS - {"runtime"},
    **dict.fromkeys(ENGINES, BELOW_INTEGRATIONS),
    "bench": BELOW_INTEGRATIONS | set(ENGINES),
    "cli": BELOW_INTEGRATIONS | set(ENGINES) | {"bench"},
    "__main__": {"cli"},
    "kvbm": BELOW_INTEGRATIONS | set(ENGINES) | {"cli"},
}
# Logic is pure: no device, clock, thread, process or I/O.
IMPURE = {
    *("torch", "cupy", "triton", "ctypes"),
    *("time", "datetime", "sched", "signal"),
    *("threading", "_thread", "asyncio", "concurrent", "queue", "subprocess", "multiprocessing"),
    *("io", "os", "pathlib", "shutil", "tempfile", "mmap", "socket", "select", "selectors"),
}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that is imported, wherever in the file; of `from a import b` it is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *([node.module] if node.module else []), alias.name])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def violations(path: str, source: str) -> list[str]:
    """Forbidden imports of one file, given by its path inside the package."""
    parts = Path(path).with_suffix("").parts
    part = "kvbm" if path == "__init__.py" else parts[0]
    if part not in MAY_IMPORT:
        return [f"{path}: {part} is no part of the package that MAY_IMPORT knows"]
    found = []
    for line, name in imports(ast.parse(source), ".".join(["kvbm", *parts[:-1]])):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "kvbm":
            wrong = target not in {part, "__version__"} | MAY_IMPORT[part]
        elif top in ENGINES.values():
            wrong = ENGINES.get(part) != top
        else:
            wrong = part == "logic" and top in IMPURE
        if wrong:
            found.append(f"{path}:{line}: {part} must not import {name}")
    return found


FILES = sorted(str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_file_keeps_to_its_layer(path: str) -> None:
    assert violations(path, (PACKAGE / path).read_text()) == []


def test_all_files_are_found() -> None:
    assert {"__init__.py", "config.py", "errors.py"} <= set(FILES)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("errors.py", "import kvbm.config"),
        ("config.py", "from kvbm.logic import pool"),
        ("logic/pool.py", "from kvbm.runtime.leader import Leader"),
        ("logic/pool.py", "from kvbm import runtime"),
        ("logic/pool.py", "import kvbm"),
        ("logic/pool.py", "from kvbm import *"),
        ("logic/pool.py", "from kvbm import KvBlockManager"),
        ("logic/pool.py", "from kvbm.observe import metrics"),
        ("logic/pool.py", "from kvbm.transfer import arena"),
        ("logic/pool.py", "from ..runtime import leader"),
        ("logic/pool.py", "from .. import runtime"),
        ("logic/__init__.py", "from ..transfer import arena"),
        ("logic/deep/er.py", "from ...transfer import arena"),
        ("logic/pool.py", "def f():\n    import kvbm.runtime.leader"),
        ("logic/pool.py", "if TYPE_CHECKING:\n    import torch"),
        ("logic/pool.py", "def f():\n    from time import monotonic"),
        ("logic/pool.py", "try:\n    import os.path\nexcept ImportError:\n    pass"),
        ("logic/pool.py", "import math, socket"),
        ("logic/pool.py", "import torch as t"),
        ("logic/pool.py", "import importlib\nimportlib.import_module('threading')"),
        ("logic/pool.py", "t = __import__('time')"),
        *[
            ("logic/pool.py", f"import {name}")
            for name in ("threading", "asyncio", "subprocess", "multiprocessing", "io")
        ],
        ("logic/pool.py", "import vllm"),
        ("transfer/arena.py", "from kvbm.logic.policies import Policy"),
        ("transfer/arena.py", "from kvbm.logic.hashing import SequenceHash"),
        ("transfer/arena.py", "import kvbm.runtime"),
        ("transfer/arena.py", "from kvbm.storage import disk"),
        ("storage/disk.py", "from kvbm.logic import request"),
        ("storage/disk.py", "if TYPE_CHECKING:\n    from kvbm.runtime import worker"),
        ("storage/disk.py", "from kvbm.transfer import arena"),
        ("observe/metrics.py", "from kvbm.runtime import leader"),
        ("runtime/leader.py", "import kvbm.vllm_integration.connector"),
        ("runtime/leader.py", "from kvbm.cli import output"),
        ("bench/disk.py", "from kvbm.cli import output"),
        ("bench/chat.py", "import vllm"),
        ("runtime/leader.py", "from vllm.config import VllmConfig"),
        ("vllm_integration/connector.py", "from kvbm.sglang_integration import hooks"),
        ("vllm_integration/connector.py", "import sglang"),
        ("__init__.py", "import vllm"),
        ("misc/thing.py", ""),
        ("misc.py", ""),
    ],
)
def test_violation_is_found(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from kvbm.runtime.manager import KvBlockManager"),
        ("config.py", "import os\nfrom kvbm.errors import ConfigError"),
        (
            "logic/pool.py",
            "import numpy\nimport heapq\nimport timeit_like\nfrom kvbm.errors import UsageError",
        ),
        (
            "logic/pool.py",
            "from . import index\nfrom .index import Index\nfrom kvbm.logic.index import Index",
        ),
        ("logic/__init__.py", "from .pool import Pool\nfrom . import pool\nfrom ..errors import UsageError"),
        ("logic/pool.py", "from kvbm import __version__"),
        ("transfer/arena.py", "import torch\nimport os\nfrom kvbm import errors, config"),
        (
            "runtime/leader.py",
            "from kvbm.logic import pool\nfrom kvbm.transfer import arena\nimport kvbm.storage.disk",
        ),
        ("runtime/leader.py", "import time\nimport kvbm.observe.metrics"),
        (
            "vllm_integration/connector.py",
            "import vllm\nfrom kvbm.runtime.leader import Leader\nimport kvbm.logic.pool",
        ),
        ("cli/main.py", "import kvbm.vllm_integration.doctor\nfrom kvbm.bench import report"),
        ("bench/blocks.py", "from kvbm.vllm_integration.scheduler import SchedulerSide"),
    ],
)
def test_clean_file_is_clean(path: str, source: str) -> None:
    assert violations(path, source) == []
