"""Engines and expectations that the tests of this folder share."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.engine import scenarios
from tests.engine.harness import Engine
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
