"""KVBM as a vLLM KV connector.

    vllm serve MODEL --kv-transfer-config '{"kv_connector":"DynamoConnector","kv_role":"kv_both",
        "kv_connector_module_path":"kvbm.vllm_integration.connector"}'

vLLM makes one object in its scheduler and one on each worker. Here each hook is handed to the half it
belongs to; no exception of ours leaves a hook once the engine runs.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvbm.config import Config, load_config
from kvbm.engines import VLLM
from kvbm.errors import LostLoadError
from kvbm.observe.logs import log_json
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.scheduler import SchedulerSide, make_scheduler_side
from kvbm.vllm_integration.stats import KvbmPromMetrics, KvbmStats
from kvbm.vllm_integration.worker import Snapshot, WorkerSide

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass
class KvbmMetadata(KVConnectorMetadata):
    """Scheduler to workers, with each step."""

    orders: StepOrders = field(default_factory=StepOrders)


@dataclass
class KvbmWorkerMetadata(KVConnectorWorkerMetadata):
    """Workers to scheduler, with each step's output; vLLM joins those of all ranks."""

    reports: list[WorkerReport]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        return (
            KvbmWorkerMetadata(self.reports + other.reports)
            if isinstance(other, KvbmWorkerMetadata)
            else self
        )


def _never_raises(default: Callable[[], Any]) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """An error of ours is logged, caching goes off, and vLLM gets the answer of an empty cache.

    But a load that vLLM computes on and that can't be made stops it, rather than let it say something wrong.
    """

    def decorate(hook: Callable[..., _T]) -> Callable[..., _T]:
        @functools.wraps(hook)
        def guarded(self: "KvbmConnector", *args: Any, **kwargs: Any) -> _T:
            try:
                return hook(self, *args, **kwargs)
            except LostLoadError:
                raise
            except Exception:
                logger.exception("KVBM: internal error in %s; caching is off from here on", hook.__name__)
                self.turn_off(f"internal error in {hook.__name__}")
                return default()

        return guarded

    return decorate


