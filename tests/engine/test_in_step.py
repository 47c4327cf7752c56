"""Loads inside a step, end to end: vLLM runs the request in the step in which its blocks are loaded.

The copy engine is `lazy_loads`: a layer's blocks hold rubbish until vLLM announces that layer.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import lazy_loads, scenarios
from tests.engine.conftest import Expect
from tests.engine.harness import Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask, Ran

LAYERS = 30


@pytest.fixture(scope="module", params=["sync", "async", "async, many ranks"])
def started(request: pytest.FixtureRequest, model: Path, baseline: Engine) -> Iterator[Engine]:
    """async: vLLM's scheduler on GPUs, which plans a step before the one before it has ended.

    many ranks: their loads start in the step, others while it is planned.
    """
    many = request.param.endswith("ranks")
    with Engine(
        model,
        kvbm={},
        env={"DYN_KVBM_CPU_CACHE_GB": "1", "KVBM_HOST_CHECKSUM": "0"},
        prepare=lazy_loads.use_lazy_loads_as_of_many_ranks if many else lazy_loads.use_lazy_loads,
        async_scheduler=request.param != "sync",
        max_num_batched_tokens=128,
    ) as engine:
        engine.wait_ready()
        yield engine


@pytest.fixture
def engine(started: Engine) -> Iterator[Engine]:
    """Without the faults of the test before, and with an empty cache."""
    started.call(scenarios.drain)
    assert started.call(scenarios.reset, False, True)
    started.call(lazy_loads.watch)
    yield started
    if started.alive:
        started.call(lazy_loads.mend)


def at_rest(ran: Ran) -> bool:
    seen = ran.after
    free = seen.device_blocks - seen.free_device_blocks
    return (free, seen.pins, seen.followed, seen.has_work, seen.off_reason) == (0, 0, 0, False, None)


def test_one_request_after_the_other(
    engine: Engine, expect: Expect, prompts: Prompts, request: pytest.FixtureRequest
) -> None:
    asks = [Ask(prompt) for prompt in prompts.batch(600, [70, 130, 333])]
    want = expect(asks)
    cold = engine.call(scenarios.run, asks)
    engine.call(lazy_loads.watch)
    ran = [engine.call(scenarios.run_again, [ask]) for ask in asks]

    assert [cold.tokens, [each.tokens[0] for each in ran]] == [want()] * 2
    assert [each.cached for each in ran] == [[64], [128], [320]]
    assert [each.external_hits for each in ran] == [64, 128, 320]
    assert [each.onboarded for each in ran] == [2, 4, 10]
    assert all(map(at_rest, ran))
    seen = engine.call(lazy_loads.watched)
    assert (seen["in step"], seen["waiting"], seen["blocks in step"]) == (3, 0, 16)
    assert seen["early"] == (0 if "many ranks" in request.node.name else 3)
    # Every layer arrived when it was announced, none later.
    assert (seen["layers on time"], seen["layers at the end"]) == (3 * LAYERS, 0)
    assert seen["calls for all"] == 3
    names = engine.call(lazy_loads.layer_names)
    assert len(names) == LAYERS
    assert engine.call(lazy_loads.layers_seen)[:LAYERS] == names


def test_prompt_of_whole_blocks(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt) for prompt in prompts.batch(610, [64, 128, 32, 33])]
    want = expect(asks)
    engine.call(scenarios.run, asks)
    engine.call(lazy_loads.watch)
    ran = [engine.call(scenarios.run_again, [ask]) for ask in asks]
    assert [each.tokens[0] for each in ran] == want()
    assert [each.onboarded for each in ran] == [1, 3, 0, 1]
    assert [each.cached for each in ran] == [[32], [96], [0], [32]]
    seen = engine.call(lazy_loads.watched)
    assert (seen["in step"], seen["waiting"]) == (3, 0)
    assert all(map(at_rest, ran))


def test_requests_that_come_together(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    """The first one is loaded inside the step, the others wait for their loads meanwhile."""
    asks = [Ask(prompt) for prompt in prompts.batch(620, [70, 130, 200, 333])]
    want = expect(asks)
    engine.call(scenarios.run, asks)
    engine.call(lazy_loads.watch)
    host = engine.call(scenarios.run_again, asks)
    assert host.tokens == want()
    assert host.cached == [64, 128, 192, 320]
    assert host.onboarded == 2 + 4 + 6 + 10
    seen = engine.call(lazy_loads.watched)
    assert (seen["in step"], seen["blocks in step"], seen["waiting"]) == (1, 2, 3)
    assert at_rest(host)


def test_behind_blocks_on_the_device_and_before_chunks(
    engine: Engine, expect: Expect, prompts: Prompts
) -> None:
    """Two blocks on the device, five from the host, and more to compute than fits into the step."""
    whole = prompts.make(630, 600)
    ask = Ask(whole)
    want = expect([ask])
    engine.call(scenarios.run, [Ask(whole[:230], 1)])
    engine.call(scenarios.run_again, [Ask(whole[:70], 1)])
    engine.call(lazy_loads.watch)
    both = engine.call(scenarios.run, [ask])
    assert both.tokens == want()
    assert (both.device_hits, both.external_hits, both.onboarded) == (64, 160, 5)
    seen = engine.call(lazy_loads.watched)
    assert (seen["in step"], seen["layers on time"], seen["layers at the end"]) == (1, LAYERS, 0)
    # What was computed behind the load, in its step and later, is stored and is right.
    again = engine.call(scenarios.run_again, [ask])
    assert again.onboarded == 18
    assert again.tokens == want()
    assert at_rest(again)


def test_next_turns(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    """A conversation with nobody else there: each turn is loaded inside its first step."""
    prompt, more = prompts.make(640, 100), prompts.encode(" And what did Anna do on the next day?")
    engine.call(lazy_loads.watch)
    for turn in range(3):
        ask = Ask(prompt, 36)
        want = expect([ask])
        ran = engine.call(scenarios.run_again, [ask])
        assert ran.tokens == want(), turn
        assert at_rest(ran)
        prompt += tuple(ran.tokens[0]) + more
    seen = engine.call(lazy_loads.watched)
    assert (seen["in step"], seen["waiting"]) == (2, 0)
    assert seen["blocks in step"] >= 4 + 5


def test_forward_pass_that_announces_no_layer(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    """As one CUDA graph: the forward pass is ordered behind the load as a whole."""
    asks = [Ask(prompt) for prompt in prompts.batch(645, [140, 200])]
    want = expect(asks)
    engine.call(scenarios.run, asks)
    engine.call(lazy_loads.as_one_graph)
    engine.call(lazy_loads.watch)
    ran = [engine.call(scenarios.run_again, [ask]) for ask in asks]
    seen = engine.call(lazy_loads.watched)
    assert [each.tokens[0] for each in ran] == want()
    assert (seen["in step"], seen["layers on time"], seen["layers at the end"]) == (2, 0, 2 * LAYERS)


def test_request_that_ends_before_its_load_is_over(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt, 1) for prompt in prompts.batch(650, [140, 140])]
    want = expect(asks)
    engine.call(scenarios.run, asks)
    engine.call(lazy_loads.break_loads, {"never_over": True})
    assert engine.call(scenarios.reset)
    engine.call(lazy_loads.watch)
    first = engine.call(scenarios.run, asks[:1], False)
    assert first.after.has_work
    assert first.after.pins > 0
    assert (first.after.unfinished, first.onboarded) == (0, 0)
    second = engine.call(scenarios.run, asks[1:], False)
    assert [first.tokens[0], second.tokens[0]] == want()
    engine.call(lazy_loads.mend)
    engine.call(scenarios.drain)
    end = engine.call(scenarios.run_again, asks)
    assert end.before.onboarded == first.before.onboarded + 8
    assert end.before.pins == 0
    assert end.tokens == want()
    assert at_rest(end)


def test_abort_before_the_load_is_over(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    ask = Ask(prompts.make(655, 140), 20)
    want = expect([ask])
    engine.call(scenarios.run, [ask])
    engine.call(lazy_loads.break_loads, {"never_over": True})
    assert engine.call(scenarios.reset)
    engine.call(lazy_loads.watch)
    after = engine.call(scenarios.abort_after_steps, ask, 2)
    assert (after.unfinished, after.has_work) == (0, True)
    assert after.pins > 0
    assert engine.call(lazy_loads.watched)["in step"] == 1
    engine.call(lazy_loads.mend)
    engine.call(scenarios.drain)
    again = engine.call(scenarios.run_again, [ask])
    assert again.before.pins == 0
    assert again.tokens == want()
    assert at_rest(again)


def test_60_requests_with_aborts(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    pool = [
        Ask(prompt, 2 + index % 5)
        for index, prompt in enumerate(prompts.batch(700, [40 + 17 * i for i in range(12)]))
    ]
    asks = [pool[(index * 7) % len(pool)] for index in range(60)]
    want = expect(asks)
    engine.call(scenarios.run, pool)
    assert engine.call(scenarios.reset)
    engine.call(lazy_loads.watch)
    got = engine.call(scenarios.run_with_aborts, asks, 11, 3)
    seen = engine.call(lazy_loads.watched)
    assert seen["in step"] > 0
    assert seen["waiting"] > 0
    assert len(got["aborted"]) > 0
    expected = want()
    assert {index: expected[index] for index in got["tokens"]} == got["tokens"]
    after = got["after"]
    assert after.free_device_blocks == after.device_blocks
    assert (after.unfinished, after.has_work, after.pins, after.followed) == (0, False, 0, 0)
    assert after.off_reason is None
    again = engine.call(scenarios.run_again, pool)
    assert again.tokens == expect(pool)()


# ---- that these tests can fail


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"skipped_layer": 0}, id="the first layer is not loaded"),
        pytest.param({"skipped_layer": LAYERS // 2}, id="a layer is not loaded"),
        pytest.param({"skipped_layer": LAYERS - 1}, id="the last layer is not loaded"),
        pytest.param({"deaf": True}, id="all layers come after the forward pass"),
    ],
)
def test_rubbish_is_noticed(
    engine: Engine, expect: Expect, prompts: Prompts, fault: dict[str, object]
) -> None:
    ask = Ask(prompts.make(660, 140))
    want = expect([ask])
    engine.call(scenarios.run, [ask])
    if "skipped_layer" in fault:
        fault = {"skipped_layer": engine.call(lazy_loads.layer_names)[fault["skipped_layer"]]}
    engine.call(lazy_loads.break_loads, fault)
    engine.call(lazy_loads.watch)
    wrong = engine.call(scenarios.run_again, [ask])
    seen = engine.call(lazy_loads.watched)
    assert (wrong.onboarded, seen["in step"]) == (4, 1)
    assert wrong.tokens != want()
    assert seen["layers at the end"] == (LAYERS if fault.get("deaf") else 0)


# ---- faults


def test_load_that_can_not_be_started(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    """The engine computes on it already: the bytes are copied at once."""
    head = prompts.make(670, 140)
    ask = Ask(head + prompts.make(671, 100))
    want = expect([ask])
    engine.call(scenarios.run, [Ask(head, 1)])
    engine.call(lazy_loads.break_loads, {"raises_at": {"start"}})
    got = engine.call(scenarios.run_again, [ask])
    engine.call(lazy_loads.mend)
    again = engine.call(scenarios.run_again, [ask])
    assert (got.onboarded, again.onboarded) == (4, 7)
    assert [got.tokens, again.tokens] == [want()] * 2
    assert at_rest(again)


def test_load_that_breaks_at_a_layer(engine: Engine, expect: Expect, prompts: Prompts) -> None:
    """The same in the middle of the forward pass."""
    head = prompts.make(680, 140)
    ask = Ask(head + prompts.make(681, 100))
    want = expect([ask])
    engine.call(scenarios.run, [Ask(head, 1)])
    names = engine.call(lazy_loads.layer_names)
    engine.call(lazy_loads.break_loads, {"raises_at": {names[LAYERS // 2]}})
    got = engine.call(scenarios.run_again, [ask])
    engine.call(lazy_loads.mend)
    again = engine.call(scenarios.run_again, [ask])
    assert (got.onboarded, again.onboarded) == (4, 7)
    assert [got.tokens, again.tokens] == [want()] * 2
    assert at_rest(again)
