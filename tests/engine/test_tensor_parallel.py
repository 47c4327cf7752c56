"""Two ranks, each with its shard of every block."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import scenarios
from tests.engine.harness import Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

# SmolLM2 has nine heads, which two ranks can't share: a small model of random weights has four.
OPTIONS: dict[str, Any] = {"tensor_parallel_size": 2, "load_format": "dummy", "num_gpu_blocks_override": 64}


@pytest.fixture(scope="module")
def asks(prompts: Prompts) -> list[Ask]:
    return [Ask(prompt, 24) for prompt in prompts.batch(500, [70, 130, 200, 333])]


@pytest.fixture(scope="module")
def plain(tiny: Path, asks: list[Ask]) -> list[list[int]]:
    """What two ranks answer without KVBM."""
    with Engine(tiny, enable_prefix_caching=False, **OPTIONS) as engine:
        return engine.call(scenarios.run, asks).tokens


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    with Engine(tiny, kvbm={}, env={"DYN_KVBM_CPU_CACHE_GB": "0.2"}, **OPTIONS) as engine:
        engine.wait_ready()
        yield engine


@pytest.mark.feature("Tensor parallel")
def test_host_hits_on_two_ranks(engine: Engine, plain: list[list[int]], asks: list[Ask]) -> None:
    assert len({tuple(tokens) for tokens in plain}) == len(plain)  # the answers depend on the prompt
    cold = engine.call(scenarios.run, asks)
    host = engine.call(scenarios.run_again, asks)
    assert [cold.tokens, host.tokens] == [plain] * 2
    assert host.onboarded == 2 + 4 + 6 + 10
    assert host.external_hits == host.onboarded * 32
    assert host.after.free_device_blocks == host.after.device_blocks
    assert (host.after.pins, host.after.followed, host.after.off_reason) == (0, 0, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_visible_when_both_ranks_have_written(engine: Engine, prompts: Prompts, rank: int) -> None:
    ask = Ask(prompts.make(510 + rank, 140), 1)
    engine.call(scenarios.withhold, rank)
    first = engine.call(scenarios.run, [ask], False)
    engine.call(scenarios.step_for, 0.5)
    assert engine.call(scenarios.registered, ask.prompt) == 0
    assert engine.call(scenarios.reset)
    second = engine.call(scenarios.run, [ask], False)
    assert second.onboarded == 0
    assert engine.call(scenarios.deliver) > 0
    engine.call(scenarios.drain)
    third = engine.call(scenarios.run_again, [ask])
    fourth = engine.call(scenarios.run_again, [ask])
    assert fourth.onboarded == 4
    assert first.tokens == second.tokens == third.tokens == fourth.tokens
