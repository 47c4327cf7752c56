"""KVBM in a real vLLM on a GPU: what is loaded gives the tokens that are computed without it.

The shape of Llama-3.1-8B in bf16, weights made up. vLLM runs in its batch-invariant mode, in which a token
does not depend on what else is in the batch, so that answers can be compared with those of an engine without
connector, token for token. pytest -m gpu tests/gpu
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from benchmarks.vllm_gpu import MODEL  # noqa: E402
from tests.engine import scenarios  # noqa: E402
from tests.engine.harness import Engine  # noqa: E402
from tests.engine.scenarios import Ask  # noqa: E402
from tests.gpu import gpu_scenarios  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

BLOCK = 16
DEVICE_BLOCKS = 1280  # 20,480 tokens
OPTIONS = {
    "dtype": "bfloat16",
    "block_size": BLOCK,
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 18432,
    "num_gpu_blocks_override": DEVICE_BLOCKS,
    "max_num_seqs": 64,
    "gpu_memory_utilization": 0.5,
}
ENV = {"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
HOST = {"DYN_KVBM_CPU_CACHE_GB": "12"}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-8b-shape")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture(scope="module", params=["eager", "graphs"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


class Pair:
    """The engine under test, and one without connector or cache that says what is right."""

    def __init__(self, model: Path, mode: str, env: dict[str, str], **options: object) -> None:
        common = {**OPTIONS, "enforce_eager": mode == "eager", **options}
        self.engine = Engine(model, kvbm={}, env={**ENV, **HOST, **env}, **common)
        self.engine.wait_ready()
        self._plain = Engine(model, env=ENV, enable_prefix_caching=False, **common)
        self._known: dict[Ask, list[int]] = {}

    def right(self, asks: Sequence[Ask]) -> list[list[int]]:
        plain = [Ask(ask.prompt, ask.max_tokens) for ask in asks]
        new = [ask for ask in dict.fromkeys(plain) if ask not in self._known]
        if new:
            self._known.update(zip(new, self._plain.call(scenarios.run, new).tokens, strict=True))
        return [self._known[ask] for ask in plain]

    def close(self) -> None:
        self.engine.close()
        self._plain.close()


@pytest.fixture(scope="module")
def pair(model: Path, mode: str) -> Iterator[Pair]:
    pair = Pair(model, mode, {})
    yield pair
    pair.close()


def prompt(seed: int, tokens: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1000, 100_000) for _ in range(tokens))


def full(asks: Sequence[Ask]) -> int:
    """Blocks that a load can bring: at least one token is left to compute."""
    return sum((len(ask.prompt) - 1) // BLOCK for ask in asks)


def test_one_after_the_other(pair: Pair) -> None:
    """Each finds the engine idle: loaded inside the step, layer by layer."""
    pair.engine.call(gpu_scenarios.count_in_step_loads)
    for seed, tokens in enumerate([17, 100, 1000, 4096, 16001]):
        asks = [Ask(prompt(seed, tokens), 24)]
        cold = pair.engine.call(scenarios.run, asks)
        device = pair.engine.call(scenarios.run, asks)
        host = pair.engine.call(scenarios.run_again, asks)
        assert host.onboarded == full(asks) == host.cached[0] // BLOCK
        assert device.onboarded == 0
        assert [cold.tokens, device.tokens, host.tokens] == [pair.right(asks)] * 3
    assert pair.engine.call(gpu_scenarios.in_step_loads) == 5


def test_many_at_once(pair: Pair) -> None:
    """The first is loaded inside the step, the others while it runs."""
    asks = [Ask(prompt(100 + i, 200 + 37 * i), 24) for i in range(24)]
    cold = pair.engine.call(scenarios.run, asks)
    host = pair.engine.call(scenarios.run_again, asks)
    assert host.onboarded == full(asks)
    assert [cold.tokens, host.tokens] == [pair.right(asks)] * 2
    assert (host.after.pins, host.after.followed) == (0, 0)


def test_replies_are_found_in_the_next_turn(pair: Pair) -> None:
    first = [Ask(prompt(200 + i, 500 + 91 * i), 50) for i in range(6)]
    turn1 = pair.engine.call(scenarios.run_again, first)
    second = [
        Ask(ask.prompt + tuple(reply) + prompt(300 + i, 40), 24)
        for i, (ask, reply) in enumerate(zip(first, turn1.tokens, strict=True))
    ]
    turn2 = pair.engine.call(scenarios.run_again, second)
    known = [(len(ask.prompt) + ask.max_tokens - 1) // BLOCK for ask in first]
    assert [cached // BLOCK for cached in turn2.cached] == known
    assert turn2.onboarded == sum(known)
    assert turn2.tokens == pair.right(second)


def test_part_on_device_part_on_host(pair: Pair) -> None:
    ask, head = Ask(prompt(400, 3000), 24), Ask(prompt(400, 3000)[:1025], 1)
    pair.engine.call(scenarios.run, [ask])
    pair.engine.call(scenarios.run_again, [head])
    both = pair.engine.call(scenarios.run, [ask])
    assert both.device_hits == 64 * BLOCK
    assert both.onboarded == full([ask]) - 64
    assert both.tokens == pair.right([ask])


def test_long_suffix_behind_a_loaded_prefix(pair: Pair) -> None:
    """The forward pass of several thousand tokens runs behind the load, layer by layer."""
    head = prompt(500, 8192)
    asks = [Ask(head + prompt(501, 6000), 24)]
    pair.engine.call(scenarios.run, [Ask(head, 1)])
    ran = pair.engine.call(scenarios.run_again, asks)
    assert ran.onboarded == len(head) // BLOCK
    assert ran.tokens == pair.right(asks)


def test_salts_do_not_share(pair: Pair) -> None:
    asks = [Ask(prompt(600, 800), 8, salt) for salt in ("a", "b")]
    pair.engine.call(scenarios.run_again, asks[:1])
    other = pair.engine.call(scenarios.run_again, asks[1:])
    assert (other.cached, other.onboarded) == ([0], 0)
    same = pair.engine.call(scenarios.run_again, asks[:1])
    assert same.onboarded == full(asks[:1])
    assert [same.tokens, other.tokens] == [pair.right(asks[:1])] * 2


def test_preemption(pair: Pair) -> None:
    """More requests than the device holds: some lose their blocks, and get them back from the host."""
    asks = [Ask(prompt(700 + i, 400 + 13 * i), 150) for i in range(40)]
    ran = pair.engine.call(scenarios.run_again, asks)
    assert ran.after.preemptions > ran.before.preemptions
    assert ran.onboarded > 0
    assert ran.tokens == pair.right(asks)
    again = pair.engine.call(scenarios.run_again, asks)
    assert again.tokens == pair.right(asks)
    assert (again.after.pins, again.after.followed) == (0, 0)


def test_aborts(pair: Pair) -> None:
    asks = [Ask(prompt(800 + i % 20, 300 + 40 * (i % 20)), 20) for i in range(120)]
    ran = pair.engine.call(scenarios.run_with_aborts, asks, 1)
    assert ran["aborted"]
    right = pair.right(asks)
    assert all(tokens == right[i] for i, tokens in ran["tokens"].items())
    after = ran["after"]
    assert (after.pins, after.followed) == (0, 0)
    assert after.free_device_blocks == after.device_blocks


def test_small_host_tier(model: Path) -> None:
    """Blocks are evicted and stored again all the time. Records are checked; a damaged one is a miss."""
    env = {"DYN_KVBM_CPU_CACHE_GB": "1.5", "KVBM_HOST_CHECKSUM": "1", "KVBM_TRANSFER_COPY_METHOD": "staged"}
    pair = Pair(model, "eager", env)
    try:
        asks = [Ask(prompt(900 + i, 700 + 100 * i), 16) for i in range(12)]
        for _ in range(3):
            ran = pair.engine.call(scenarios.run_again, asks)
            assert ran.tokens == pair.right(asks)
            assert ran.after.evictions > 0
        one = [Ask(prompt(990, 1600), 16)]
        pair.engine.call(scenarios.run, one)
        pair.engine.call(scenarios.corrupt, one[0].prompt, 40)
        damaged = pair.engine.call(scenarios.run_again, one)
        assert damaged.failures("ONBOARD", "CORRUPT") == 1
        assert damaged.onboarded == full(one) - 1
        assert damaged.tokens == pair.right(one)
    finally:
        pair.close()


def test_layers_together(model: Path) -> None:
    """vLLM's older model runner puts all layers of a block together when it is asked to."""
    pair = Pair(model, "eager", {"VLLM_USE_V2_MODEL_RUNNER": "0"})
    try:
        asks = [Ask(prompt(1000 + i, 500 + 200 * i), 24) for i in range(5)]
        assert pair.engine.call(gpu_scenarios.blocks_are_contiguous)
        pair.engine.call(scenarios.run, asks)
        for one in [asks, asks[:1], asks[1:2]]:
            host = pair.engine.call(scenarios.run_again, one)
            assert host.onboarded == full(one)
            assert host.tokens == pair.right(one)
    finally:
        pair.close()
