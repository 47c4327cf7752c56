"""Too little of something: steps, device blocks, host blocks, or no device prefix cache at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import scenarios
from tests.engine.conftest import Expect
from tests.engine.harness import Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask


@pytest.fixture(scope="module")
def tight(model: Path, baseline: Engine) -> Iterator[Engine]:
    """Few device blocks, short steps."""
    with Engine(
        model,
        kvbm={},
        env={"DYN_KVBM_CPU_CACHE_GB": "0.5"},
        num_gpu_blocks_override=24,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        max_model_len=700,
    ) as engine:
        engine.wait_ready()
        yield engine


def test_chunked_prefill(tight: Engine, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt) for prompt in prompts.batch(400, [500, 250, 333])]
    want = expect(asks)
    cold = tight.call(scenarios.run, asks)
    host = tight.call(scenarios.run_again, asks)
    longer = [Ask(asks[0].prompt + prompts.make(409, 150))]  # chunks that follow a load
    extended = tight.call(scenarios.run_again, longer)
    assert [cold.tokens, host.tokens] == [want()] * 2
    assert extended.tokens == expect(longer)()
    assert cold.onboarded == 0
    assert host.onboarded == 15 + 7 + 10
    assert host.external_hits == (15 + 7 + 10) * 32
    assert extended.onboarded == 15


def test_head_on_device_tail_on_host(tight: Engine, expect: Expect, prompts: Prompts) -> None:
    """Other requests take the tail of a prompt's device blocks; the head is still there."""
    ask = Ask(prompts.make(405, 300))
    others = [Ask(prompt, 1) for prompt in prompts.batch(406, [290, 300])]
    want = expect([ask])
    tight.call(scenarios.run_again, [ask])
    tight.call(scenarios.run, others)

    both = tight.call(scenarios.run, [ask])
    assert both.tokens == want()
    assert both.device_hits > 0
    assert both.external_hits > 0
    assert both.onboarded == both.external_hits // 32
    assert both.device_hits + both.external_hits == 9 * 32


@pytest.mark.feature("Preemption")
def test_preemption(tight: Engine, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt, 40) for prompt in prompts.batch(410, [100, 90, 80, 120, 70, 110, 60, 95])]
    want = expect(asks)
    cold = tight.call(scenarios.run_again, asks)
    assert cold.tokens == want()
    assert cold.after.preemptions > cold.before.preemptions
    assert cold.after.free_device_blocks == cold.after.device_blocks
    assert (cold.after.pins, cold.after.followed, cold.after.off_reason) == (0, 0, None)

    # What was stored around the preemptions is right, replies included.
    second = [Ask(ask.prompt + tuple(reply), 4) for ask, reply in zip(asks, cold.tokens, strict=True)]
    want_second = expect(second)
    turn2 = tight.call(scenarios.run_again, second)
    assert turn2.tokens == want_second()
    assert turn2.onboarded >= 0.95 * sum((len(ask.prompt) - 1) // 32 for ask in second)


def test_preemption_with_slow_offloads(tight: Engine, expect: Expect, prompts: Prompts) -> None:
    """Device blocks are taken from requests while offloads still read them."""
    asks = [Ask(prompt, 40) for prompt in prompts.batch(410, [100, 90, 80, 120, 70, 110, 60, 95])]
    want = expect(asks)
    assert tight.call(scenarios.reset, False, True)
    tight.call(scenarios.slow, "offload", 0.2)
    cold = tight.call(scenarios.run, asks)
    tight.call(scenarios.restore)
    assert cold.tokens == want()
    assert cold.after.preemptions > cold.before.preemptions
    assert (cold.after.pins, cold.after.followed, cold.after.off_reason) == (0, 0, None)
    second = [Ask(ask.prompt + tuple(reply), 4) for ask, reply in zip(asks, cold.tokens, strict=True)]
    turn2 = tight.call(scenarios.run_again, second)
    assert turn2.tokens == expect(second)()
    assert turn2.onboarded > 0


def test_32_at_once_over_a_small_host_tier(model: Path, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt, 6) for prompt in prompts.batch(420, [40 + 3 * (i * 11 % 32) for i in range(32)])]
    want = expect(asks)
    with Engine(
        model, kvbm={"host": {"num_blocks": 24}}, num_gpu_blocks_override=192, max_num_seqs=32
    ) as engine:
        cold = engine.call(scenarios.run, asks)
        again = engine.call(scenarios.run_again, asks[::-1])
        third = engine.call(scenarios.run_again, asks[::3])
    assert cold.after.capacity == 24
    assert [cold.tokens, again.tokens[::-1], third.tokens] == [want(), want(), want()[::3]]
    assert cold.after.evictions > 0
    assert again.onboarded > 0
    assert third.after.evictions > again.after.evictions
    for ran in (cold, again, third):
        assert ran.after.registered <= 24
        assert ran.after.free_device_blocks == ran.after.device_blocks
        assert (ran.after.pins, ran.after.followed, ran.after.off_reason) == (0, 0, None)


