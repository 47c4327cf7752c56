"""Engines and expectations that the tests of this folder share."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import scenarios
from tests.engine.harness import Engine
from tests.engine.pair import Pair
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

ROOT = Path(__file__).parents[2]
DEFAULT_MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct"

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}

Expect = Callable[[Sequence[Ask]], Callable[[], list[list[int]]]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def model() -> Path:
    folder = Path(os.environ.get("TEST_MODEL") or DEFAULT_MODEL)
    if not (folder / "config.json").is_file():
        pytest.fail(
            f"no model in {folder}: build it with 'python scripts/prepare_model.py', or name a folder with "
            "SmolLM2-135M-Instruct in TEST_MODEL",
            pytrace=False,
        )
    return folder.resolve()


@pytest.fixture(scope="session")
def tiny(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights: enough where its answers don't matter."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(model / name, folder)
    return folder


def write_weights(folder: Path, seed: int) -> None:
    """Random weights, of such a size that an answer depends on every block before it (test_disk.py)."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    size, inner = TINY["hidden_size"], TINY["intermediate_size"]
    heads, kv_heads = (
        TINY[name] * TINY["head_dim"] for name in ("num_attention_heads", "num_key_value_heads")
    )
    shapes = {
        "self_attn.q_proj": (heads, size, 2.0),
        "self_attn.k_proj": (kv_heads, size, 1.0),
        "self_attn.v_proj": (kv_heads, size, 4.0),
        "self_attn.o_proj": (size, heads, 4.0),
        "mlp.gate_proj": (inner, size, 1.0),
        "mlp.up_proj": (inner, size, 1.0),
        "mlp.down_proj": (size, inner, 0.7),
    }

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(TINY["vocab_size"], size, 6.0),
        "lm_head.weight": matrix(TINY["vocab_size"], size, 1.0),
        "model.norm.weight": np.ones(size, np.float32),
    }
    for layer in range(TINY["num_hidden_layers"]):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = np.ones(size, np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def make_keen(tiny: Path, folder: Path, seed: int = 1) -> Path:
    """As small as `tiny`, but a wrong block changes its answers."""
    shutil.copytree(tiny, folder)
    (folder / "config.json").write_text(json.dumps({**TINY, "tie_word_embeddings": False}))
    write_weights(folder, seed)
    return folder


@pytest.fixture(scope="session")
def keen(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keen(tiny, tmp_path_factory.mktemp("keen") / "model")


@pytest.fixture(scope="session")
def prompts(model: Path) -> Prompts:
    return Prompts(model / "tokenizer.json")


@pytest.fixture(scope="session")
def baseline(model: Path) -> Iterator[Engine]:
    """The same model without KVBM, and without any caching."""
    with Engine(model, enable_prefix_caching=False, max_num_seqs=8) as engine:
        yield engine


@pytest.fixture(scope="session")
def expect(baseline: Engine) -> Expect:
    return _expecting(baseline)


@pytest.fixture(scope="session")
def keen_baseline(keen: Path) -> Iterator[Engine]:
    with Engine(keen, enable_prefix_caching=False, max_num_seqs=8) as engine:
        yield engine


@pytest.fixture(scope="session")
def expect_keen(keen_baseline: Engine) -> Expect:
    return _expecting(keen_baseline)


def _expecting(baseline: Engine) -> Expect:
    """Starts to compute what the requests must answer; the returned function gives it, in their order.

    The baseline computes while the engine under test does, on another core.
    """
    known: dict[tuple[Any, ...], Any] = {}

    def expect(asks: Sequence[Ask]) -> Callable[[], list[list[int]]]:
        keys = [(ask.prompt, ask.max_tokens) for ask in asks]
        new = list(dict.fromkeys(key for key in keys if key not in known))
        if new:
            answer = baseline.begin(scenarios.run, [Ask(*key) for key in new])
            batch: list[Any] = [answer, None]
            for index, key in enumerate(new):
                known[key] = batch, index

        def result() -> list[list[int]]:
            for key in keys:
                batch, _index = known[key]
                if batch[0] is not None:
                    batch[1], batch[0] = batch[0]().tokens, None
            return [known[key][0][1][known[key][1]] for key in keys]

        return result

    return expect


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()
