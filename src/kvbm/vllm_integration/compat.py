"""All that differs between the vLLM versions we run on (0.26 to 0.33)."""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

# The first block of vLLM's pool, which no request owns: in tables, what left a window or never was there.
NULL_BLOCK = 0


def transfer_results(finished_recving: set[str], failed_recving: set[str]) -> Any:
    """vLLM 0.30 and later: finished and failed receives in one snapshot, failures named by request."""
    return _transfer_results()(finished_recving=finished_recving, failed_recving=failed_recving)


@functools.cache  # asked in every step
def _transfer_results() -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    return KVConnectorTransferResults


def takes_back_requests() -> bool:
    """vLLM 0.30 and later: whether a failed load can be told by request, and not by device block alone."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import base

    return hasattr(base, "KVConnectorTransferResults")


def offers_states() -> bool:
    """Whether vLLM says which device block holds a recurrent state worth keeping: see `state_offers`."""
    from vllm.v1.core.sched import output

    state = getattr(output, "KVConnectorBlockState", None)
    return "boundary_state_offloads" in getattr(state, "__dataclass_fields__", ())


def state_offers(scheduler_output: Any) -> dict[str, list[tuple[int, int, int]]]:
    """Recurrent states taken in this step, by request: group, device block, tokens before the state."""
    state = getattr(scheduler_output, "kv_connector_block_state", None)
    return getattr(state, "boundary_state_offloads", None) or {}


def wanted_layout(version: str) -> str | None:
    """Blocks outermost, then layers: a block is one stretch of memory. vLLM drops the wish if it can't.

    Before 0.29 the names meant other things, and a block's layers are put together by another wish. On CPUs
    there is only one layout.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or (int(found[1]), int(found[2])) < (0, 29) or os.environ.get("VLLM_KV_CACHE_LAYOUT"):
        return None
    from vllm.platforms import current_platform

    return "BLHNC" if current_platform.is_cuda() else None


def layers_of(kv_cache: Any, attn_backend: Any, kv_cache_config: Any) -> dict[str, Any]:
    """vLLM 0.26 to 0.28: the layers' views of a tensor that holds them all."""
    order = attn_backend.get_kv_cache_stride_order(include_num_layers_dimension=True)
    layer_dim = order.index(0)
    return {
        name: kv_cache.select(layer_dim, i)
        for i, tensor in enumerate(kv_cache_config.kv_cache_tensors)
        for name in tensor.shared_by
    }


def calls_layer_hooks(forward_context: Any) -> bool:
    """Whether the forward pass will call the connector at each layer: not when it is one CUDA graph."""
    mode = getattr(forward_context, "cudagraph_runtime_mode", None)
    metadata = getattr(forward_context, "attn_metadata", None)
    # A list: two halves of the batch run on streams of their own, and each layer is announced twice.
    return isinstance(metadata, dict) and bool(metadata) and getattr(mode, "name", "NONE") != "FULL"


def find_by_name(module: str, *names: str) -> None:
    """Let vLLM's MultiConnector find these connectors of `module` when it logs what they have counted.

    It knows them by name only then, and stops the engine where a name is not in its registry.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name in names:
        with contextlib.suppress(ValueError):  # it is there already
            KVConnectorFactory.register_connector(name, module, name)


def replica_of(parallel_config: Any) -> int:
    """Number of this engine among the replicas of one deployment, which may share a machine."""
    index = getattr(parallel_config, "data_parallel_index", None)
    return parallel_config.data_parallel_rank if index is None else index


def pipeline_layers(vllm_config: Any) -> tuple[list[int], int]:
    """Layers in each stage of the pipeline, and the stage of this rank; of the scheduler, the first."""
    from vllm.distributed.utils import get_pp_indices

    parallel = vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    total = vllm_config.model_config.get_total_num_hidden_layers()
    spans = [get_pp_indices(total, stage, stages) for stage in range(stages)]
    return [end - start for start, end in spans], parallel.rank // parallel.tensor_parallel_size % stages


def cpu_kernel(vllm_config: Any, layer_name: str) -> str | None:
    """Which of vLLM's CPU attention kernels a layer uses; they order the bytes of a block differently."""
    layer = vllm_config.compilation_config.static_forward_context.get(layer_name)
    return getattr(layer, "isa", None)


