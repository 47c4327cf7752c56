"""Adapters, images, embeddings, speculation and number formats, each on an engine made for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import features, scenarios
from tests.engine.conftest import TINY
from tests.engine.features import Query
from tests.engine.harness import BLOCK_SIZE
from tests.engine.pair import Pair
from tests.engine.prompts import Prompts
from tests.engine.small_models import (
    IMAGE_SIZE,
    IMAGE_TOKENS,
    write_adapter,
    write_image_model,
)

# One place is left: vLLM 0.32 on CPUs takes the adapter in the last one for requests that have none, when
# they are in a batch with others that have one.
ADAPTERS = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}


def no_hit(pair: Pair, query: Query) -> list[int]:
    """What the engine answers when nothing of what it has fits."""
    ran = pair.call(features.again, features.run, [query])
    assert (ran.cached, ran.onboarded, ran.external_hits) == ([0], 0, 0)
    return ran.tokens[0]


@pytest.mark.feature("LoRA adapters")
def test_adapters(pair: Pair, keen: Path, tmp_path: Path, prompts: Prompts) -> None:
    """Two adapters on one base: each is served its own, and neither another's or the base's."""
    prompt = prompts.make(900, 140)
    folders = [write_adapter(tmp_path / name, TINY, seed) for seed, name in enumerate("ab", 1)]
    a, b = (
        Query(prompt, adapter=(folder.name, number, str(folder))) for number, folder in enumerate(folders, 1)
    )
    with pair.engines(keen, **ADAPTERS):
        want = pair.plain(features.run, [a, b, Query(prompt)])
        got = []
        for query in (a, b, Query(prompt)):
            got.append(no_hit(pair, query))
            host = pair.call(features.again, features.run, [query])
            assert host.cached == [4 * BLOCK_SIZE]
            assert host.onboarded == 4
            assert host.tokens == [got[-1]]
        assert got == want().tokens
        assert len({tuple(tokens) for tokens in got}) == 3


@pytest.fixture(scope="module")
def image_model(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("images") / "model"
    return folder, write_image_model(tiny, folder, {**TINY, "tie_word_embeddings": False})


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


@pytest.mark.feature("Images")
def test_images(pair: Pair, image_model: tuple[Path, int], prompts: Prompts) -> None:
    """The same text with another image is another prompt, from the block on in which the image begins."""
    folder, image = image_model
    text = prompts.make(910, 140)
    prompt = (*text[:40], image, *text[40:])
    cat, dog = (Query(prompt, images=(picture(seed),)) for seed in (1, 2))
    both = Query((*text[:40], image, image, *text[40:]), images=(picture(1), picture(2)))
    with pair.engines(folder, load_format="dummy", seed_weights=3, limit_mm_per_prompt={"image": 2}):
        cold, host = pair.serves([cat])
        assert host.cached[0] >= 40 + IMAGE_TOKENS + 70
        want = pair.plain(features.run, [dog, both])
        # The text before the image is the same.
        for query, expected in ((dog, 1), (both, 2)):
            ran = pair.call(features.again, features.run, [query])
            assert [cached // BLOCK_SIZE for cached in ran.cached] == [expected]
            assert ran.tokens != cold.tokens
        assert pair.call(features.again, features.run, [dog, both]).tokens == want().tokens


@pytest.mark.feature(
    "Images without digests (no prefix caching, no processor cache)",
    refused="images and the like are not identified by contents",
)
def test_images_without_digest(pair: Pair, image_model: tuple[Path, int], prompts: Prompts) -> None:
    folder, image = image_model
    query = Query((image, *prompts.make(920, 140)), images=(picture(1),))
    options: dict[str, Any] = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    with pair.engines(folder, load_format="dummy", seed_weights=3, **options):
        want = pair.plain(features.run, [query])
        ran = [pair.call(features.run, [query]) for _ in range(2)]
        assert [each.tokens for each in ran] == [want().tokens] * 2
        assert ran[1].after.capacity == ran[1].onboarded == 0


@pytest.mark.feature("Pooling and embedding requests", refused="pooling request")
def test_embeddings(pair: Pair, keen: Path, prompts: Prompts) -> None:
    texts = [prompts.make(930 + index, 140) for index in range(2)]
    with pair.engines(keen, runner="pooling", convert="embed"):
        want = pair.plain(features.embed, texts)
        pair.call(features.embed, texts)
        vectors, seen = pair.call(features.embed, texts)
        plain, _ = want()
        assert np.allclose(vectors, plain, atol=1e-5)
        assert not np.allclose(vectors[0], vectors[1], atol=0.1)
        assert seen.not_cached == {"pooling request": 4}
        assert (seen.offloaded, seen.onboarded, seen.external_hits) == (0, 0, 0)


def noisy(keen: Path, folder: Path) -> Path:
    """A model that often, but not always, says what `keen` says."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(keen, folder)
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"]
    noise = np.random.default_rng(0).standard_normal(head.shape).astype(np.float32)
    weights["lm_head.weight"] = head + 0.3 * head.std() * noise
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def eagle(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder)
    (folder / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 1}))
    return folder


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("ngram", marks=pytest.mark.feature("Speculative decoding: ngram")),
        pytest.param("draft_model", marks=pytest.mark.feature("Speculative decoding: draft model")),
        pytest.param("eagle", marks=pytest.mark.feature("Speculative decoding: EAGLE")),
    ],
)
def test_speculation(
    pair: Pair, keen: Path, tiny: Path, tmp_path: Path, prompts: Prompts, method: str
) -> None:
    """A block holds tokens that were accepted, and is found again by them."""
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": 3}
    options: dict[str, Any] = {"speculative_config": config}
    if method == "ngram":
        config |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    elif method == "draft_model":
        config["model"] = str(noisy(keen, tmp_path / "draft"))
    else:
        config["model"] = str(eagle(tiny, tmp_path / "draft"))
        options |= {"load_format": "dummy", "seed_weights": 3}
    prompt = tuple(range(100, 140)) * 4  # ngram has something to propose
    asks = [Query(start + prompt, {"max_tokens": 90}) for start in ((5,), (6, 7))]
    with pair.engines(keen, **options):
        cold, _ = pair.serves(asks)
        proposed, accepted = pair.call(features.speculation)
        assert accepted < proposed
        if method == "draft_model":
            assert accepted > 0
        turns = [Query((*ask.prompt, *reply, 5, 6)) for ask, reply in zip(asks, cold.tokens, strict=True)]
        want = pair.plain(features.run, turns)
        again = pair.call(features.again, features.run, turns)
        # The last token of a reply is not computed; all else is found.
        full = [(len(turn.prompt) - 3) // BLOCK_SIZE for turn in turns]
        assert [cached // BLOCK_SIZE for cached in again.cached] == full
        assert again.onboarded == sum(full)
        assert again.tokens == want().tokens


def scaled(keen: Path, folder: Path, scale: float) -> Path:
    """The model with scales of its KV, as quantisers store them."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(keen, folder)
    weights = load_file(folder / "model.safetensors")
    for layer in range(TINY["num_hidden_layers"]):
        for which in ("k", "v"):
            name = f"model.layers.{layer}.self_attn.{which}_proj.{which}_scale"
            weights[name] = np.array([scale], np.float32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.feature("KV in bfloat16")),
        pytest.param({"dtype": "float16"}, marks=pytest.mark.feature("KV in float16")),
        pytest.param({"kv_cache_dtype": "fp8_e4m3"}, marks=pytest.mark.feature("KV in fp8 (E4M3)")),
        pytest.param({"kv_cache_dtype": "fp8_e5m2"}, marks=pytest.mark.feature("KV in fp8 (E5M2)")),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_number_formats(pair: Pair, keen: Path, prompts: Prompts, options: dict[str, Any]) -> None:
    """One request at a time: where numbers are coarse, answers depend on what else is in a batch."""
    with pair.engines(keen, **options):
        for seed in (940, 941):
            _, host = pair.serves([Query(prompts.make(seed, 140))])
            assert host.cached == [4 * BLOCK_SIZE]


@pytest.mark.feature("KV in fp8 with scales of the checkpoint")
def test_scales_of_a_checkpoint(pair: Pair, keen: Path, tmp_path: Path, prompts: Prompts) -> None:
    query = Query(prompts.make(945, 140))
    answers = set()
    for scale in (0.02, 0.5):
        with pair.engines(scaled(keen, tmp_path / str(scale), scale), kv_cache_dtype="fp8_e4m3"):
            _, host = pair.serves([query])
            assert host.cached == [4 * BLOCK_SIZE]
            assert pair.call(features.kv_scales) == [pytest.approx(scale)] * 4
            answers.add(tuple(host.tokens[0]))
    assert len(answers) == 2


@pytest.mark.parametrize(
    "asynchronous",
    [
        pytest.param(
            False,
            marks=pytest.mark.feature(
                "Chunked prefill and preemption (with adapters, salts, structured output)"
            ),
        ),
        pytest.param(
            True, marks=pytest.mark.feature("Asynchronous scheduling (chunked prefill, preemption, adapters)")
        ),
    ],
)
def test_under_pressure(pair: Pair, keen: Path, tmp_path: Path, prompts: Prompts, asynchronous: bool) -> None:
    """Prompts in pieces, more requests than fit, structured output, salts and adapters at the same time."""
    adapter = write_adapter(tmp_path / "a", TINY, 1)
    texts = [prompts.make(950 + index, 100 + 30 * index) for index in range(6)]
    kinds: list[dict[str, Any]] = [
        {},
        {"adapter": ("a", 1, str(adapter))},
        {"more": {"cache_salt": "A"}},
        {"sampling": {"max_tokens": 40, "structured_outputs": {"regex": "(yes|no|maybe){50}"}}},
    ]
    sampling = {"max_tokens": 40}
    queries = [
        Query(text, **{"sampling": sampling, **kinds[(index + turn) % 4]})
        for turn in range(2)
        for index, text in enumerate(texts)
    ]
    scarce = {
        "max_model_len": 512,
        "num_gpu_blocks_override": 26,
        "max_num_batched_tokens": 64,
        "async_scheduler": asynchronous,
    }
    with pair.engines(keen, **ADAPTERS, **scarce):
        assert pair.call(scenarios.scheduler_name) == ("AsyncScheduler" if asynchronous else "Scheduler")
        cold, host = pair.serves(queries)
        assert host.after.preemptions > cold.before.preemptions
        assert len({tuple(tokens) for tokens in cold.tokens}) == len(queries)


@pytest.mark.feature("KV tensors that are not as announced", refused="the KV tensor … is …, announced as …")
def test_tensors_that_do_not_agree(pair: Pair, keen: Path, prompts: Prompts) -> None:
    """vLLM hands over tensors of another type than it announced: caching is off, and it serves."""
    query = Query(prompts.make(970, 140))
    with pair.engines(keen, prepare=features.hand_over_other_types):
        want = pair.plain(features.run, [query])
        cold = pair.call(features.run, [query])
        second = pair.call(features.again, features.run, [query])
        assert cold.tokens == second.tokens == want().tokens
        assert "announced as torch.float32" in second.after.off_reason
        assert (second.onboarded, second.after.offloaded, second.after.registered) == (0, 0, 0)
