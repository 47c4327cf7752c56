"""Whether blocks are read or computed again: what the estimate answers, and what it learns from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.logic.estimate import LoadEstimate, Rate

BLOCK = 16
MARGIN = LoadEstimate.MARGIN


def estimate(reading: float | None = None, computing: float | None = None) -> LoadEstimate:
    """Rates in blocks per second, both."""
    result = LoadEstimate(BLOCK)
    if reading is not None:
        result.read(1000, 1000 / reading, 0.0)
    if computing is not None:
        result.computed(1000 * BLOCK, 1000 / computing)
    return result


def blocks(pattern: str) -> np.ndarray:
    """d: on disk, h: in the host tier. How many must be read for each prefix."""
    return np.cumsum([letter == "d" for letter in pattern], dtype=np.int64)


# ---- rates ----


def test_rate() -> None:
    rate = Rate()
    assert rate.value is None
    rate.sample(100, 2.0)
    assert rate.value == pytest.approx(50)
    rate.sample(100, 2.0)
    assert rate.value == pytest.approx(50)


def test_an_old_sample_counts_a_tenth_less_with_each_that_follows() -> None:
    rate = Rate()
    rate.sample(100, 1.0)
    rate.sample(0, 1.0)
    assert rate.value == pytest.approx(0.9 * 100 / 1.9)
    for _ in range(200):
        rate.sample(10, 1.0)
    assert rate.value == pytest.approx(10)


def test_large_samples_say_more() -> None:
    rate = Rate()
    rate.sample(1000, 1.0)
    rate.sample(1, 0.5)
    assert rate.value == pytest.approx(901 / 1.4)


# ---- what is read ----


@pytest.mark.parametrize(
    ("reading", "computing"), [(None, None), (1e-9, None), (None, 1e9)], ids=["none", "reading", "computing"]
)
@pytest.mark.parametrize("pattern", ["", "d", "hhdd", "dhdh", "hhh"])
def test_nothing_is_declined_while_a_rate_is_unknown(
    reading: float | None, computing: float | None, pattern: str
) -> None:
    assert estimate(reading, computing).paying(blocks(pattern), 1000, 0.0) == len(pattern)


def test_a_tier_that_was_never_read_is_tried_with_a_few_blocks() -> None:
    few = LoadEstimate.FIRST_BLOCKS
    unread = estimate(computing=100)
    assert unread.paying(blocks("d" * (few + 1)), 0, 0.0) == few
    assert unread.paying(blocks("h" + "d" * (few - 1) + "h"), 0, 0.0) == few + 1
    assert unread.paying(blocks("hh" + "d" * 1000), 0, 0.0) == 2 + few
    unread.read(few, few / 1000, 1.0)
    assert unread.paying(blocks("hh" + "d" * 1000), 0, 1.0) == 1002


@pytest.mark.parametrize("pattern", ["d", "hhdd", "dhdh", "d" * 100])
def test_all_is_read_where_reading_is_faster(pattern: str) -> None:
    assert estimate(reading=1000, computing=100).paying(blocks(pattern), 0, 0.0) == len(pattern)


@pytest.mark.parametrize(("pattern", "kept"), [("d", 0), ("dd", 0), ("hhdd", 2), ("ddd", 0), ("hd", 1)])
def test_nothing_is_read_where_computing_is_faster(pattern: str, kept: int) -> None:
    """What lies in the host tier ahead of the first block on disk is had for nothing."""
    assert estimate(reading=100, computing=1000).paying(blocks(pattern), 0, 0.0) == kept


def test_what_lies_all_in_the_host_tier_is_loaded() -> None:
    assert estimate(reading=100, computing=1000).paying(blocks("hhhh"), 1000, 0.0) == 4
    assert estimate(reading=100, computing=1000).paying(blocks(""), 0, 0.0) == 0


def test_host_blocks_behind_disk_blocks_may_pay_for_them() -> None:
    # A block read costs as much as 3.3 computed.
    slow = estimate(reading=100, computing=300)
    assert slow.paying(blocks("dhhh"), 0, 0.0) == 4
    assert slow.paying(blocks("dhh"), 0, 0.0) == 0
    assert slow.paying(blocks("dhhhddd"), 0, 0.0) == 4
    assert slow.paying(blocks("ddhhhhhh"), 0, 0.0) == 8
    assert slow.paying(blocks("hddhhhh"), 0, 0.0) == 1


def test_the_margin() -> None:
    reading = 1000.0
    assert estimate(reading, reading / (MARGIN * 1.01)).paying(blocks("dd"), 0, 0.0) == 2
    assert estimate(reading, reading / (MARGIN * 0.99)).paying(blocks("dd"), 0, 0.0) == 0


def test_the_queue_counts() -> None:
    """Blocks ahead in the queue delay all of these: a long load pays where a short one does not."""
    fast = estimate(reading=1000, computing=1000 / (2 * MARGIN))  # a block read saves as much as it takes
    assert fast.paying(blocks("d" * 10), 0, 0.0) == 10
    assert fast.paying(blocks("d" * 10), 9, 0.0) == 10
    assert fast.paying(blocks("d" * 10), 11, 0.0) == 0
    assert fast.paying(blocks("d" * 20), 11, 0.0) == 20
    assert fast.paying(blocks("h" + "d" * 10), 11, 0.0) == 1


def test_the_block_size_counts() -> None:
    for block_size, paid in ((16, 0), (64, 2)):
        result = LoadEstimate(block_size)
        result.read(1000, 1.0, 0.0)
        result.computed(32_000, 1.0)
        assert result.paying(blocks("dd"), 0, 0.0) == paid


@given(
    pattern=st.lists(st.booleans(), min_size=1, max_size=30),
    reading=st.floats(1, 1e5),
    computing=st.floats(1, 1e5),
    queued=st.integers(0, 40),
)
@settings(max_examples=500, deadline=None)
def test_the_best_prefix(pattern: list[bool], reading: float, computing: float, queued: int) -> None:
    """Against all prefixes, each reckoned by itself."""
    end = estimate(reading, computing).paying(np.cumsum(pattern, dtype=np.int64), queued, 0.0)
    head = pattern.index(True) if any(pattern) else len(pattern)

    def saved_s(length: int) -> float:
        """By loading so many blocks, beside those of the head, which are there."""
        reads = sum(pattern[:length])
        return (length - head) / computing - (reads + queued) * MARGIN / reading if reads else 0.0

    assert head <= end <= len(pattern)
    best = max(saved_s(length) for length in range(head, len(pattern) + 1))
    assert saved_s(end) == pytest.approx(best, rel=1e-6, abs=1e-9)
    if best == 0.0:
        assert end == head


# ---- what it learns ----


def test_it_changes_its_mind() -> None:
    result = estimate(reading=1000, computing=100)
    assert result.paying(blocks("dddd"), 0, 0.0) == 4
    for _ in range(100):
        result.read(32, 32.0, 0.0)
    assert result.paying(blocks("dddd"), 0, 0.0) == 0
    for _ in range(200):
        result.computed(BLOCK * 32, 3200.0)
    assert result.paying(blocks("dddd"), 0, 0.0) == 4


def test_after_a_while_a_small_load_is_tried() -> None:
    retry_s, retry_blocks = LoadEstimate.RETRY_S, LoadEstimate.RETRY_BLOCKS
    slow = estimate(computing=1000)
    slow.read(1000, 10.0, now=50.0)
    many = blocks("hh" + "d" * 100)
    assert slow.paying(many, 0, 50.0 + retry_s) == 2
    assert slow.paying(many, 0, 50.1 + retry_s) == 2 + retry_blocks
    assert slow.paying(blocks("hhdd"), 0, 50.1 + retry_s) == 4
    slow.read(retry_blocks, 1.0, now=51.0 + retry_s)
    assert slow.paying(many, 0, 52.0 + retry_s) == 2
    fast = estimate(computing=10)
    fast.read(1000, 10.0, now=50.0)
    assert fast.paying(many, 0, 50.1 + retry_s) == 102


def test_small_steps_say_nothing() -> None:
    least = LoadEstimate.MIN_TOKENS
    result = estimate(reading=100)
    result.computed(least - 1, 1e-9)
    assert result.paying(blocks("d"), 0, 0.0) == 1
    result.computed(least, 1e-9)
    assert result.paying(blocks("d"), 0, 0.0) == 0


def test_patience() -> None:
    assert LoadEstimate(BLOCK).patience_s(10) == np.inf
    assert estimate(reading=100).patience_s(0) == LoadEstimate.PATIENCE_S
    expected = LoadEstimate.PATIENCE_S + LoadEstimate.PATIENCE * 5.0
    assert estimate(reading=100).patience_s(500) == pytest.approx(expected)


def test_a_tier_that_reads_nothing_is_not_waited_for() -> None:
    result = estimate(computing=100)
    result.read(0, 5.0, 0.0)
    assert result.paying(blocks("hdh"), 0, 0.0) == 1
    assert result.patience_s(3) == np.inf
