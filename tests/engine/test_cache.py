"""Where a prompt's KV comes from, and that its continuation stays the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import scenarios
from tests.engine.conftest import Expect
from tests.engine.harness import BLOCK_SIZE, Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask


@pytest.fixture(scope="module")
def engine(model: Path, baseline: Engine) -> Iterator[Engine]:
    with Engine(model, kvbm={}, env={"DYN_KVBM_CPU_CACHE_GB": "1"}) as engine:
        engine.wait_ready()
        yield engine


def blocks(asks: list[Ask]) -> int:
    """Full blocks of the prompts that a load can cover: one token is left to compute."""
    return sum((len(ask.prompt) - 1) // BLOCK_SIZE for ask in asks)


@pytest.mark.feature("Prompts (MHA, GQA)")
def test_cold_then_device_then_host(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt) for prompt in prompts.batch(100, [70, 130, 200, 333])]
    want = expect(asks)

    cold = engine.call(scenarios.run, asks)
    device = engine.call(scenarios.run, asks)
    host = engine.call(scenarios.run_again, asks)

    assert cold.cached == [0, 0, 0, 0]
    assert (cold.device_hits, cold.external_hits, cold.onboarded) == (0, 0, 0)
    assert cold.after.registered - cold.before.registered >= blocks(asks)

    assert device.device_hits == sum(device.cached) == blocks(asks) * BLOCK_SIZE
    assert (device.external_hits, device.onboarded) == (0, 0)

    assert host.onboarded >= blocks(asks)
    assert host.device_hits == 0
    assert host.external_hits == sum(host.cached) >= blocks(asks) * BLOCK_SIZE
    assert [cold.tokens, device.tokens, host.tokens] == [want()] * 3
    assert (host.after.pins, host.after.followed) == (0, 0)
    assert (device.hits_by_tier, host.hits_by_tier) == (
        {"device": device.device_hits},
        {"host": host.external_hits},
    )


def test_prompt_of_whole_blocks(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    """A load leaves a token to compute, and with it its block."""
    asks = [Ask(prompt) for prompt in prompts.batch(110, [64, 128, 32, 33, 31])]
    want = expect(asks)
    cold = engine.call(scenarios.run, asks)
    host = engine.call(scenarios.run_again, asks)
    assert [cold.tokens, host.tokens] == [want()] * 2
    assert host.onboarded == 1 + 3 + 0 + 1
    assert host.cached == [32, 96, 0, 32, 0]
    assert host.after.free_device_blocks == host.after.device_blocks


def test_part_on_device_part_on_host(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    whole = prompts.make(120, 300)
    ask, head = Ask(whole), Ask(whole[:132], 1)
    want = expect([ask])
    engine.call(scenarios.run, [ask])
    engine.call(scenarios.run_again, [head])

    both = engine.call(scenarios.run, [ask])
    assert both.device_hits == 4 * BLOCK_SIZE
    assert both.external_hits == 5 * BLOCK_SIZE
    assert both.onboarded == 5
    assert both.cached == [9 * BLOCK_SIZE]
    assert both.tokens == want()


@pytest.mark.feature("Replies, as the prompt of the next turn")
def test_multi_turn(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    """The second turn loads what the first one computed, its reply included."""
    first = [Ask(prompt, 36) for prompt in prompts.batch(140, [155, 90, 190])]
    want_first = expect(first)
    turn1 = engine.call(scenarios.run_again, first)
    assert turn1.tokens == want_first()

    more = prompts.encode(" And what did Anna do on the next day? Tell me in one sentence.")
    second = [
        Ask(ask.prompt + tuple(reply) + more, 12) for ask, reply in zip(first, turn1.tokens, strict=True)
    ]
    want_second = expect(second)
    turn2 = engine.call(scenarios.run_again, second)

    # The last token of a reply is never computed.
    full = [(len(ask.prompt) + ask.max_tokens - 1) // BLOCK_SIZE for ask in first]
    assert any(count > len(ask.prompt) // BLOCK_SIZE for count, ask in zip(full, first, strict=True))
    assert turn2.device_hits == 0
    assert turn2.onboarded >= 0.95 * sum(full)
    assert [cached // BLOCK_SIZE for cached in turn2.cached] == full
    assert turn2.tokens == want_second()


@pytest.mark.feature("cache_salt")
def test_salts_do_not_share(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    prompt = prompts.make(150, 140)
    salted, other, plain = Ask(prompt, salt="A"), Ask(prompt, salt="B"), Ask(prompt)
    want = expect([plain])
    first = engine.call(scenarios.run, [salted])
    strangers = [engine.call(scenarios.run_again, [ask]) for ask in (other, plain)]
    again = engine.call(scenarios.run_again, [salted])

    for stranger in strangers:
        assert stranger.cached == [0]
        assert (stranger.onboarded, stranger.external_hits) == (0, 0)
    assert again.onboarded == 4
    assert [ran.tokens for ran in (first, *strangers, again)] == [want()] * 4


def test_reset_of_the_device_cache_keeps_the_host_tier(engine: Engine, prompts: Prompts) -> None:
    ask = Ask(prompts.make(160, 140), 2)
    engine.call(scenarios.run, [ask])
    assert engine.call(scenarios.reset)
    assert engine.call(scenarios.registered, ask.prompt) == 4
    assert engine.call(scenarios.run, [ask]).onboarded == 4


def test_reset_with_connector_empties_the_host_tier(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    ask = Ask(prompts.make(161, 140), 2)
    want = expect([ask])
    engine.call(scenarios.run, [ask])
    assert engine.call(scenarios.registered, ask.prompt) == 4

    assert engine.call(scenarios.reset, False, True)
    assert engine.call(scenarios.observe).registered == 0
    cold = engine.call(scenarios.run, [ask])
    assert (cold.cached, cold.onboarded) == ([0], 0)
    assert cold.tokens == want()
    # and it fills again
    assert engine.call(scenarios.run_again, [ask]).onboarded == 4


def test_reset_right_after_generate(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    """vLLM refuses a reset while a device block is in use, also by an offload that reads it."""
    asks = [Ask(prompt, 2) for prompt in prompts.batch(170, [140, 140])]
    want = expect(asks)
    engine.call(scenarios.slow, "offload", 0.5)
    first = engine.call(scenarios.run, asks, False)
    assert first.after.has_work
    assert first.after.free_device_blocks < first.after.device_blocks
    assert engine.call(scenarios.reset)
    engine.call(scenarios.restore)
    # What the reset cut off is not visible, and what is, is right.
    again = engine.call(scenarios.run_again, asks)
    assert [first.tokens, again.tokens] == [want()] * 2
    assert again.after.free_device_blocks == again.after.device_blocks
    assert (again.after.pins, again.after.followed) == (0, 0)


@pytest.mark.parametrize("connector", [False, True])
def test_reset_while_requests_run(engine: Engine, expect: Expect, prompts: Prompts, connector: bool) -> None:
    asks = [Ask(prompt, 20) for prompt in prompts.batch(190 if connector else 180, [105, 150, 60, 200])]
    want = expect(asks)
    engine.call(scenarios.slow, "offload", 0.3)
    got = engine.call(scenarios.run_with_resets, asks, [2, 4, 10], connector)
    engine.call(scenarios.restore)
    assert got["results"] == [True] * 3
    assert got["running"] > 0
    assert got["offloads_under_way"] > 0
    assert got["tokens"] == want()
    after = got["after"]
    assert after.free_device_blocks == after.device_blocks
    assert (after.pins, after.followed, after.off_reason) == (0, 0, None)
    again = engine.call(scenarios.run_again, asks)
    assert again.tokens == want()


def test_200_requests_with_aborts(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    pool = [
        Ask(prompt, 4 + index % 5)
        for index, prompt in enumerate(prompts.batch(200, [40 + 9 * i for i in range(16)]))
    ]
    asks = [pool[(index * 7) % len(pool)] for index in range(200)]
    want = expect(asks)
    engine.call(scenarios.run_again, pool[::2])  # half of them can be loaded
    assert engine.call(scenarios.reset)
    got = engine.call(scenarios.run_with_aborts, asks, 7)

    assert len(got["aborted"]) >= 20
    assert got["during_load"] > 0
    assert len(got["tokens"]) == 200 - len(got["aborted"])
    expected = want()
    assert {index: expected[index] for index in got["tokens"]} == got["tokens"]
    after = got["after"]
    assert after.onboarded > got["before"].onboarded
    assert after.free_device_blocks == after.device_blocks
    assert (after.unfinished, after.has_work, after.pins, after.followed) == (0, False, 0, 0)
    assert after.off_reason is None
    # What was stored meanwhile is right.
    again = engine.call(scenarios.run_again, pool)
    assert again.onboarded > 0
    assert again.tokens == expect(pool)()
