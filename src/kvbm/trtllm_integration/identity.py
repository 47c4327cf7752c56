"""What determines the KV of a TensorRT-LLM request and engine, or why it is not known.

An engine or a request with a feature that is not understood here is not cached.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbm.logic.hashing import namespace_digest
from kvbm.trtllm_integration import compat

_RUN = os.urandom(8).hex()


@dataclass(frozen=True, slots=True)
class RequestIdentity:
    """What, beside its tokens, names the blocks of a request."""

    salt: str | None
    adapter: str | None


def identify(request: Any) -> RequestIdentity | str:
    """The identity of an `LlmRequest`, or the reason why it isn't cached.

    With the first KV cache manager this is the C++ class, which has fewer attributes than the Python one.
    """
    for name in ("multimodal_hashes", "multimodal_embedding", "py_multimodal_data", "mrope_rotary_cos_sin"):
        if getattr(request, name, None) is not None:
            return "multimodal request"
    if getattr(request, "prompt_embedding_table", None) is not None:
        return "prompt embeddings"
    if getattr(request, "encoder_tokens", None) is not None:
        return "encoder-decoder request"
    salt = getattr(request, "cache_salt", None)
    if salt is None and (salt_id := getattr(request, "cache_salt_id", None)) is not None:
        salt = f"id {salt_id}"
    adapter = None
    if (task := getattr(request, "lora_task_id", None)) is not None:
        # Which weights an id stands for is not known here, only that it does not change in a run.
        adapter = json.dumps([_RUN, int(task)])
    return RequestIdentity(salt, adapter)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the engine's arguments say of its KV cache. The ranks know the rest."""

    block_size: int  # tokens
    ranks: int


def geometry(llm_args: Any) -> Geometry | str:
    """The geometry of an engine's KV cache, or the reason why it can't be cached."""
    kv = llm_args.kv_cache_config
    for name, meaning in (
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("context_parallel_size", "context parallelism"),
        ("max_beam_width", "beam search"),
    ):
        if (getattr(llm_args, name, None) or 1) > 1:
            return f"{meaning} is not supported"
    if getattr(llm_args, "enable_attention_dp", False):
        return "attention data parallelism is not supported yet"
    if getattr(llm_args, "sparse_attention_config", None) is not None:
        return "sparse attention, whose index lies beside the KV cache, is not supported yet"
    if getattr(kv, "host_cache_size", None):
        return "kv_cache_config.host_cache_size is set: TensorRT-LLM's own host cache can't be used as well"
    if not getattr(kv, "enable_block_reuse", True):
        return "kv_cache_config.enable_block_reuse is off: TensorRT-LLM then asks no connector"
    windows = set(getattr(kv, "max_attention_window", None) or ())
    if windows and min(windows) < (getattr(llm_args, "max_seq_len", None) or float("inf")):
        return "attention windows are not supported yet"
    config = _model_config(llm_args)
    if config is None:
        return f"the config.json of model {llm_args.model} can't be read"
    if any(key.endswith(("vision_config", "audio_config")) for key in config):
        # Requests with images that TensorRT-LLM could not hash look like text to a connector.
        return "multimodal models are not supported yet"
    if "nvfp4" in _kv_dtype(llm_args).lower():
        return "an NVFP4 KV cache, whose scales lie in a pool of their own, is not supported yet"
    return Geometry(int(kv.tokens_per_block), int(getattr(llm_args, "tensor_parallel_size", None) or 1))


def engine_namespace(llm_args: Any, record_bytes: int) -> bytes:
    """Digest of model, dtypes and geometry: blocks are exchanged only where it is equal."""
    return namespace_digest(
        {
            "engine": "tensorrt-llm",
            "version": compat.version(),
            "model": str(llm_args.model),
            "revision": str(getattr(llm_args, "revision", None)),
            "config": _model_config(llm_args),
            "dtype": str(getattr(llm_args, "dtype", None)),
            "kv_dtype": _kv_dtype(llm_args),
            "attention": str(getattr(llm_args, "attn_backend", None)),
            "load_format": str(getattr(llm_args, "load_format", None)),
            "block_size": llm_args.kv_cache_config.tokens_per_block,
            "record_bytes": record_bytes,
            "tensor_parallel": getattr(llm_args, "tensor_parallel_size", None),
            "speculative": type(getattr(llm_args, "speculative_config", None)).__name__,
        }
    )


def _kv_dtype(llm_args: Any) -> str:
    """As set, and as the quantised model wants it."""
    quantised = _read(llm_args, "hf_quant_config.json") or {}
    wanted = quantised.get("quantization", {}).get("kv_cache_quant_algo")
    return f"{getattr(llm_args.kv_cache_config, 'dtype', None)} {wanted}"


def _model_config(llm_args: Any) -> Mapping[str, Any] | None:
    return _read(llm_args, "config.json")


def _read(llm_args: Any, name: str) -> Mapping[str, Any] | None:
    """A JSON file of the model, which is a folder or the name of one in the hub's cache."""
    folder = Path(str(llm_args.model))
    try:
        if not folder.is_dir():
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(str(folder), name, revision=getattr(llm_args, "revision", None))
            if not isinstance(found, str):
                return None
            folder = Path(found).parent
        return json.loads((folder / name).read_text())
    except Exception:  # not there, no JSON, no such library
        return None
