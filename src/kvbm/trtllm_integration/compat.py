"""What differs between the versions of TensorRT-LLM that we support. All imports of it are here."""

import importlib
from typing import Any

from kvbm.engines import TENSORRT_LLM
from kvbm.errors import UnsupportedEngineError

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
        f"This TensorRT-LLM has no KV cache connector interface. Install a version from "
        f"{TENSORRT_LLM.supported}."
    )


def version() -> str:
    return str(importlib.import_module("tensorrt_llm").__version__)


def rank() -> int:
    """Of this process among those of the engine."""
    return int(importlib.import_module("tensorrt_llm._utils").mpi_rank())
