"""Records of one number of ranks made of those of another: equal to what that number would have stored."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.storage.split import Part, Share, Split
from kvbm.storage.store import Bytes

HEADS = [1, 2, 3, 4, 6, 8, 12]

splits = st.builds(
    Split,
    st.sampled_from(HEADS),
    st.lists(st.builds(Part, st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=4).map(tuple),
)


def numbers(split: Split) -> list[int]:
    return [ranks for ranks in range(1, 25) if split.allows(ranks)]


def heads_of(split: Split, rank: int, ranks: int) -> slice:
    """As vLLM deals them out: in order, and each to several ranks in a row where ranks outnumber heads."""
    if ranks <= split.heads:
        each = split.heads // ranks
        return slice(rank * each, (rank + 1) * each)
    head = rank // (ranks // split.heads)
    return slice(head, head + 1)


def record(split: Split, seed: int, rank: int, ranks: int) -> Bytes:
    """What a rank stores of the block that `seed` stands for."""
    rng = np.random.default_rng(seed)
    parts = [
        rng.integers(0, 256, (part.rows, split.heads, part.head_bytes), np.uint8) for part in split.parts
    ]
    return np.concatenate([part[:, heads_of(split, rank, ranks)].ravel() for part in parts])


@given(splits, st.data())
def test_a_record_made_of_others_is_the_one_stored(split: Split, data: st.DataObject) -> None:
    ours, theirs = (data.draw(st.sampled_from(numbers(split))) for _ in range(2))
    stored = {rank: record(split, 1, rank, theirs) for rank in range(theirs)}
    for rank in range(ours):
        want = record(split, 1, rank, ours)
        assert len(want) == split.record_bytes(ours)
        shares = split.shares(rank, ours, theirs)
        out = np.full(len(want) + 3, 0xEE, np.uint8)  # an arena pads records
        split.recut(shares, [stored[share.rank] for share in shares], theirs, out, ours)
        assert (out[: len(want)] == want).all()
        assert (out[len(want) :] == 0xEE).all()


@given(splits, st.data())
def test_every_head_comes_once_from_ranks_that_are_read_anyway(split: Split, data: st.DataObject) -> None:
    ours, theirs = (data.draw(st.sampled_from(numbers(split))) for _ in range(2))
    holders = split.holders(theirs)
    assert len(holders) == min(split.heads, theirs)
    for rank in range(ours):
        shares = split.shares(rank, ours, theirs)
        assert {share.rank for share in shares} <= set(holders)
        heads = [share.ours + i for share in shares for i in range(share.heads)]
        assert heads == list(range(split.heads_each(ours)))


@pytest.mark.parametrize(
    ("heads", "allowed"), [(8, {1, 2, 4, 8, 16, 24}), (6, {1, 2, 3, 6, 12, 18, 24}), (1, set(range(1, 25)))]
)
def test_only_even_splits_are_allowed(heads: int, allowed: set[int]) -> None:
    split = Split(heads, (Part(1, 1),))
    assert {ranks for ranks in range(25) if split.allows(ranks)} == allowed


def test_examples() -> None:
    split = Split(8, (Part(1, 1),))
    assert split.shares(1, 2, 1) == [Share(0, theirs=4, ours=0, heads=4)]
    assert split.shares(0, 1, 2) == [Share(0, 0, 0, 4), Share(1, 0, 4, 4)]
    assert split.shares(1, 2, 4) == [Share(2, 0, 0, 2), Share(3, 0, 2, 2)]
    assert split.shares(5, 16, 4) == [Share(1, theirs=0, ours=0, heads=1)]
    assert split.shares(0, 1, 16) == [Share(2 * i, 0, i, 1) for i in range(8)]
    assert list(itertools.chain(split.holders(4), split.holders(16))) == [0, 1, 2, 3, *range(0, 16, 2)]
