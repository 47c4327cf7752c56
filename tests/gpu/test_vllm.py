"""KVBM in a real vLLM on a GPU: what is loaded gives the tokens that are computed without it.

pytest -m gpu tests/gpu
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import scenarios
from tests.engine.scenarios import Ask
from tests.gpu import gpu_scenarios
from tests.gpu.pair import BLOCK, Pair, full, prompt

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


# A test with a row of its own decides that one in both modes.
GRAPHS = pytest.mark.feature("CUDA graphs (full and piecewise)")


@pytest.fixture(scope="module", params=["eager", pytest.param("graphs", marks=GRAPHS)])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(model: Path, mode: str) -> Iterator[Pair]:
    pair = Pair(model, mode, {})
    yield pair
    pair.close()


@pytest.mark.feature("Prompts (MHA, GQA)")
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
    assert pair.engine.call(gpu_scenarios.in_step_loads) == (5, 5)


def test_many_at_once(pair: Pair) -> None:
    """The first is loaded inside the step, the others while it runs."""
    asks = [Ask(prompt(100 + i, 200 + 37 * i), 24) for i in range(24)]
    cold = pair.engine.call(scenarios.run, asks)
    host = pair.engine.call(scenarios.run_again, asks)
    assert host.onboarded == full(asks)
    assert [cold.tokens, host.tokens] == [pair.right(asks)] * 2
    assert (host.after.pins, host.after.followed) == (0, 0)


@pytest.mark.feature("Replies, as the prompt of the next turn")
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


@pytest.mark.feature("cache_salt")
def test_salts_do_not_share(pair: Pair) -> None:
    asks = [Ask(prompt(600, 800), 8, salt) for salt in ("a", "b")]
    pair.engine.call(scenarios.run_again, asks[:1])
    other = pair.engine.call(scenarios.run_again, asks[1:])
    assert (other.cached, other.onboarded) == ([0], 0)
    same = pair.engine.call(scenarios.run_again, asks[:1])
    assert same.onboarded == full(asks[:1])
    assert [same.tokens, other.tokens] == [pair.right(asks[:1])] * 2


@pytest.mark.feature("Preemption")
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
