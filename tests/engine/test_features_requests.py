"""Every kind of request on one engine: served, or counted with the reason why not; equal answers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.engine import features
from tests.engine.features import Query
from tests.engine.harness import BLOCK_SIZE
from tests.engine.pair import Pair
from tests.engine.prompts import Prompts


@pytest.fixture(scope="module")
def engines(pair: Pair, keen: Path) -> Iterator[Pair]:
    with pair.engines(keen, enable_prompt_embeds=True) as engines:
        yield engines


def refusals(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {reason: n - before.get(reason, 0) for reason, n in after.items() if n != before.get(reason, 0)}


@pytest.mark.feature("Structured output")
def test_structured_output(engines: Pair, prompts: Prompts) -> None:
    queries = [
        Query(prompt, {"structured_outputs": {"regex": "(yes|no|maybe){30}"}, "max_tokens": 40})
        for prompt in prompts.batch(800, [70, 140])
    ]
    cold, host = engines.serves(queries)
    assert [cached // BLOCK_SIZE for cached in host.cached] == [2, 4]
    assert cold.tokens[0] != cold.tokens[1]


@pytest.mark.feature("Several samples of a prompt (n > 1)")
def test_several_samples(engines: Pair, prompts: Prompts) -> None:
    prompt = prompts.make(810, 140)
    cold, host = engines.serves([Query(prompt, {"n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 40})])
    samples = [cold.tokens[0][start : start + 40] for start in (0, 40, 80)]
    assert len({tuple(sample) for sample in samples}) == 3
    # Prompt and the whole blocks of each reply are there for the next turn.
    next_turn = [Query((*prompt, *sample, 5, 6, 7)) for sample in samples]
    _, host = engines.serves(next_turn)
    assert [cached // BLOCK_SIZE for cached in host.cached] == [(140 + 39) // BLOCK_SIZE] * 3


@pytest.mark.feature("Beam search")
def test_beam_search(engines: Pair, prompts: Prompts) -> None:
    prompt = prompts.make(820, 140)
    want = engines.plain(features.beam_search, prompt)
    cold = engines.call(features.beam_search, prompt)
    host = engines.call(features.again, features.beam_search, prompt)
    assert cold.tokens == host.tokens == want().tokens
    assert len({tuple(beam) for beam in cold.tokens}) == 3
    assert host.onboarded >= 4  # and what the beams share beyond the prompt


@pytest.mark.feature("Prompt logprobs", refused="vLLM reads no cache for them; what they compute is stored")
def test_prompt_logprobs(engines: Pair, prompts: Prompts) -> None:
    prompt = prompts.make(830, 140)
    want = engines.plain(features.prompt_logprobs, prompt)
    ran, values = engines.call(features.prompt_logprobs, prompt)
    repeated, _ = engines.call(features.prompt_logprobs, prompt)
    plain, plain_values = want()
    assert ran.tokens == repeated.tokens == plain.tokens
    assert np.allclose(values, plain_values, atol=1e-4)
    assert (ran.cached, repeated.cached, repeated.onboarded) == ([0], [0], 0)
    _, host = engines.serves([Query(prompt)])
    assert host.cached == [4 * BLOCK_SIZE]


@pytest.mark.feature("Prompt embeddings", refused="prompt embeddings")
def test_prompt_embeddings(engines: Pair) -> None:
    """Their token ids are all 0: two of them must not be taken for each other."""
    rng = np.random.default_rng(0)
    queries = [
        Query(embeddings=rng.standard_normal((length, 128)).astype(np.float32)) for length in (140, 140, 70)
    ]
    want = engines.plain(features.run, queries)
    cold = engines.call(features.run, queries)
    second = engines.call(features.again, features.run, queries)
    assert cold.tokens == second.tokens == want().tokens
    assert len({tuple(tokens) for tokens in cold.tokens}) == 3
    assert second.onboarded == second.external_hits == second.after.offloaded - second.before.offloaded == 0
    assert refusals(cold.before.not_cached, second.after.not_cached) == {"prompt embeddings": 6}


@pytest.mark.feature("Streaming input (resumable requests)", refused="streaming input")
def test_streaming_input(engines: Pair, prompts: Prompts) -> None:
    """vLLM drops the last token of an answer when the next piece of the prompt arrives."""
    pieces = [prompts.make(840, 140), prompts.make(841, 40), prompts.make(842, 70)]
    want = engines.plain(features.stream_input, pieces, 6)
    ran = engines.call(features.stream_input, pieces, 6)
    assert len(ran.tokens[0]) == 18
    assert ran.tokens == want().tokens
    assert ran.onboarded == ran.after.offloaded - ran.before.offloaded == 0
    assert refusals(ran.before.not_cached, ran.after.not_cached) == {"streaming input": 1}
    assert (ran.after.followed, ran.after.pins) == (0, 0)
