"""A failure is a miss: whatever goes wrong with the host tier, the outputs stay the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import scenarios
from tests.engine.conftest import Expect
from tests.engine.harness import Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

TIMEOUT_S = 2


@pytest.fixture(scope="module")
def started(model: Path, baseline: Engine) -> Iterator[Engine]:
    with Engine(
        model,
        # Operations are small, so that some of one step succeed and others fail.
        kvbm={"transfer.timeout_s": TIMEOUT_S, "transfer.max_batch_blocks": 16},
        env={"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "256"},
    ) as engine:
        engine.wait_ready()
        yield engine


@pytest.fixture
def engine(started: Engine) -> Iterator[Engine]:
    """Without the faults of the test before."""
    yield started
    if started.alive:
        started.call(scenarios.let_go)


def test_corrupt_record(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt) for prompt in prompts.batch(300, [200, 120])]
    want = expect(asks)
    engine.call(scenarios.run, asks)
    slot = engine.call(scenarios.corrupt, asks[0].prompt, 2)
    engine.call(scenarios.watch_loads)

    got = engine.call(scenarios.run_again, asks)
    assert got.tokens == want()
    assert got.failures("ONBOARD", "CORRUPT") == 1
    assert got.onboarded == 5 + 3
    assert engine.call(scenarios.watched)["failed blocks"] == 1

    # The block is stored anew: the damaged record is gone, what is offered now is right.
    assert engine.call(scenarios.registered, asks[0].prompt) == 6
    again = engine.call(scenarios.run_again, asks)
    assert again.tokens == want()
    assert again.failures("ONBOARD", "CORRUPT") == 0
    assert again.onboarded == 6 + 3
    assert slot >= 0


def test_corrupt_record_is_withdrawn_at_once(engine: Engine, prompts: Prompts) -> None:
    ask = Ask(prompts.make(303, 140), 1)
    engine.call(scenarios.run, [ask])
    engine.call(scenarios.corrupt, ask.prompt, 1)
    engine.call(scenarios.fail, "offload", 1)  # nothing is stored anew
    engine.call(scenarios.run_again, [ask])
    assert engine.call(scenarios.registered, ask.prompt) == 1
    after = engine.call(scenarios.run_again, [ask])
    assert after.failures("ONBOARD", "CORRUPT") == 0
    assert after.onboarded == 1


def test_loads_that_raise(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt) for prompt in prompts.batch(310, [70, 100, 130, 160, 190, 220])]
    want = expect(asks)
    engine.call(scenarios.run, asks)
    engine.call(scenarios.fail, "onboard", 2)
    engine.call(scenarios.watch_loads)
    got = engine.call(scenarios.run_again, asks)
    assert got.tokens == want()
    assert got.failures("ONBOARD", "ERROR") > 0
    assert got.onboarded > 0
    assert engine.call(scenarios.watched)["failed blocks"] > 0
    assert (got.after.off_reason, got.after.pins, got.after.followed) == (None, 0, 0)

    engine.call(scenarios.restore)
    again = engine.call(scenarios.run_again, asks)
    assert again.tokens == want()
    assert again.failures("ONBOARD", "ERROR") == 0
    assert again.onboarded == 2 + 3 + 4 + 4 + 5 + 6


def test_all_loads_raise(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt, 2) for prompt in prompts.batch(320, [70, 100, 130])]
    want = expect(asks)
    engine.call(scenarios.run, asks)
    engine.call(scenarios.fail, "onboard", 1)
    got = engine.call(scenarios.run_again, asks)
    assert got.tokens == want()
    assert got.onboarded == 0
    assert got.cached == [0, 0, 0]
    assert got.after.free_device_blocks == got.after.device_blocks


def test_offloads_that_raise(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt) for prompt in prompts.batch(330, [70, 600, 130, 160])]
    want = expect(asks)
    engine.call(scenarios.fail, "offload", 2)
    cold = engine.call(scenarios.run, asks)
    assert cold.tokens == want()
    assert cold.failures("OFFLOAD", "ERROR") > 0
    assert (cold.after.off_reason, cold.after.pins, cold.after.followed) == (None, 0, 0)
    assert cold.after.free_device_blocks == cold.after.device_blocks

    engine.call(scenarios.restore)
    restored = engine.call(scenarios.run_again, asks)  # stores what was lost
    host = engine.call(scenarios.run_again, asks)
    assert [restored.tokens, host.tokens] == [want()] * 2
    assert host.onboarded == 2 + 18 + 4 + 4
    assert host.failures("OFFLOAD", "ERROR") == 0


@pytest.mark.parametrize("old_interface", [False, True])
def test_load_that_hangs(engine: Engine, expect: Expect, prompts: Prompts, old_interface: bool) -> None:
    """The request is computed; the blocks that the copy may still write to are nobody's until it ends.

    old_interface: vLLM before 0.30 knows failed loads by their blocks only.
    """
    seed = 345 if old_interface else 340
    asks = [Ask(prompt) for prompt in prompts.batch(seed, [140, 70])]
    fresh = [Ask(prompt, 2) for prompt in prompts.batch(seed + 2, [300, 200])]
    want, want_fresh = expect(asks), expect(fresh)
    engine.call(scenarios.run, asks)
    if old_interface:
        engine.call(scenarios.use_old_interface)
    engine.call(scenarios.hang, "onboard")
    engine.call(scenarios.watch_loads)

    got = engine.call(scenarios.run_again, asks)
    assert got.tokens == want()
    assert got.cached == [0, 0]
    seen = engine.call(scenarios.watched)
    assert seen["failed requests"] + seen["failed blocks"] > 0
    hung, users = engine.call(scenarios.hung_blocks)
    assert len(hung) in (4, 2)
    assert all(count > 0 for count in users)
    assert got.after.free_device_blocks <= got.after.device_blocks - len(hung)

    # The engine goes on with other blocks.
    others = engine.call(scenarios.run, fresh)
    assert others.tokens == want_fresh()

    engine.call(scenarios.let_go)
    engine.call(scenarios.use_new_interface)
    end = engine.call(scenarios.run, [Ask(prompts.make(352, 40), 2)])
    assert end.failures("ONBOARD", "TIMEOUT") == 6
    assert (end.after.off_reason, end.after.pins, end.after.followed) == (None, 0, 0)
    assert end.after.free_device_blocks == end.after.device_blocks
    again = engine.call(scenarios.run_again, asks)
    assert again.tokens == want()


def test_offload_that_hangs(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    """No request waits for it, and what it may have written is never visible."""
    asks = [Ask(prompt) for prompt in prompts.batch(360, [140, 70])]
    want = expect(asks)
    engine.call(scenarios.hang, "offload")
    got = engine.call(scenarios.run, asks)  # until KVBM has given up
    assert got.tokens == want()
    hung, users = engine.call(scenarios.hung_blocks)
    assert hung
    assert all(count > 0 for count in users)
    assert engine.call(scenarios.registered, asks[0].prompt) == 0

    assert engine.call(scenarios.reset)  # gives up the held blocks
    again = engine.call(scenarios.run, asks)
    assert again.tokens == want()
    assert again.onboarded == 0

    engine.call(scenarios.let_go)
    end = engine.call(scenarios.run, [Ask(prompts.make(362, 40), 2)])
    assert end.failures("OFFLOAD", "TIMEOUT") + end.before.failures.get(("OFFLOAD", "TIMEOUT"), 0) > 0
    assert (end.after.off_reason, end.after.pins, end.after.followed) == (None, 0, 0)
    assert end.after.free_device_blocks == end.after.device_blocks
    restored = engine.call(scenarios.run_again, asks)
    host = engine.call(scenarios.run_again, asks)
    assert [restored.tokens, host.tokens] == [want()] * 2
    assert host.onboarded == 4 + 2


def test_order_that_can_not_be_given(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    """An error of ours in the worker: caching may go off, but no request waits for ever."""
    asks = [Ask(prompt, 2) for prompt in prompts.batch(380, [140, 70])]
    want = expect(asks)
    engine.call(scenarios.run, asks)
    engine.call(scenarios.break_submit)
    got = engine.call(scenarios.run_again, asks, deadline_s=45)
    assert got.tokens == want()
