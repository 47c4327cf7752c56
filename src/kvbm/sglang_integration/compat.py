"""What differs between the versions of SGLang that we support. All imports of it by name are here."""

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

# Where a model's weights are changed, newest first.
_WEIGHT_UPDATERS = (
    "sglang.srt.model_executor.model_runner_components.weight_updater",  # 0.5.18 and later
    "sglang.srt.model_executor.model_runner",
)
_CACHE_CONTROLLERS = (
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller",
    "sglang.srt.managers.cache_controller",
)


def version() -> str:
    return str(importlib.import_module("sglang").__version__)


def server_args() -> Any:
    """The engine's settings; None outside an engine."""
    for module, getter in (
        ("sglang.srt.runtime_context", "get_server_args"),  # 0.5.22 and later
        ("sglang.srt.server_args", "get_global_server_args"),
    ):
        try:
            return getattr(importlib.import_module(module), getter)()
        except Exception:  # each version says in its own way that there are none
            continue
    return None


def replica() -> int:
    """Number of this engine among those of one deployment (data parallelism)."""
    try:
        parallel = importlib.import_module("sglang.srt.runtime_context").get_parallel()
        return int(parallel.dp_rank or 0)
    except (ImportError, AttributeError, ValueError, RuntimeError):
        return 0


def weight_updaters() -> Iterator[type]:
    """Classes with methods that change weights."""
    yield from _classes_in(_WEIGHT_UPDATERS, "")


def cache_controllers() -> Iterator[type]:
    """Classes whose `reset` empties SGLang's own tiers and what is on its way to a backend."""
    yield from _classes_in(_CACHE_CONTROLLERS, "CacheController")


def event_publisher(config: str, attn_dp_rank: int) -> tuple[Any, Any]:
    """Module of the event classes, and a publisher of SGLang's own."""
    module = importlib.import_module("sglang.srt.disaggregation.kv_events")
    return module, module.EventPublisherFactory.create(config, attn_dp_rank)


def storage_metrics() -> Any:
    """An empty report for SGLang's own metrics; None where it has none."""
    for name in ("sglang.srt.observability.metrics_collector", "sglang.srt.metrics.collector"):
        try:
            return importlib.import_module(name).StorageMetrics()
        except (ImportError, AttributeError):
            continue
    return None


def _classes_in(modules: Iterable[str], ending: str) -> Iterator[type]:
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        yield from (
            value
            for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == name and value.__name__.endswith(ending)
        )