def head_dimension(vllm_config: Any, layer_name: str, tensor: Any, spec: Any) -> int | None:
    """Which dimension of an attention layer's KV tensor counts its KV heads; None where that is not known."""
    layer = vllm_config.compilation_config.static_forward_context.get(layer_name)
    backend_of = getattr(layer, "get_attn_backend", None)
    if backend_of is None or getattr(spec, "num_head_slots", None) is not None:  # several heads in a place
        return None
    shape_of = getattr(backend_of(), "get_kv_cache_shape", None)
    if shape_of is None:  # vLLM 0.29 and later: blocks, heads, tokens, contents
        return 1 if tensor.dim() == 4 else None
    try:
        one, two = (shape_of(1, spec.block_size, n * spec.num_kv_heads, spec.head_size) for n in (1, 2))
    except (TypeError, ValueError):
        return None
    changed = [dim for dim, sizes in enumerate(zip(one, two, strict=True)) if sizes[0] != sizes[1]]
    return changed[0] if len(changed) == 1 and len(one) == tensor.dim() else None


def from_first_rank(value: Any) -> Any:
    """What the first tensor-parallel rank calls this with. All ranks have to, and wait for it."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().broadcast_object(value, src=0)


def hold_blocks(block_pool: Any, block_ids: Iterable[int]) -> None:
    """Keep device blocks from being given out, as if one more request used them."""
    block_pool.touch(_blocks(block_pool, block_ids))


def release_blocks(block_pool: Any, block_ids: Sequence[int]) -> None:
    """Undo `hold_blocks`. The tail is offered for reuse before the head."""
    block_pool.free_blocks(_blocks(block_pool, reversed(block_ids)))


def before_reset(block_pool: Any, prepare: Callable[[], None]) -> None:
    """Call `prepare` before the pool's prefix cache is reset.

    vLLM refuses a reset, or raises, while a block is in use, and has no hook to tell a connector in time.
    """
    reset = block_pool.reset_prefix_cache

    def prepared_reset() -> bool:
        prepare()
        return reset()

    block_pool.reset_prefix_cache = prepared_reset


def connector_of_worker() -> Any:
    """The connector of this process's rank, or None."""
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group, has_kv_transfer_group

    return get_kv_transfer_group() if has_kv_transfer_group() else None


def hit_sources(host_tokens: int, disk_tokens: int) -> dict[Any, int]:
    """vLLM 0.32 and later: the tokens of a hit by the tier they lay in, for its own metrics."""
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    tokens = {CacheHitSource.HOST: host_tokens, CacheHitSource.DISK: disk_tokens}
    return {source: count for source, count in tokens.items() if count}


def publishes_events(block_pool: Any) -> bool:
    """Whether the engine makes KV events, to be published with its steps."""
    return bool(getattr(block_pool, "enable_kv_cache_events", False))


def event_types() -> Any:
    """vLLM's classes of events, by name."""
    from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

    return SimpleNamespace(
        BlockStored=BlockStored, BlockRemoved=BlockRemoved, AllBlocksCleared=AllBlocksCleared
    )


def has_events(block_pool: Any) -> bool:
    return bool(getattr(block_pool, "kv_event_queue", None))


def replace_take_events(block_pool: Any, take: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    """Let the engine publish what `take` returns; returns the method that takes its own events."""
    original = block_pool.take_events
    block_pool.take_events = take
    return original


def around_repeats(block_pool: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` and `after` when the pool repeats events of blocks that it has had all along.

    Requests with `kv_cache_report_mode=full` ask for that. The events look like those of new blocks.
    """
    emit = getattr(block_pool, "emit_cached_block_events", None)
    if emit is None:
        return

    def announced(*args: Any, **kwargs: Any) -> None:
        before()
        emit(*args, **kwargs)
        after()

    block_pool.emit_cached_block_events = announced


def event_hashes(block_pool: Any, request: Any, block_size: int, first: int, end: int) -> list[int | bytes]:
    """What vLLM's events call the request's blocks first .. end-1, as far as it has hashed them."""
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash, resolve_block_hashes

    hashes = resolve_block_hashes(request.block_hashes, block_pool.hash_block_size, block_size)
    return [maybe_convert_block_hash(hash_) for hash_ in hashes[first:end]]


def event_extra_keys(request: Any, block_size: int, first: int, end: int) -> list[Any] | None:
    """What beside tokens made those hashes, one entry a block, as in vLLM's events; None: nothing did."""
    if not (request.lora_request or request.mm_features or request.cache_salt):
        return None
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    keys, item = [], 0
    for block in range(first, end):
        start = block * block_size
        own, item = generate_block_hash_extra_keys(request, start, start + block_size, item)
        keys.append(own)
    try:
        from vllm.v1.core.kv_cache_utils import to_event_extra_keys
    except ImportError:  # up to 0.30 they are published as they are hashed
        return keys
    return to_event_extra_keys(keys)


def _blocks(block_pool: Any, block_ids: Iterable[int]) -> list[Any]:
    # The null block is shared by all requests and has no count worth keeping.
    return [block for block in (block_pool.blocks[id_] for id_ in block_ids) if not block.is_null]