class KvbmConnector(KVConnectorBase_V1, SupportsHMA):
    """The connector under our own name; see `DynamoConnector`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = load_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        if config.observe.log_json:
            log_json()
        else:
            _log_as_vllm()
        VLLM.require(vllm.__version__, allow_untested=config.engine.allow_untested)
        self.scheduler_side: SchedulerSide | None = None
        self.worker_side: WorkerSide | None = None
        self._snapshot = Snapshot()
        if role == KVConnectorRole.SCHEDULER:
            _announce(config)
            if config.engine.load_failure_policy == "recompute":
                # vLLM's default fails the request when a load fails. The scheduler reads this after us.
                vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
            self.scheduler_side = make_scheduler_side(vllm_config, kv_cache_config, config)
        else:
            self.worker_side = WorkerSide(vllm_config, kv_cache_config, config)

    def turn_off(self, reason: str) -> None:
        if self.scheduler_side is not None and self.scheduler_side.leader is not None:
            self.scheduler_side.leader.off_reason = reason

    @property
    def requires_kv_delivery(self) -> bool:
        """False: a dropped offload is a later cache miss, no request has to be computed again for it."""
        return False

    # ---- scheduler ----

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self.scheduler_side is not None:
            self.scheduler_side.bind_block_pool(gpu_block_pool)

    @_never_raises(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self.scheduler_side is None:
            return 0, False
        return self.scheduler_side.match(request, num_computed_tokens)

    @_never_raises(lambda: None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self.scheduler_side is None:
            return
        load = self.scheduler_side.allocated(request, blocks.get_block_ids(), num_external_tokens)
        if load is not None and (worker_side := self._worker_side_here()) is not None:
            worker_side.start_early(load)

    @_never_raises(dict)
    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """vLLM 0.32 and later asks right after `update_state_after_alloc`."""
        side = self.scheduler_side
        from_disk = side.tokens_from_disk(request.request_id) if side is not None else 0
        return compat.hit_sources(num_external_tokens - from_disk, from_disk)

    def _worker_side_here(self) -> WorkerSide | None:
        """The other half, where one process plans the steps and computes them: with one rank."""
        other = compat.connector_of_worker()
        if not isinstance(other, KvbmConnector):
            return None
        same = other._vllm_config.instance_id == self._vllm_config.instance_id
        return other.worker_side if same else None

    @_never_raises(KvbmMetadata)
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        if self.scheduler_side is None:
            return KvbmMetadata()
        return KvbmMetadata(self.scheduler_side.build_orders(scheduler_output))

    @_never_raises(lambda: None)
    def update_connector_output(self, connector_output: Any) -> None:
        if self.scheduler_side is None:
            return
        metadata = connector_output.kv_connector_worker_meta
        reports: Sequence[WorkerReport] = metadata.reports if isinstance(metadata, KvbmWorkerMetadata) else ()
        self.scheduler_side.update(connector_output.finished_recving or (), reports)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    @_never_raises(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.scheduler_side is not None:
            self.scheduler_side.finish(request, block_ids)
        return False, None

    @_never_raises(lambda: False)
    def has_pending_push_work(self) -> bool:
        return self.scheduler_side is not None and self.scheduler_side.has_work

    @_never_raises(lambda: False)
    def reset_cache(self) -> bool | None:
        return self.scheduler_side.reset() if self.scheduler_side is not None else None

    # ---- vLLM's own metrics ----

    def get_kv_connector_stats(self) -> KvbmStats | None:
        """Asked of both halves in every step. The ranks' work is counted by the scheduler, once for all."""
        side = self.scheduler_side
        return side.stats.take() if side is not None and side.stats is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvbmStats:
        return KvbmStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvbmPromMetrics:
        return KvbmPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- worker ----

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        if self.worker_side is not None:
            self.worker_side.register(kv_caches)

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """True: vLLM 0.26 to 0.28 puts a block's layers together where the attention backend can."""
        return True

    def register_cross_layers_kv_cache(self, kv_cache: Any, attn_backend: Any) -> None:
        if self.worker_side is not None:
            layers = compat.layers_of(kv_cache, attn_backend, self._kv_cache_config)
            self.worker_side.register(layers)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        return compat.wanted_layout(vllm.__version__)

    @_never_raises(lambda: None)
    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        if self.worker_side is not None and isinstance(kv_connector_metadata, KvbmMetadata):
            self.worker_side.begin(kv_connector_metadata.orders)

    @_never_raises(lambda: None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self.worker_side is not None and self.worker_side.has_orders:
            self.worker_side.start_loads(by_layer=compat.calls_layer_hooks(forward_context))

    @_never_raises(lambda: None)
    def wait_for_layer_load(self, layer_name: str) -> None:
        """Order this layer behind its part of a load inside the step; nobody waits here."""
        if self.worker_side is not None:
            self.worker_side.before_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing per layer: blocks are offloaded whole, with the next step."""

    @_never_raises(lambda: None)
    def wait_for_save(self) -> None:
        if self.worker_side is not None:
            self.worker_side.end_loads()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self._take_snapshot()
        # vLLM before 0.30 knows no failures by request.
        self._snapshot.failed_blocks |= self._snapshot.hung_blocks
        return None, self._snapshot.finished_recving or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        self._take_snapshot()
        return compat.transfer_results(self._snapshot.finished_recving, self._snapshot.failed_recving)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._snapshot.failed_blocks

    @_never_raises(lambda: None)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self.worker_side.report() if self.worker_side is not None else None
        return KvbmWorkerMetadata([report]) if report is not None else None

    @_never_raises(lambda: None)
    def _take_snapshot(self) -> None:
        self._snapshot = Snapshot()
        if self.worker_side is not None:
            self._snapshot = self.worker_side.snapshot()

    @_never_raises(lambda: None)
    def shutdown(self) -> None:
        if self.worker_side is not None:
            self.worker_side.close()
        if self.scheduler_side is not None:
            self.scheduler_side.close()


class DynamoConnector(KvbmConnector):
    """The name under which users of NVIDIA's KVBM have it in their commands."""


compat.find_by_name(__name__, KvbmConnector.__name__, DynamoConnector.__name__)


def _log_as_vllm() -> None:
    """Our log lines go where vLLM's go; without this only warnings would be seen."""
    ours, theirs = logging.getLogger("kvbm"), logging.getLogger("vllm")
    if not ours.hasHandlers():  # else the user has chosen
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)


def _announce(config: Config) -> None:
    for notice in config.notices:
        logger.warning("KVBM: %s", notice)
    if not config.enabled:
        logger.warning(
            "KVBM is off: no cache size is configured. Set DYN_KVBM_CPU_CACHE_GB to the gigabytes of host "
            "memory that it may use."
        )
