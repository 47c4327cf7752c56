"""Folders of models and adapters that are small enough to start in a second; random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

IMAGE_SIZE = 112
IMAGE_TOKENS = 49


def copy_tokenizer(source: Path, folder: Path) -> None:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder)


def write_adapter(folder: Path, config: dict[str, Any], seed: int) -> Path:
    """A LoRA adapter of all attention projections, as PEFT stores it."""
    from safetensors.numpy import save_file

    size, head = config["hidden_size"], config["head_dim"]
    q, kv = (config[name] * head for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = {"q_proj": (q, size), "k_proj": (kv, size), "v_proj": (kv, size), "o_proj": (size, q)}
    rng = np.random.default_rng(seed)
    rank = 4
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = rng.standard_normal((rank, columns)) / np.sqrt(columns)
            weights[f"{place}.lora_A.weight"] = down.astype(np.float32)
            weights[f"{place}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float32)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": list(shapes),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def write_image_model(tokenizer: Path, folder: Path, text: dict[str, Any]) -> int:
    """An Idefics3 around a Llama of the configuration `text`. Returns the token that stands for an image.

    Of vLLM's vision models one of the few that do without torchvision.
    """
    copy_tokenizer(tokenizer, folder)
    content = (folder / "tokenizer.json").read_text()
    spare = [token["content"] for token in json.loads(content)["added_tokens"]][-4:]
    wanted = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    for old, new in zip(spare, wanted, strict=True):
        content = content.replace(json.dumps(old), json.dumps(new))
    (folder / "tokenizer.json").write_text(content)
    ids = {token["content"]: token["id"] for token in json.loads(content)["added_tokens"]}
    vision = {
        "model_type": "idefics3_vision", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": IMAGE_SIZE, "patch_size": 8,
    }  # fmt: skip
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"], "model_type": "idefics3", "scale_factor": 2,
        "image_token_id": ids["<image>"], "torch_dtype": "float32", "tie_word_embeddings": False,
        "text_config": text, "vision_config": vision,
    }  # fmt: skip
    edge = {"longest_edge": IMAGE_SIZE}
    pictures = {
        "image_processor_type": "Idefics3ImageProcessorPil", "size": edge, "max_image_size": edge,
        "do_image_splitting": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": IMAGE_TOKENS}
    for name, value in (
        ("config", config),
        ("preprocessor_config", pictures),
        ("processor_config", processor),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return ids["<image>"]