def test_without_prefix_caching_on_the_device(model: Path, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt) for prompt in prompts.batch(100, [70, 130, 200, 333])]
    want = expect(asks)
    with Engine(model, kvbm={}, env={"DYN_KVBM_CPU_CACHE_GB": "0.2"}, enable_prefix_caching=False) as engine:
        cold = engine.call(scenarios.run, asks)
        host = engine.call(scenarios.run, asks)
    assert [cold.tokens, host.tokens] == [want()] * 2
    assert cold.onboarded == 0
    assert host.onboarded == 2 + 4 + 6 + 10
    assert host.device_hits == 0
    assert host.external_hits == sum(host.cached) == host.onboarded * 32
    assert host.after.free_device_blocks == host.after.device_blocks
    assert (host.after.pins, host.after.followed) == (0, 0)


def test_asynchronous_scheduler(model: Path, expect: Expect, prompts: Prompts) -> None:
    """vLLM's default on GPUs: a step is planned before the one before it has ended."""
    first = [Ask(prompt, 36) for prompt in prompts.batch(140, [155, 90, 190])]
    tight = [Ask(prompt, 40) for prompt in prompts.batch(410, [100, 90, 80, 120, 70, 110, 60, 95])]
    want, want_tight = expect(first), expect(tight)
    with Engine(
        model,
        kvbm={},
        env={"DYN_KVBM_CPU_CACHE_GB": "0.5"},
        num_gpu_blocks_override=24,
        max_num_seqs=8,
        max_model_len=700,
        async_scheduler=True,
    ) as engine:
        assert engine.call(scenarios.scheduler_name) == "AsyncScheduler"
        cold = engine.call(scenarios.run, first)
        host = engine.call(scenarios.run_again, first)
        assert [cold.tokens, host.tokens] == [want()] * 2
        more = prompts.encode(" And then?")
        second = [
            Ask(ask.prompt + tuple(reply) + more, 8) for ask, reply in zip(first, cold.tokens, strict=True)
        ]
        want_second = expect(second)
        turn2 = engine.call(scenarios.run_again, second)
        assert turn2.tokens == want_second()
        assert host.onboarded == 4 + 2 + 5
        full = sum((len(ask.prompt) + ask.max_tokens - 1) // 32 for ask in first)
        assert turn2.onboarded >= 0.95 * full

        pressed = engine.call(scenarios.run, tight)
        assert pressed.tokens == want_tight()
        assert pressed.after.preemptions > 0
        longer = [Ask(ask.prompt + tuple(reply), 4) for ask, reply in zip(tight, pressed.tokens, strict=True)]
        turn3 = engine.call(scenarios.run_again, longer)
        assert turn3.tokens == expect(longer)()
        assert turn3.onboarded > 0
        assert turn3.after.free_device_blocks == turn3.after.device_blocks
        assert (turn3.after.pins, turn3.after.followed, turn3.after.off_reason) == (0, 0, None)
