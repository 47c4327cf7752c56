"""vLLM connectors to compare: one that does nothing, KVBM with a clock in each hook or without copies."""

import functools
import json
import os
import time
from collections import defaultdict
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

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


_seconds: dict[str, float] = defaultdict(float)
_calls: dict[str, int] = defaultdict(int)
_HOOKS = (
    *("get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta"),
    *("update_connector_output", "request_finished_all_groups", "has_pending_push_work"),
    *("handle_preemptions", "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save"),
    *("get_finished", "get_block_ids_with_load_errors", "build_connector_worker_meta"),
)


def _timed(name: str) -> Any:
    hook = getattr(DynamoConnector, name)

    @functools.wraps(hook)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return hook(self, *args, **kwargs)
        finally:
            _seconds[name] += time.perf_counter() - start
            _calls[name] += 1
            if name == "request_finished_all_groups":
                _write()

    return timed


def _write() -> None:
    """What the hooks took since the request before: a line of milliseconds to $HOOK_TIMES."""
    line = {name: [_calls[name], round(1e3 * _seconds[name], 3)] for name in _HOOKS if _calls[name]}
    _seconds.clear()
    _calls.clear()
    with open(os.environ["HOOK_TIMES"], "a") as file:
        file.write(json.dumps(line) + "\n")


class TimedConnector(DynamoConnector):
    """KVBM, and what each request spends in its hooks."""


for _name in _HOOKS:
    setattr(TimedConnector, _name, _timed(_name))


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
