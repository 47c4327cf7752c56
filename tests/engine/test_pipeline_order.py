"""Pipelines with their steps, ranks and copies in random order: see `simulated_pipeline`."""

import json
from pathlib import Path

import numpy as np
import pytest

from kvbm.logic.operations import Direction, Failure
from tests.engine.conftest import TINY
from tests.engine.simulated_pipeline import VOCABULARY, Pipeline

REQUESTS = 80


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers: vLLM gives the stages different numbers of them."""
    folder = tmp_path_factory.mktemp("five")
    (folder / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 5}))
    return folder


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("stages", "shards"), [(2, 1), (2, 2), (3, 1)])
def test_no_rank_ever_reads_what_is_not_there(
    model: Path, monkeypatch: pytest.MonkeyPatch, stages: int, shards: int, asynchronous: bool
) -> None:
    """Each rank looks, before it computes, whether the KV of earlier tokens is there. Some loads fail."""
    seed = 10 * stages + shards
    pipeline = Pipeline(model, seed, monkeypatch, stages=stages, shards=shards, asynchronous=asynchronous)
    chance, leader = pipeline.chance, pipeline.leader
    heads = [[chance.randrange(VOCABULARY) for _ in range(24)] for _ in range(3)]
    asked = 0
    while asked < REQUESTS or pipeline.unfinished:
        event = chance.random()
        if asked < REQUESTS and event < 0.05 and len(pipeline.scheduler.requests) < 6:
            prompt = chance.choice(heads)[: chance.randrange(8, 25)]
            if pipeline.finished and event < 0.02:  # the next turn
                prompt = pipeline.finished[-1][:56]
            prompt = prompt + [chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, 6))]
            pipeline.ask(f"r{asked}", prompt, chance.randrange(1, 20))
            asked += 1
        elif event > 0.995:
            pipeline.abort()
        elif event > 0.97:
            pipeline.scheduler.reset_prefix_cache()  # refused while anything runs
        pipeline.move()
        if asked == REQUESTS and not pipeline.unfinished and leader._planner._in_flight:
            pipeline.ask("last", [1, 2, 3], 1)  # what was given up is reported with a later step
    assert leader.off_reason is None
    pool = pipeline.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert leader.pool.pins(np.arange(leader.pool.capacity)).sum() == 0
    assert not leader._planner._requests
    # All that could have gone wrong has happened.
    counts = pipeline.counts
    assert min(counts.values()) > 0, counts
    assert counts["behind"] >= pipeline.depth - 1
    assert leader.stats.onboarded_blocks > 50
    assert leader.stats.failures[Direction.ONBOARD, Failure.ERROR] > 0
    assert leader.pool.evictions > 0
    assert all(rank.loads_in_step for rank in pipeline.ranks)
    assert len({rank.record_bytes for rank in pipeline.ranks}) == 2
    pipeline.close()
