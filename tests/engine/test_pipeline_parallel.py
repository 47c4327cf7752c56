"""A pipeline of two stages with different numbers of layers, over its real executor and queue of steps."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine import disk_tools as disk
from tests.engine import scenarios
from tests.engine.conftest import Expect
from tests.engine.disk_tools import settings
from tests.engine.harness import Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

OPTIONS: dict[str, Any] = {
    "pipeline_parallel_size": 2,
    "worker_cls": "tests.engine.pipeline_worker.PipelineWorker",
    "num_gpu_blocks_override": 24,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 8,
    "max_model_len": 640,
}
LAYERS = {"VLLM_PP_LAYER_PARTITION": "12,18"}


@pytest.mark.feature("Pipeline parallel")
def test_host_and_disk(model: Path, expect: Expect, prompts: Prompts, tmp_path: Path) -> None:
    """Chunks of a prompt are in both stages at once; some requests are preempted. Disk: after a restart."""
    asks = [Ask(prompt, 24) for prompt in prompts.batch(1700, [70, 130, 200, 333])]
    many = [Ask(prompt, 40) for prompt in prompts.batch(1710, [100, 90, 80, 120, 70, 110, 60, 95])]
    want, want_many = expect(asks), expect(many)
    env = {**settings(tmp_path, host=128), **LAYERS}
    with Engine(model, kvbm={}, env=env, **OPTIONS) as engine:
        cold = engine.call(scenarios.run, asks)
        host = engine.call(scenarios.run_again, asks)
        assert [cold.tokens, host.tokens] == [want()] * 2
        assert host.onboarded == 2 + 4 + 6 + 10
        assert host.external_hits == host.onboarded * 32

        tight = engine.call(scenarios.run_again, many)
        assert tight.tokens == want_many()
        assert tight.after.preemptions > tight.before.preemptions
        assert (tight.after.pins, tight.after.followed, tight.after.off_reason) == (0, 0, None)
        assert tight.after.free_device_blocks == tight.after.device_blocks

        # Served when the last stage has written, too: its reports are kept back.
        late = [Ask(prompts.make(1720, 140), 1)]
        engine.call(scenarios.withhold, 1)
        engine.call(scenarios.run, late, False)
        engine.call(scenarios.step_for, 0.5)
        assert engine.call(scenarios.registered, late[0].prompt) == 0
        assert engine.call(scenarios.deliver) > 0
        engine.call(scenarios.drain)
        assert engine.call(scenarios.registered, late[0].prompt) == 4
        engine.call(disk.store, asks)

    with Engine(model, kvbm={}, env=env, **OPTIONS) as engine:
        first = engine.call(disk.run, asks)
        assert first.tokens == want()
        assert first.onboarded == 2 + 4 + 6 + 10 <= first.disk_after.recovered
