"""What determines the KV of a vLLM request and of a vLLM engine, or why it is not known.

A request with a feature that is not understood here is not cached.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbm.errors import LayoutError
from kvbm.logic.groups import FULL, KvGroup, KvGroups
from kvbm.logic.hashing import namespace_digest
from kvbm.runtime.disk import host_record_bytes
from kvbm.runtime.fingerprint import adapter_fingerprint
from kvbm.vllm_integration import compat


@dataclass(frozen=True, slots=True)
class RequestIdentity:
    """What, beside its tokens, names the blocks of a request."""

    salt: str | None
    adapter: str | None
    images: tuple[tuple[int, int, str], ...]  # first token, number of tokens, content identifier

    def extra_keys(self, block_size: int) -> Mapping[int, bytes]:
        """Identity of the multimodal items in each block that holds a part of one."""
        keys: dict[int, bytes] = {}
        for first, length, identifier in self.images:
            for block in range(first // block_size, (first + length - 1) // block_size + 1):
                # The part of the item that a block holds follows from where the item starts, seen from it.
                item = json.dumps([identifier, first - block * block_size, length]).encode()
                keys[block] = keys.get(block, b"") + item
        return keys


def identify(request: Any) -> RequestIdentity | str:
    """The identity of a vLLM `Request`, or the reason why it isn't cached."""
    if request.pooling_params is not None:
        return "pooling request"
    if request.prompt_embeds is not None or getattr(request, "prompt_is_token_ids", None) is not None:
        return "prompt embeddings"
    if getattr(request, "resumable", False):
        return "streaming input"
    images = []
    for feature in request.mm_features or ():
        identifier = getattr(feature, "identifier", None)
        if not identifier:
            return "multimodal item without identifier"
        images.append((feature.mm_position.offset, feature.mm_position.length, str(identifier)))
    adapter = None
    if (lora := request.lora_request) is not None:
        if getattr(lora, "load_inplace", False):
            return "LoRA adapter replaced in place"
        try:
            weights = adapter_fingerprint(lora.lora_path, lora.lora_int_id)
        except OSError:
            return "LoRA adapter whose files can't be read"
        adapter = json.dumps([lora.lora_name, lora.lora_int_id, lora.lora_path, weights])
    return RequestIdentity(request.cache_salt, adapter, tuple(images))


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of the host tier, the same in the scheduler and on every rank."""

    block_size: int  # tokens
    record_bytes: int  # of one block on this rank
    num_device_blocks: int
    ranks: int
    groups: KvGroups = field(default_factory=KvGroups)
    shared: bool = False  # all ranks have the same bytes, and use the tiers of the first
    # Bytes of a record on the ranks of each stage of a pipeline, which has several: layers of their own.
    stages: tuple[int, ...] = ()

    @property
    def records(self) -> list[int]:
        """Bytes of a block's records, one a rank that keeps it, in the order of the ranks."""
        if self.shared:
            return [self.record_bytes]
        stages = self.stages or (self.record_bytes,)
        return [size for size in stages for _ in range(self.ranks // len(stages))]

    def host_bytes(self, num_slots: int) -> int:
        return num_slots * host_record_bytes(self.records)


def geometry(vllm_config: Any, kv_cache_config: Any) -> Geometry | str:
    """The geometry of an engine's KV cache, or the reason why it can't be cached."""
    parallel = vllm_config.parallel_config
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        return "sleep mode, which remaps the KV cache, is not supported yet"
    if any(getattr(parallel, f"{kind}_context_parallel_size", 1) > 1 for kind in ("decode", "prefill")):
        return "context parallelism is not supported yet"
    multimodal = getattr(vllm_config.model_config, "multimodal_config", None)
    if multimodal and not (
        multimodal.mm_processor_cache_gb or vllm_config.cache_config.enable_prefix_caching
    ):
        # vLLM numbers them then, and begins anew with each process.
        return (
            "images are not identified by contents: turn on prefix caching or the multimodal processor cache"
        )
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "KV scales that are calculated from the first requests are not part of any identity"
    groups: list[KvGroup] = []
    for group in kv_cache_config.kv_cache_groups:
        kind = _group(group)
        if isinstance(kind, str):
            return kind
        groups.append(kind)
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    if len({spec.block_size for spec in specs}) > 1:
        return "KV cache groups with blocks of different sizes are not supported yet"
    kv_groups = KvGroups(tuple(groups))
    if not kv_groups.single and not compat.takes_back_requests():
        return "hybrid models need vLLM 0.30 or later, which can be told of a failed load of one"
    record_bytes = _record_bytes(kv_cache_config.kv_cache_groups)
    stages = _stages(vllm_config, kv_cache_config.kv_cache_groups, record_bytes)
    if isinstance(stages, str):
        return stages
    return Geometry(
        block_size=specs[0].block_size,
        record_bytes=record_bytes,
        num_device_blocks=kv_cache_config.num_blocks,
        ranks=parallel.world_size,
        groups=kv_groups,
        shared=not stages and _same_on_all_ranks(parallel, specs),
        stages=stages,
    )


def _stages(vllm_config: Any, groups: Sequence[Any], record_bytes: int) -> tuple[int, ...] | str:
    """Of each stage of a pipeline, the bytes of a record; or why the pipeline can't be cached.

    The scheduler and every rank come to the same sizes by themselves: vLLM tells each of one stage only, so
    the others follow from how it shares out the layers of a model whose layers are all alike.
    """
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size == 1:
        return ()
    if parallel.distributed_executor_backend != "mp":
        # Its older Ray executor drops what all stages but the last report: nothing would ever be registered.
        return "pipeline parallelism is supported with vLLM's executor mp only"
    if len(groups) > 1:
        return "pipeline parallelism is not supported yet for models with several groups of KV caches"
    layers, stage = compat.pipeline_layers(vllm_config)
    here = len(groups[0].layer_names)
    if here != layers[stage]:
        return f"stage {stage} of the pipeline has KV caches of {here} layers, of {layers[stage]} in all"
    return tuple(record_bytes // here * count for count in layers)


def _same_on_all_ranks(parallel: Any, specs: Sequence[Any]) -> bool:
    """Whether all ranks hold the same bytes, and can share memory: they are of one machine."""
    latent = all(type(spec).__name__ == "MLAAttentionSpec" for spec in specs)
    one_machine = (
        getattr(parallel, "distributed_executor_backend", None) == "mp"
        and getattr(parallel, "nnodes", 1) == 1
    )
    return parallel.world_size > 1 and latent and one_machine


def _group(group: Any) -> KvGroup | str:
    """What of a prefix a group of layers needs, or the reason why it can't be cached."""
    spec = group.kv_cache_spec
    kind = type(spec).__name__
    if not getattr(group, "enable_kv_transfer", True):
        return f"a group of KV caches ({kind}) that vLLM does not let connectors move"
    if kind in ("FullAttentionSpec", "MLAAttentionSpec"):  # with a window, it is kept whole all the same
        return FULL
    if kind == "SlidingWindowSpec":
        reach = spec.sliding_window - 1 + getattr(spec, "extra_retained_tokens", 0)
        return KvGroup(window=max(1, -(-reach // spec.block_size)), reach=reach)
    if kind != "MambaSpec":
        return f"KV cache of kind {kind} is not supported yet"
    if spec.num_speculative_blocks:
        return "recurrent states with speculative decoding are not supported yet"
    if spec.mamba_cache_mode == "align" and compat.offers_states():
        return KvGroup(window=1, offered=True)
    if spec.mamba_cache_mode == "all":
        return KvGroup(window=1, reach=1)
    return f"recurrent states are not kept by this vLLM in mamba_cache_mode={spec.mamba_cache_mode}"


def _record_bytes(groups: Sequence[Any]) -> int:
    """Of a block of any group: the layers of groups share tensors, the first with the first, and so on."""
    layers: list[int] = []
    for group in groups:
        spec, count = group.kv_cache_spec, len(group.layer_names)
        size = getattr(spec, "real_page_size_bytes", None) if len(groups) > 1 else None
        layers += [0] * (count - len(layers))
        layers[:count] = [max(other, size or spec.page_size_bytes) for other in layers[:count]]
    return sum(layers)


def check_tensors(kv_cache_config: Any, kv_caches: Mapping[str, Any]) -> None:
    """LayoutError unless a rank's tensors are those of the announced layers, and of the announced types."""
    specs = {
        name: group.kv_cache_spec for group in kv_cache_config.kv_cache_groups for name in group.layer_names
    }
    if missing := sorted(specs.keys() - kv_caches.keys()):
        raise LayoutError(f"The engine announced layers without KV tensors, first {missing[0]}: not cached.")
    memories = {kv_caches[name].data_ptr() for name in specs}
    for name, tensor in kv_caches.items():
        if name not in specs:
            if tensor.data_ptr() not in memories:  # else it shares the KV of a layer that was announced
                raise LayoutError(f"The KV tensor {name} is of no announced layer: not cached.")
        elif tensor.dtype != (announced := getattr(specs[name], "dtype", tensor.dtype)):
            raise LayoutError(
                f"The KV tensor {name} is {tensor.dtype}, announced as {announced}: not cached."
            )


def engine_namespace(vllm_config: Any, kv_cache_config: Any, shape: Geometry) -> bytes:
    """Digest of model, weights, dtypes and blocks: it names blocks, whatever ranks share them out.

    How the bytes are shared out is in the identity of the records that outlive an engine.
    """
    model = vllm_config.model_config
    config = json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str)
    return namespace_digest(
        {
            "engine": "vllm",
            "model": str(model.model),
            "revision": str(model.revision),
            "config": hashlib.blake2b(config.encode(), digest_size=16).hexdigest(),
            "dtype": str(model.dtype),
            "quantization": str(model.quantization),
            "kv_dtype": str(vllm_config.cache_config.cache_dtype),
            "block_size": shape.block_size,
            "layers": [len(group.layer_names) for group in kv_cache_config.kv_cache_groups],
            "groups": [[group.window, group.reach] for group in shape.groups],
        }
    )
