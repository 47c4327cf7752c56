"""A pipeline of two stages on two GPUs, of five and four layers. See test_vllm.py and test_tp2.py.

pytest -m gpu tests/gpu/test_tp2.py tests/gpu/test_pp2.py
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import disk_tools as disk
from tests.engine import scenarios
from tests.engine.disk_tools import settings
from tests.engine.scenarios import Ask
from tests.gpu.pair import Pair, full, prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("two_gpus"),
    pytest.mark.feature("Pipeline parallel"),
]


@pytest.fixture(scope="module")
def pair(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    env = settings(tmp_path_factory.mktemp("disk"), host=None, disk=8192)
    pair = Pair(shallow, "eager", env, pipeline_parallel_size=2)
    yield pair
    pair.close()


def test_from_the_host(pair: Pair) -> None:
    asks = [Ask(prompt(3000 + i, 200 + 333 * i), 24) for i in range(6)]
    cold = pair.engine.call(scenarios.run, asks)
    host = pair.engine.call(scenarios.run_again, asks)
    assert host.onboarded == full(asks)
    assert [cold.tokens, host.tokens] == [pair.right(asks)] * 2
    assert (host.after.off_reason, host.after.failures) == (None, {})
    assert (host.after.pins, host.after.followed) == (0, 0)


def test_inside_the_step(pair: Pair) -> None:
    """The engine has nothing else to do: each stage orders its own copy before its forward pass."""
    for seed, tokens in enumerate([100, 4096, 16001]):
        asks = [Ask(prompt(3100 + seed, tokens), 24)]
        pair.engine.call(scenarios.run, asks)
        host = pair.engine.call(scenarios.run_again, asks)
        assert host.onboarded == full(asks)
        assert host.tokens == pair.right(asks)


def test_preemption(pair: Pair) -> None:
    """Offloads are cancelled in the first stage while the last is still at an earlier step."""
    asks = [Ask(prompt(3200 + i, 400 + 13 * i), 150) for i in range(40)]
    ran = pair.engine.call(scenarios.run_again, asks)
    assert ran.after.preemptions > ran.before.preemptions
    assert ran.tokens == pair.right(asks)
    again = pair.engine.call(scenarios.run_again, asks)
    assert again.onboarded > 0
    assert again.tokens == pair.right(asks)
    assert (again.after.pins, again.after.followed) == (0, 0)


def test_after_a_restart(pair: Pair) -> None:
    asks = [Ask(prompt(3300 + i, 200 + 333 * i), 24) for i in range(4)]
    pair.engine.call(disk.store, asks)
    pair.restart()
    first = pair.engine.call(disk.run, asks)  # they wait for what is found
    assert first.tokens == pair.right(asks)
    assert first.onboarded == full(asks) <= first.disk_after.recovered
