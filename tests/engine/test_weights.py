"""Weights that change under a running vLLM, as in reinforcement learning."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine import features, scenarios
from tests.engine.conftest import make_keen
from tests.engine.features import Query
from tests.engine.pair import Pair
from tests.engine.prompts import Prompts


def change_weights(llm: Any, folder: str) -> None:
    """In place, as trainers have vLLM do it."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    executor.driver_worker.worker.model_runner.reload_weights(weights_path=folder)


def name_weights(llm: Any, version: str) -> None:
    scenarios.leader(llm).new_weights(version)


def reset(llm: Any, connector: bool) -> None:
    scenarios.drain(llm)
    assert scenarios.reset(llm, connector=connector)


def change_while_it_runs(llm: Any, prompt: tuple[int, ...], folder: str, version: str) -> None:
    """A request of which the first half is computed with the old weights and the rest with the new ones."""
    from vllm import SamplingParams

    llm.llm_engine.add_request(
        "half",
        {"prompt_token_ids": list(prompt)},
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    )
    for _ in range(3):
        llm.llm_engine.step()
    change_weights(llm, folder)
    name_weights(llm, version)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    reset(llm, connector=False)


@pytest.mark.feature(
    "Weights that change", "by reset_prefix_cache(reset_connector=True) or POST /api/weights"
)
def test_weights_that_change(pair: Pair, keen: Path, tiny: Path, tmp_path: Path, prompts: Prompts) -> None:
    query = Query(prompts.make(7000, 300))
    folders = {1: str(keen)} | {seed: str(make_keen(tiny, tmp_path / str(seed), seed)) for seed in (2, 3)}
    with pair.engines(keen, max_num_batched_tokens=64, max_num_seqs=8):
        answers: dict[int, list[list[int]]] = {}
        for seed, folder in folders.items():
            pair.plain(change_weights, folder)()
            answers[seed] = pair.plain(features.run, [query])().tokens
        assert len({tuple(answer[0]) for answer in answers.values()}) == 3

        def served(seed: int) -> int:
            """Tokens that KVBM serves, on an empty device cache."""
            pair.call(reset, False)
            ran = pair.call(features.run, [query])
            assert ran.tokens == answers[seed]
            return ran.external_hits

        pair.call(name_weights, "seed 1")
        pair.call(features.run, [Query(prompts.make(1, 40))])  # the host tier is ready with the first step
        assert served(1) == 0
        assert served(1) == 288
        # The engine's own reset, as trainers call it.
        pair.call(change_weights, folders[2])
        pair.call(reset, True)
        assert served(2) == 0
        assert served(2) == 288
        # Several versions side by side.
        pair.call(change_weights, folders[1])
        pair.call(name_weights, "seed 1")
        assert served(1) == 0, "the reset has dropped them"
        pair.call(change_while_it_runs, query.prompt, folders[3], "seed 3")
        assert served(3) == 0, "nothing of what was computed with both is stored"
        assert served(3) == 288
        pair.call(change_weights, folders[1])
        pair.call(name_weights, "seed 1")
        assert served(1) == 288
