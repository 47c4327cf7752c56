"""Prompts of random tokens: the model of these tests knows no language."""

import numpy as np

from tests.sglang.harness import PAGE

Prompt = tuple[int, ...]


def prompts(seed: int, *lengths: int) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(100, 40_000, length).tolist()) for length in lengths]


def whole_pages(asks: list[Prompt]) -> list[int]:
    """Tokens of each prompt that a cache can have: the last token is always computed."""
    return [(len(ask) - 1) // PAGE * PAGE for ask in asks]
