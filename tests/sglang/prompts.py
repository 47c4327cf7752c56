"""Prompts of random tokens, as the model of these tests knows no language; and settings."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.sglang.harness import PAGE

Prompt = tuple[int, ...]
TP2: dict[str, Any] = {"env": {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}, "tp_size": 2}
"""Options of an engine with two ranks."""


def disk(folder: Path, **host: int) -> dict[str, Any]:
    """Settings of KVBM: every page is written. host: settings of the host tier."""
    return {"host": host, "disk": {"num_blocks": 400, "dir": str(folder), "disable_filter": True}}


def prompts(seed: int, *lengths: int) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(100, 40_000, length).tolist()) for length in lengths]


def whole_pages(asks: list[Prompt], page: int = PAGE) -> list[int]:
    """Tokens of each prompt that a cache can have: the last token is always computed."""
    return [(len(ask) - 1) // page * page for ask in asks]
