"""Starting an engine: without settings, with wrong ones, with too large ones."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine import scenarios
from tests.engine.harness import KVBM, Child, Engine, EngineError
from tests.engine.scenarios import Ask


def test_unset(tiny: Path) -> None:
    """Without a size the engine runs as it does without KVBM, and the log says how to change that."""
    ask = Ask(tuple(range(1000, 1100)), 4)
    with Engine(tiny, kvbm={}, load_format="dummy") as engine:
        first = engine.call(scenarios.run, [ask])
        second = engine.call(scenarios.run_again, [ask])
        log = engine.log(100_000)
    assert first.tokens == second.tokens
    assert second.external_hits == 0
    assert second.after.capacity == 0  # no leader
    assert "KVBM is off" in log
    assert "DYN_KVBM_CPU_CACHE_GB" in log


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()


def start(child: Child, tiny: Path, env: dict[str, str], extra: dict[str, object]) -> str:
    options = {
        "dtype": "float32",
        "load_format": "dummy",
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 512,
        "num_gpu_blocks_override": 64,
        "kv_transfer_config": {**KVBM, "kv_connector_extra_config": extra},
    }
    return child.call(scenarios.try_start, str(tiny), env, options)


@pytest.mark.parametrize(
    ("env", "extra", "named"),
    [
        ({"DYN_KVBM_CPU_CACHE_GB": "lots"}, {}, "host.cache_gb"),
        ({}, {"host": {"cache_gb": 1, "sise": 3}}, "host.sise"),
        ({"DYN_KVBM_CPU_CASHE_GB": "1"}, {}, "DYN_KVBM_CPU_CASHE_GB"),
    ],
)
def test_wrong_setting(
    child: Child, tiny: Path, env: dict[str, str], extra: dict[str, object], named: str
) -> None:
    error = start(child, tiny, env, extra)
    assert error.startswith("kvbm.errors.ConfigError")
    assert named in error


def test_larger_than_the_machine(child: Child, tiny: Path) -> None:
    error = start(child, tiny, {"DYN_KVBM_CPU_CACHE_GB": "1e6"}, {})
    assert error.startswith("kvbm.errors.CapacityError")
    assert "DYN_KVBM_CPU_CACHE_GB" in error
    assert "available" in error


def test_smaller_than_a_block(child: Child, tiny: Path) -> None:
    error = start(child, tiny, {"DYN_KVBM_CPU_CACHE_GB": "1e-6"}, {})
    assert error.startswith("kvbm.errors.CapacityError")
    assert "less than one block" in error


def test_an_engine_that_does_not_start_says_why(tiny: Path) -> None:
    """The harness itself: the error of a child reaches the test."""
    with Engine(tiny, kvbm={"host.cache_gb": "lots"}, load_format="dummy") as engine:
        with pytest.raises(EngineError, match=r"ConfigError.*\n.*host\.cache_gb"):
            engine.wait_ready()
