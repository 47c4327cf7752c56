"""Two ranks on two GPUs: heads of their own, and MLA, where both use one host tier. See test_vllm.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import scenarios
from tests.engine.latent_model import CONFIG
from tests.engine.scenarios import Ask
from tests.gpu.pair import Pair, full, prompt, write_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600), pytest.mark.usefixtures("two_gpus")]


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    config = {**CONFIG, "vocab_size": 128256, "max_position_embeddings": 32768, "torch_dtype": "bfloat16"}
    return write_model(folder, config)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("heads", marks=pytest.mark.feature("Tensor parallel")),
        pytest.param("latent", marks=pytest.mark.feature("MLA: one copy for all tensor-parallel ranks")),
    ],
)
def pair(request: pytest.FixtureRequest, shallow: Path, latent: Path) -> Iterator[Pair]:
    pair = Pair(shallow if request.param == "heads" else latent, "eager", {}, tensor_parallel_size=2)
    yield pair
    pair.close()


def test_from_the_host(pair: Pair) -> None:
    asks = [Ask(prompt(2000 + i, 200 + 333 * i), 24) for i in range(6)]
    cold = pair.engine.call(scenarios.run, asks)
    host = pair.engine.call(scenarios.run_again, asks)
    assert host.onboarded == full(asks)
    assert [cold.tokens, host.tokens] == [pair.right(asks)] * 2
    assert (host.after.off_reason, host.after.failures) == (None, {})
    assert (host.after.pins, host.after.followed) == (0, 0)


def test_inside_the_step(pair: Pair) -> None:
    """The engine has nothing else to do: each rank orders its own copy before the forward pass."""
    for seed, tokens in enumerate([100, 4096, 16001]):
        asks = [Ask(prompt(2100 + seed, tokens), 24)]
        pair.engine.call(scenarios.run, asks)
        host = pair.engine.call(scenarios.run_again, asks)
        assert host.onboarded == full(asks)
        assert host.tokens == pair.right(asks)


def test_preemption(pair: Pair) -> None:
    """Offloads are cancelled on the rank that stores while the others have long answered."""
    asks = [Ask(prompt(2200 + i, 400 + 13 * i), 150) for i in range(40)]
    ran = pair.engine.call(scenarios.run_again, asks)
    assert ran.after.preemptions > ran.before.preemptions
    assert ran.tokens == pair.right(asks)
    again = pair.engine.call(scenarios.run_again, asks)
    assert again.onboarded > 0
    assert again.tokens == pair.right(asks)
    assert (again.after.pins, again.after.followed) == (0, 0)
