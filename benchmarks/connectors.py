"""vLLM connectors to compare: one that does nothing, and KVBM with the engine timed, or without copies."""

import functools
import os
import time
from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from benchmarks.vllm_gpu import STEP_PARTS
from kvbm.vllm_integration.connector import DynamoConnector


class NullConnector(KVConnectorBase_V1):
    """What vLLM's connector interface costs by itself."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass


_HOOKS = (
    *("get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta"),
    *("update_connector_output", "request_finished_all_groups", "has_pending_push_work"),
    *("handle_preemptions", "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save"),
    *("get_finished", "get_block_ids_with_load_errors", "build_connector_worker_meta"),
    *("get_transfer_results", "get_kv_connector_stats"),
)
_seconds: dict[str, float] = dict.fromkeys(STEP_PARTS, 0.0)  # of the turn under way
_tokens = 0  # that it computes


def _time(owner: Any, method: str, part: str) -> None:
    """Have a method of a class add what it takes to a part of the step."""
    called = getattr(owner, method)

    @functools.wraps(called)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _tokens
        start = time.perf_counter()
        try:
            result = called(self, *args, **kwargs)
        finally:
            _seconds[part] += time.perf_counter() - start
        if part == "schedule":
            _tokens = result.total_num_scheduled_tokens
        return result

    setattr(owner, method, timed)


def _time_steps(file: int) -> None:
    """Have vLLM's engine, in this process, write a row of `STEP_COLUMNS` for each turn of its loop."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    def timed(turn: Any) -> Any:
        def timed_turn(self: Any) -> Any:
            global _tokens
            _seconds.update(dict.fromkeys(_seconds, 0.0))
            _tokens = 0
            start = time.perf_counter()
            result = turn(self)
            end = time.perf_counter()
            os.write(file, np.array([end, end - start, _tokens, *_seconds.values()]).tobytes())
            return result

        return timed_turn

    EngineCore.step = timed(EngineCore.step)
    EngineCore.step_with_batch_queue = timed(EngineCore.step_with_batch_queue)
    _time(Scheduler, "schedule", "schedule")
    _time(UniProcExecutor, "execute_model", "execute")
    _time(UniProcExecutor, "sample_tokens", "sample")
    _time(Scheduler, "update_from_output", "update")


class TimedConnector(DynamoConnector):
    """KVBM, in an engine that writes what each turn of its loop takes, to the file $STEP_TIMES."""


if path := os.environ.get("STEP_TIMES"):
    for _name in _HOOKS:
        _time(TimedConnector, _name, "hooks")
    _time_steps(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))


class NoCopiesConnector(DynamoConnector):
    """KVBM, but offloads are over as soon as they are ordered and move nothing: for cold prompts only."""

    def register_kv_caches(self, kv_caches: Any) -> None:
        from kvbm.transfer.cuda.engine import CudaCopyEngine, CudaTransfer

        super().register_kv_caches(kv_caches)  # with its round trip

        def start_offload(*_: Any, **__: Any) -> CudaTransfer:
            over = torch.cuda.Event(blocking=True)
            over.record()
            return CudaTransfer([over])

        CudaCopyEngine.start_offload = start_offload
