"""Rows of docs/support.md that a GPU changes: other numbers, other kernels, other tiers.

Small models with made-up weights, by which an answer depends on all of its prompt, and on how kernels round.
So a host hit is compared with a device hit of the same request, alone in the engine: the same computation,
but for where the blocks came from.

python scripts/support_matrix.py run -m gpu tests/gpu/test_features.py
"""

from pathlib import Path
from typing import Any

import pytest

from tests.engine import disk_tools, features, scenarios
from tests.engine.features import Query
from tests.engine.harness import Engine
from tests.engine.hybrid_models import hybrid_config
from tests.engine.latent_model import CONFIG as LATENT
from tests.engine.scenarios import Ask
from tests.engine.small_models import write_adapter
from tests.gpu import gpu_scenarios, pair
from tests.gpu.pair import BLOCK, write_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "block_size": BLOCK,
    "load_format": "dummy",
    "prepare": gpu_scenarios.seed_weights,
    "skip_tokenizer_init": True,
    "max_model_len": 4096,
    "num_gpu_blocks_override": 640,
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.1,
}
ENV = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "DYN_KVBM_CPU_CACHE_GB": "1"}
COMMON = {"vocab_size": 32000, "max_position_embeddings": 8192, "torch_dtype": "bfloat16"}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "head_dim": 64,
    "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, **COMMON,
}  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def prompt(seed: int, tokens: int) -> tuple[int, ...]:
    return pair.prompt(seed, tokens, COMMON["vocab_size"])


def served(engine: Engine, query: Query) -> tuple[int, ...]:
    """The answer to a query that is cold, then found on the device, then in the host tier."""
    cold = engine.call(features.run, [query])
    assert (cold.cached, cold.onboarded) == ([0], 0)
    device = engine.call(features.run, [query])
    host = engine.call(features.again, features.run, [query])
    assert host.onboarded == host.cached[0] // BLOCK == (len(query.prompt) - 1) // BLOCK
    assert device.cached == host.cached
    # With EAGLE, vLLM computes the last block of a device hit anew, or takes it from us.
    assert device.device_hits == device.cached[0] - device.onboarded * BLOCK >= device.cached[0] - BLOCK
    assert host.tokens == device.tokens
    assert (host.after.failures, host.after.not_cached, host.after.off_reason) == ({}, {}, None)
    return tuple(host.tokens[0])


@pytest.mark.parametrize(
    ("options", "config"),
    [
        pytest.param({"dtype": "float16"}, LLAMA, marks=pytest.mark.feature("KV in float16")),
        pytest.param({}, LLAMA, marks=pytest.mark.feature("KV in bfloat16")),
        pytest.param({"kv_cache_dtype": "fp8_e4m3"}, LLAMA, marks=pytest.mark.feature("KV in fp8 (E4M3)")),
        pytest.param({}, {**LATENT, **COMMON}, marks=pytest.mark.feature("MLA on one rank")),
    ],
    ids=["float16", "bfloat16", "fp8", "latent"],
)
def test_numbers_and_kernels(tmp_path: Path, options: dict[str, Any], config: dict[str, Any]) -> None:
    with Engine(write_model(tmp_path, config), kvbm={}, env=ENV, **{**OPTIONS, **options}) as engine:
        engine.wait_ready()
        queries = [Query(prompt(4000 + size, size), {"max_tokens": 24}) for size in (100, 1000, 3001)]
        answers = {served(engine, query) for query in queries}
        assert len(answers) == 3, "answers that are all alike prove nothing"


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("ngram", marks=pytest.mark.feature("Speculative decoding: ngram")),
        pytest.param("draft_model", marks=pytest.mark.feature("Speculative decoding: draft model")),
        pytest.param("eagle", marks=pytest.mark.feature("Speculative decoding: EAGLE")),
    ],
)
def test_speculation(tmp_path: Path, method: str) -> None:
    """A reply whose tokens were proposed, and mostly rejected, is found by the next turn."""
    speculation: dict[str, Any] = NGRAM
    if method != "ngram":
        # The same seed gives the same weights: with other positions, such a draft is right now and then.
        other = {"num_hidden_layers": 1} if method == "eagle" else {"rope_theta": 11000.0}
        draft = write_model(tmp_path / "draft", {**LLAMA, **other})
        speculation = {"method": method, "model": str(draft), "num_speculative_tokens": 3}
    options = {**OPTIONS, "speculative_config": speculation}
    with Engine(write_model(tmp_path, LLAMA), kvbm={}, env=ENV, **options) as engine:
        engine.wait_ready()
        first = Query(prompt(4100, 40) * 8, {"max_tokens": 90})
        reply = served(engine, first)
        proposed, accepted = engine.call(features.speculation)
        assert accepted < proposed
        assert accepted > 0 or method != "draft_model"
        turn = Query((*first.prompt, *reply, 5, 6), {"max_tokens": 24})
        device = engine.call(features.run, [turn])
        host = engine.call(features.again, features.run, [turn])
        assert host.onboarded == (len(turn.prompt) - 3) // BLOCK  # the last token of a reply is not computed
        assert host.tokens == device.tokens


