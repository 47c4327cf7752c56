"""What differs between the versions of TensorRT-LLM that we support. All imports of it are here."""

import importlib
import re
from typing import Any

from kvbm.errors import UnsupportedEngineError

OLDEST, NEWEST = (1, 2), (1, 4)
_INTERFACE = (
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector",  # 1.3 and later
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector",
)


def interface() -> Any:
    """The module with the classes that a connector derives from."""
    for name in _INTERFACE:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):  # it is there, but lacks something else
                raise
    raise UnsupportedEngineError(
        f"This TensorRT-LLM has no KV cache connector interface. Install a version from {_range()}."
    )


def check_engine_version(version: str, *, allow_untested: bool) -> None:
    """Refuse a TensorRT-LLM that this package was not written for."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if (found and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST) or allow_untested:
        return
    raise UnsupportedEngineError(
        f"TensorRT-LLM {version} is not among the versions that KVBM is written for ({_range()}). Install "
        f"one of those, or set KVBM_ALLOW_UNTESTED_ENGINE=1 to try this one."
    )


def version() -> str:
    return str(importlib.import_module("tensorrt_llm").__version__)


def rank() -> int:
    """Of this process among those of the engine."""
    return int(importlib.import_module("tensorrt_llm._utils").mpi_rank())


def _range() -> str:
    return f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
