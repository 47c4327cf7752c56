"""Cases that need engines of their own: two pairs do not fit on one GPU. See test_vllm.py."""

from pathlib import Path

import pytest

from tests.engine import scenarios
from tests.engine.scenarios import Ask
from tests.gpu import gpu_scenarios
from tests.gpu.pair import Pair, full, prompt

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


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
