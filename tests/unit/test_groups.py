"""Which prefixes can be restored, and what that takes, against the definition spelled out block by block."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm.logic.groups import FULL, NOT_TO_BE_HAD, KvGroup, KvGroups

_kinds = st.one_of(st.just(FULL), st.integers(1, 4).map(lambda window: KvGroup(window=window)))


@st.composite
def _situations(draw: st.DrawFn) -> tuple[KvGroups, list[list[bool]], list[list[bool]]]:
    groups = KvGroups(tuple(draw(st.lists(_kinds, min_size=1, max_size=4))))
    blocks = draw(st.integers(0, 12))
    mask = st.lists(st.booleans(), min_size=blocks, max_size=blocks)
    often = st.lists(st.sampled_from([True, True, True, False]), min_size=blocks, max_size=blocks)
    masks = [(draw(often), draw(mask)) for _ in groups]
    there = [have for have, _ in masks]
    marked = [[a and b for a, b in zip(have, far, strict=True)] for have, far in masks]
    return groups, there, marked


def needs(group: KvGroup, length: int) -> range:
    """The blocks that the group needs of a prefix: the definition."""
    return range(length) if group.window is None else range(max(0, length - group.window), length)


def arrays(masks: list[list[bool]]) -> list[np.ndarray]:
    return [np.array(mask, bool) for mask in masks]


@given(_situations())
def test_what_can_be_restored(situation: tuple[KvGroups, list[list[bool]], list[list[bool]]]) -> None:
    groups, there, marked = situation
    lengths = range(1, len(there[0]) + 1)
    can = [
        all(have[block] for group, have in zip(groups, there, strict=True) for block in needs(group, length))
        for length in lengths
    ]
    assert groups.restorable(arrays(there)).tolist() == can
    assert groups.longest(arrays(there)) == max(
        (n for n, ok in zip(lengths, can, strict=True) if ok), default=0
    )
    reads = [
        sum(far[block] for group, far in zip(groups, marked, strict=True) for block in needs(group, length))
        if ok
        else NOT_TO_BE_HAD
        for length, ok in zip(lengths, can, strict=True)
    ]
    assert groups.cost(arrays(marked), arrays(there)).tolist() == reads


@given(_situations())
def test_what_a_prefix_needs(situation: tuple[KvGroups, list[list[bool]], list[list[bool]]]) -> None:
    groups, _, marked = situation
    count = len(marked[0])
    assert groups.needed(count) == [needs(group, count).start for group in groups]
    wanted = [far[block] for group, far in zip(groups, marked, strict=True) for block in needs(group, count)]
    by_block = [
        any(far[block] and block in needs(group, count) for group, far in zip(groups, marked, strict=True))
        for block in range(count)
    ]
    assert groups.by_block(count, np.array(wanted, bool)).tolist() == by_block


def test_keys_of_groups_differ_and_those_of_the_first_are_the_hashes() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, (50, 2), np.uint64)
    keys = [KvGroups.keys(hashes, group) for group in range(20)]
    assert (keys[0] == hashes).all()
    assert len({key.tobytes() for group in keys for key in group}) == 20 * 50


@pytest.mark.parametrize(
    ("groups", "single"), [((FULL,), True), ((FULL, FULL), False), ((KvGroup(window=1),), False)]
)
def test_single(groups: tuple[KvGroup, ...], single: bool) -> None:
    assert KvGroups(groups).single == single
