"""KVBM as TensorRT-LLM's KV cache connector (PyTorch backend):

    kv_connector_config:
      connector_module: kvbm.trtllm_integration.connector
      connector_scheduler_class: DynamoKVBMConnectorLeader
      connector_worker_class: DynamoKVBMConnectorWorker

TensorRT-LLM makes a worker on each rank and a leader on rank 0. No exception of ours leaves a hook once the
engine runs, but for LostLoadError: the engine computes on what it was promised and can't be told otherwise.
"""

import atexit
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kvbm.config import load_config
from kvbm.engines import TENSORRT_LLM
from kvbm.errors import LostLoadError
from kvbm.observe.logs import log_json
from kvbm.trtllm_integration import compat
from kvbm.trtllm_integration.scheduler import Metadata, make_scheduler_side
from kvbm.trtllm_integration.worker import WorkerSide

logger = logging.getLogger(__name__)

_interface = compat.interface()
_T = TypeVar("_T")


def _never_raises(default: Callable[[], Any]) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """An error of ours is logged and counts as `default`, which is always the cautious answer."""

    def decorate(hook: Callable[..., _T]) -> Callable[..., _T]:
        @functools.wraps(hook)
        def guarded(self: Any, *args: Any) -> _T:
            try:
                return hook(self, *args)
            except LostLoadError:
                logger.exception("KVBM: the engine is stopped, as its output would be wrong")
                raise
            except Exception:
                logger.exception("KVBM: internal error in %s; caching is off from here on", hook.__name__)
                self.side.turn_off(f"internal error in {hook.__name__}")
                return default()

        return guarded

    return decorate


class DynamoKVBMConnectorLeader(_interface.KvCacheConnectorScheduler):
    """The leader, under the name that NVIDIA's KVBM has for it."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        config = load_config()
        if config.observe.log_json:
            log_json()
        TENSORRT_LLM.require(compat.version(), allow_untested=config.engine.allow_untested)
        for notice in config.notices:
            logger.warning("KVBM: %s", notice)
        self.side = make_scheduler_side(llm_args, config)
        atexit.register(self.side.close)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        tokens = self._match(request, num_computed_tokens)
        return tokens, tokens > 0

    @_never_raises(lambda: 0)
    def _match(self, request: Any, num_computed_tokens: int) -> int:
        return self.side.match(request, num_computed_tokens)

    @_never_raises(lambda: None)
    def update_state_after_alloc(self, request: Any, block_ids: Sequence[int]) -> None:
        self.side.allocated(request, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> Metadata:
        return self._build(scheduler_output) or Metadata("")

    @_never_raises(lambda: None)
    def _build(self, scheduler_output: Any) -> Metadata | None:
        return self.side.build(scheduler_output)

    @_never_raises(lambda: True)  # the ranks know what still reads the blocks
    def request_finished(self, request: Any, cache_block_ids: Sequence[int]) -> bool:
        return self.side.finish(request)


class DynamoKVBMConnectorWorker(_interface.KvCacheConnectorWorker):
    """A rank's worker, under the name that NVIDIA's KVBM has for it."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._tokens_per_block = int(llm_args.kv_cache_config.tokens_per_block)
        self.side = WorkerSide(llm_args, load_config(), compat.rank())
        atexit.register(self.side.close)

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        self.side.register({"kv": kv_cache_tensor}, int(kv_cache_tensor.shape[0]), self._tokens_per_block)

    def register_kv_cache_layout(self, layout: Any) -> None:
        """One group of layers that attend to all tokens; where the KV cache is more, it is not cached."""
        group = layout.groups[0] if len(layout.groups) == 1 else None
        if group is None:
            self.side.turn_off(f"KV caches of {len(layout.groups)} layer groups are not supported yet")
        elif group.window_size is not None:
            self.side.turn_off("attention windows are not supported yet")
        elif group.replicated_regions or any(
            buffer.expansion != 1 for region in group.regions for buffer in region.buffers
        ):
            self.side.turn_off("caches beside that of keys and values are not supported yet")
        elif len({region.num_slots for region in group.regions}) != 1:
            self.side.turn_off("KV regions with different numbers of slots are not known")
        else:
            tensors = {f"region {i}": region.as_tensor() for i, region in enumerate(group.regions)}
            self.side.register(tensors, group.regions[0].num_slots, int(layout.tokens_per_block))

    @_never_raises(lambda: None)
    def start_load_kv(self, stream: Any) -> None:
        metadata = self.get_connector_meta()
        if isinstance(metadata, Metadata):
            self.bind_connector_meta(None)  # a step without new metadata must not carry these out again
            self.side.begin(metadata, stream)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Nothing per layer: a request does not run before all of its load has arrived."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Nothing per layer: blocks are offloaded whole, after the forward pass."""

    @_never_raises(lambda: None)
    def wait_for_save(self, stream: Any) -> None:
        self.side.start_offloads(stream)

    @_never_raises(lambda: ([], []))
    def get_finished(
        self, finished_gen_req_ids: Sequence[int], started_loading_req_ids: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        return self.side.finished(finished_gen_req_ids, started_loading_req_ids)
