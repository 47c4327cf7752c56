"""KVBM: keeps an inference engine's KV-cache blocks in cheaper memory and gives them back."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbm.config import Config, load_config
    from kvbm.errors import (
        CapacityError,
        ConfigError,
        KvbmError,
        LayoutError,
        UnsupportedEngineError,
        UsageError,
    )
    from kvbm.runtime.manager import KvBlockManager

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "Config",
    "ConfigError",
    "KvBlockManager",
    "KvbmError",
    "LayoutError",
    "UnsupportedEngineError",
    "UsageError",
    "__version__",
    "load_config",
]

_DEFINED_IN = {
    "CapacityError": "kvbm.errors",
    "Config": "kvbm.config",
    "ConfigError": "kvbm.errors",
    "KvBlockManager": "kvbm.runtime.manager",
    "KvbmError": "kvbm.errors",
    "LayoutError": "kvbm.errors",
    "UnsupportedEngineError": "kvbm.errors",
    "UsageError": "kvbm.errors",
    "load_config": "kvbm.config",
}


if not TYPE_CHECKING:  # or every misspelled attribute would pass the type check as Any
    # Engines import the package in every process they start, also in those that never touch a block.
    def __getattr__(name: str) -> Any:
        if name not in _DEFINED_IN:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_DEFINED_IN[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
