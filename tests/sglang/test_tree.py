"""KVBM behind SGLang's own tree, controller, host pools and threads: bytes, tiers, and what goes wrong."""

from pathlib import Path
from typing import Any

import pytest

from tests.sglang.tree import Pool, Tree, leading, tokens

POOLS = [
    Pool(layout, io, zero_copy)
    for layout, io in (
        ("page_first", "kernel"),
        ("layer_first", "kernel"),
        ("page_first_direct", "direct"),
        ("layer_first", "direct"),
    )
    for zero_copy in (False, True)
]
HOST = {"host": {"num_blocks": 64}}
A, B, C = (tokens(first, 10) for first in (1, 1001, 2001))


def disk(folder: Path, **host: Any) -> dict[str, Any]:
    return {"host": host, "disk": {"cache_gb": 0.01, "dir": str(folder), "disable_filter": True}}


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_host_memory_gives_back_what_was_stored(pool: Pool) -> None:
    with Tree(HOST, pool) as tree:
        a, b = tree.store(A), tree.store(B)
        tree.forget()
        assert leading(tree.load(B), b) == 10
        assert leading(tree.load(A + C), a) == 10
        assert leading(tree.load(C), a) == 0
        assert tree.backend.stats().onboarded == 20
