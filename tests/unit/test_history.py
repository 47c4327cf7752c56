"""What became of blocks: found as long as it is among the last, the newest first."""

import random

import numpy as np
import pytest

from kvbm.logic.edges import BOUNDS, Edge
from kvbm.logic.hashing import Hashes
from kvbm.logic.history import BlockHistory, Entry, Fate

ALL: Hashes = np.random.default_rng(5).integers(0, 2**64, (1000, 2), np.uint64)


def word(number: int) -> int:
    return int(ALL[number, 0])


def test_nothing_is_known_of_a_block_that_was_never_told() -> None:
    history = BlockHistory(8)
    assert history.find(word(0)) == []
    assert history.find(0) == []  # the word that fills an empty ring
    history.add(ALL[:3], "host", Fate.EVICTED, 1.0)
    assert history.find(word(3)) == []


def test_the_newest_comes_first() -> None:
    history = BlockHistory(100)
    history.add(ALL[:4], "disk", Fate.NOT_ADMITTED, 1.0)
    history.add(ALL[2:3], "host", Fate.EVICTED, 2.5, wanted=7)
    history.add(ALL[1:4], "disk", Fate.CLEARED, 3.0)
    assert history.find(word(2)) == [
        Entry("disk", Fate.CLEARED, 3.0, 0),
        Entry("host", Fate.EVICTED, 2.5, 7),
        Entry("disk", Fate.NOT_ADMITTED, 1.0, 0),
    ]
    assert history.find(word(0)) == [Entry("disk", Fate.NOT_ADMITTED, 1.0, 0)]


def test_of_equal_times_the_last_told_comes_first() -> None:
    """A read that finds a damaged record: first the host's block is given up, then the disk's."""
    history = BlockHistory(4)
    history.add(ALL[8:11], "host", Fate.CLEARED, 1.0)  # so that what follows lies around the end of the ring
    history.add(ALL[:1], "host", Fate.LOST, 2.0)
    history.add(ALL[:1], "disk", Fate.DAMAGED, 2.0)
    assert [entry.fate for entry in history.find(word(0))] == [Fate.DAMAGED, Fate.LOST]


def test_more_at_once_than_are_remembered() -> None:
    history = BlockHistory(8)
    history.add(ALL[:20], "host", Fate.EVICTED, 1.0, wanted=20)
    assert [bool(history.find(word(i))) for i in range(20)] == [False] * 12 + [True] * 8
    history.add(ALL[:0], "host", Fate.EVICTED, 2.0)
    assert [bool(history.find(word(i))) for i in range(20)] == [False] * 12 + [True] * 8


@pytest.mark.parametrize("capacity", [1, 2, 7, 64])
def test_as_a_list_of_the_last(capacity: int) -> None:
    rng = random.Random(capacity)
    history, told = BlockHistory(capacity), []
    for now in range(200):
        first, count = rng.randrange(20), rng.randrange(10)
        tier, fate, wanted = rng.choice(["host", "disk"]), rng.choice(list(Fate)), rng.randrange(1 << 20)
        history.add(ALL[first : first + count], tier, fate, float(now), wanted)
        told += [(i, Entry(tier, fate, float(now), wanted)) for i in range(first, first + count)]
        told = told[-capacity:]
        for i in range(30):
            assert history.find(word(i)) == [entry for number, entry in reversed(told) if number == i]


def test_an_edge_counts_in_buckets() -> None:
    edge = Edge()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] * 1.01, BOUNDS[-1], BOUNDS[-1] + 1):
        edge.done(3, 1, seconds)
    assert (edge.operations, edge.blocks, edge.failed) == (5, 15, 5)
    assert edge.seconds == pytest.approx(BOUNDS[0] * 2.01 + 2 * BOUNDS[-1] + 1)
    assert edge.buckets == [2, 1] + [0] * (len(BOUNDS) - 3) + [1, 1]
    assert len(edge.buckets) == len(BOUNDS) + 1
