"""What a page is called: SGLang's hash of its tokens, and what else determines its bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from kvbm.config import Config, load_config
from kvbm.engines import SGLANG
from kvbm.errors import ConfigError
from kvbm.logic.hashing import HASH_BYTES, Hashes, namespace_digest
from kvbm.runtime.fingerprint import device_fingerprint, fingerprint
from kvbm.sglang_integration import compat

# SGLang's own, which it leaves in what it hands on.
_SGLANG_KEYS = {"backend_name", "module_path", "class_name", "interface_v1", "allocator"}
_OWN_KEYS = {"kvbm", "kv_events"}

# Settings of the engine that the bytes of a page depend on.
_SETTINGS = (
    *("dtype", "quantization", "kv_cache_dtype", "load_format", "json_model_override_args"),
    *("attention_backend", "prefill_attention_backend", "decode_attention_backend", "context_length"),
    *("speculative_algorithm", "speculative_draft_model_path"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Of this process among those of the engine."""

    rank: int
    ranks: int
    replica: int


def read_config(extra: Mapping[str, Any]) -> tuple[Config, Any]:
    """Our settings and those of the KV events, or ConfigError."""
    unknown = extra.keys() - _SGLANG_KEYS - _OWN_KEYS
    if unknown:
        raise ConfigError(
            f"Unknown keys in SGLang's extra config: {', '.join(sorted(unknown))}. KVBM's settings go below "
            f'"kvbm", as {{"kvbm": {{"disk": {{"cache_gb": 100}}}}}}; beside it there is "kv_events".'
        )
    config = load_config(extra.get("kvbm"), extra_name='"kvbm" in SGLang\'s extra config')
    if not config.enabled:
        raise ConfigError(
            "No cache size is configured: set DYN_KVBM_CPU_CACHE_GB or DYN_KVBM_DISK_CACHE_GB, or "
            '{"kvbm": {"disk": {"cache_gb": ...}}} in SGLang\'s extra config.'
        )
    SGLANG.require(compat.version(), allow_untested=config.engine.allow_untested)
    return config, extra.get("kv_events")


def hashes_of(keys: Sequence[str]) -> Hashes:
    """16 bytes for each of SGLang's page keys: the first of its SHA-256, where the key is that alone."""
    if all(len(key) == 64 for key in keys):
        data = bytes.fromhex("".join(key[: 2 * HASH_BYTES] for key in keys))
    else:  # with more in it, as the head group of --hicache-storage-key-scheme unified
        data = b"".join(blake2b(key.encode(), digest_size=HASH_BYTES).digest() for key in keys)
    return np.frombuffer(data, "<u8").reshape(-1, 2)


def engine_namespace(model_name: str | None, pool: Mapping[str, object], place: Place) -> bytes:
    """Digest of all that the bytes of a rank's pages depend on. pool: what is known of where they lie."""
    args = compat.server_args()
    settings = {name: str(getattr(args, name, None)) for name in _SETTINGS}
    if settings["load_format"].endswith("dummy"):
        settings["random_seed"] = str(getattr(args, "random_seed", None))
    path = getattr(args, "model_path", None) or model_name or ""
    return namespace_digest(
        {
            "sglang": compat.version(),
            "model": model_name,
            "weights": fingerprint(str(path), getattr(args, "revision", None)),
            "settings": settings,
            "device": device_fingerprint(torch.device(str(getattr(args, "device", None) or "cpu"))),
            "pool": pool,
            "rank": [place.rank, place.ranks],
        }
    )
