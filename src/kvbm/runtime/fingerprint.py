"""What the weights under a name are, as far as files and hubs tell without reading them; and the device."""

import functools
import json
import os
from pathlib import Path
from typing import Any

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
# CPU kernels order a block's values as these instructions like them.
_CPU_FLAGS = {
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
}


def fingerprint(model: str, revision: str | None = None) -> list[object]:
    """What the weights under a name are: names, sizes and times of files, or the commit of a hub's model."""
    path = Path(model)
    if path.is_file():
        return [_file(path)]
    if path.is_dir():
        return [_file(file) for file in sorted(path.iterdir()) if file.suffix in _WEIGHTS]
    return [model, revision, _hub_commit(model, revision)]


@functools.lru_cache(maxsize=1024)
def adapter_fingerprint(path: str, adapter_id: int) -> str:
    """The same for an adapter, once for each id: under a new id there may be new weights."""
    return json.dumps(fingerprint(path), default=str)


def device_fingerprint(device: Any) -> list[object]:
    """What of a torch device the bytes of a block may depend on."""
    if device.type == "cuda":
        import torch

        return ["cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)]
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    return [device.type, os.uname().machine, sorted(words & _CPU_FLAGS)]


def _file(path: Path) -> list[object]:
    stat = path.stat()
    # In a hub's cache files are links to blobs that are named by their contents.
    return [path.name, os.path.basename(os.path.realpath(path)), stat.st_size, stat.st_mtime_ns]


def _hub_commit(model: str, revision: str | None) -> str | None:
    try:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(model, "config.json", revision=revision)
    except Exception:  # no such library, or a name that is none of a hub
        return None
    return Path(path).parent.name if isinstance(path, str) else None
