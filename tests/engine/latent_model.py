"""A small DeepSeek-V2: one latent vector a token in place of keys and values, the same on every rank."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine.small_models import copy_tokenizer

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 49152,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": None,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 2, "moe_layer_freq": 1,
    "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
    "norm_topk_prob": False, "routed_scaling_factor": 1.0, "rope_theta": 10000.0, "head_dim": 64,
}  # fmt: skip
RECORD_BYTES = 2 * 16 * (512 + 64) * 4


def write_latent_model(tokenizer: Path, folder: Path) -> Path:
    """Weights in a file, so that any number of ranks has the same; an answer depends on every block."""
    from safetensors.numpy import save_file

    copy_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng = np.random.default_rng(7)
    size, inner, latent, rope = 128, 256, 512, 64
    shapes = {
        "self_attn.q_proj": (4 * (128 + rope), size, 2.0),
        "self_attn.kv_a_proj_with_mqa": (latent + rope, size, 1.0),
        "self_attn.kv_b_proj": (4 * 256, latent, 2.0),
        "self_attn.o_proj": (size, 4 * 128, 4.0),
        "mlp.gate_proj": (inner, size, 1.0),
        "mlp.up_proj": (inner, size, 1.0),
        "mlp.down_proj": (size, inner, 0.7),
    }

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(CONFIG["vocab_size"], size, 6.0),
        "lm_head.weight": matrix(CONFIG["vocab_size"], size, 1.0),
        "model.norm.weight": np.ones(size, np.float32),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        place = f"model.layers.{layer}"
        weights |= {f"{place}.{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        weights[f"{place}.self_attn.kv_a_layernorm.weight"] = np.ones(latent, np.float32)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{place}.{name}.weight"] = np.ones(size, np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
