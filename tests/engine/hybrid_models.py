"""Small models whose layers need different parts of a prefix; random weights come from `features.start`."""

import json
from pathlib import Path
from typing import Any

from tests.engine.small_models import copy_tokenizer

_COMMON = {
    "vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 6, "head_dim": 32, "sliding_window": 96,
        "query_pre_attn_scalar": 32, "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    },
    "lfm2": {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "hidden_size": 128,
        "intermediate_size": 256, "block_dim": 128, "block_ff_dim": 256, "block_multiple_of": 64,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "num_hidden_layers": 4,
        "norm_eps": 1e-5, "conv_L_cache": 3, "conv_bias": False, "conv_dim": 128, "conv_dim_out": 128,
        "rope_theta": 1e6, "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "qwen3next": {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64, "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "mlp_only_layers": [], "partial_rotary_factor": 0.25, "rope_theta": 1e7,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
}  # fmt: skip


def hybrid_config(name: str, **changes: Any) -> dict[str, Any]:
    return {**_COMMON, **CONFIGS[name], **changes}


def write_hybrid_model(tokenizer: Path, folder: Path, name: str, **changes: Any) -> Path:
    copy_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(hybrid_config(name, **changes)))
    return folder