@pytest.mark.feature("LoRA adapters")
def test_adapters(tmp_path: Path) -> None:
    """Two adapters on one base, and the base: none is served another's blocks."""
    folders = [write_adapter(tmp_path / name, LLAMA, seed) for seed, name in enumerate("ab", 1)]
    adapters = [(folder.name, number, str(folder)) for number, folder in enumerate(folders, 1)]
    options = {**OPTIONS, "enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    with Engine(write_model(tmp_path / "model", LLAMA), kvbm={}, env=ENV, **options) as engine:
        engine.wait_ready()
        answers = {
            served(engine, Query(prompt(4200, 1000), {"max_tokens": 24}, adapter=adapter))
            for adapter in (*adapters, None)
        }
        assert len(answers) == 3


@pytest.mark.feature("Disk tier")
def test_from_disk_after_a_kill(tmp_path: Path) -> None:
    disk = disk_tools.settings(tmp_path / "disk", host=None, disk=1024)
    asks = [Ask(prompt(4300, 3000), 24)]
    model = write_model(tmp_path / "model", LLAMA)
    with Engine(model, kvbm={}, env={**ENV, **disk}, **OPTIONS) as engine:
        engine.wait_ready()
        engine.call(disk_tools.store, asks)
        device = engine.call(scenarios.run, asks)
        engine.kill()
    with Engine(model, kvbm={}, env={**ENV, **disk}, **OPTIONS) as engine:
        engine.wait_ready()
        assert engine.call(disk_tools.wait_ready).recovered >= 3000 // BLOCK
        ran = engine.call(disk_tools.run, asks)
        assert ran.disk_after.read == ran.onboarded == 2999 // BLOCK
        assert ran.tokens == device.tokens


@pytest.mark.feature(
    "Sliding windows and full attention (Gemma 3)", refused="hybrid models need vLLM 0.30 or later"
)
def test_hybrid(tmp_path: Path) -> None:
    import vllm

    if tuple(map(int, vllm.__version__.split(".")[:2])) >= (0, 30):
        pytest.skip("this vLLM can be told of a failed load of a hybrid model")
    config = hybrid_config("gemma3", head_dim=64, **COMMON)
    asks = [Ask(prompt(4400, 1000), 8)]
    options = {**OPTIONS, "num_gpu_blocks_override": 4000}  # one window's groups share few of them
    with Engine(write_model(tmp_path, config), kvbm={}, env=ENV, **options) as engine:
        engine.wait_ready()
        cold = engine.call(scenarios.run, asks)
        again = engine.call(scenarios.run_again, asks)
        assert again.tokens == cold.tokens
        assert "hybrid models need vLLM 0.30 or later" in (again.after.off_reason or engine.log(100_000))
        assert (again.onboarded, again.after.offloaded, again.external_hits) == (0, 0, 0)
