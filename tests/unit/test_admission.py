"""What is written to disk: the frequency filter's rule, and the daily budget."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.logic.admission import FrequencyFilter, WriteBudget
from kvbm.logic.hashing import Hashes

ALL_HASHES: Hashes = np.random.default_rng(7).integers(0, 2**64, (100_000, 2), np.uint64)
DECAY_S = 600.0
HOUR_S, DAY_S = 3600.0, 86400.0


def names(*numbers: int) -> Hashes:
    return ALL_HASHES[list(numbers)].reshape(-1, 2)


def see(filter_: FrequencyFilter, *numbers: int) -> list[bool]:
    return filter_.admit(names(*numbers)).tolist()


def seen_before(filter_: FrequencyFilter, *numbers: int) -> list[bool]:
    """Whether the filter remembers these. Sees them, so ask each once."""
    return see(filter_, *numbers)


# ---- frequency ----


def test_admitted_when_seen_again() -> None:
    filter_ = FrequencyFilter(10)
    assert see(filter_, 1, 2) == [False, False]
    assert see(filter_, 2, 3) == [True, False]
    assert see(filter_, 1, 2, 3, 4) == [True, True, True, False]


def test_nothing_seen_nothing_admitted() -> None:
    filter_ = FrequencyFilter(10)
    assert see(filter_) == []
    assert see(filter_, 1) == [False]
    assert see(filter_) == []


@pytest.mark.parametrize("sightings", [1, 2, 3, 4, 5])
def test_it_doubles_and_loses_one_a_step(sightings: int) -> None:
    """Seen n times the frequency is 2^(n-1): after as many steps as that it is forgotten, one before not."""
    frequency = 2 ** (sightings - 1)
    for steps, remembered in ((frequency - 1, True), (frequency, False)):
        filter_ = FrequencyFilter(10)
        filter_.decay(0.0)
        for _ in range(sightings):
            see(filter_, 1)
        for step in range(1, steps + 1):
            filter_.decay(step * DECAY_S)
        assert seen_before(filter_, 1) == [remembered]


def test_what_has_decayed_to_one_is_admitted_when_it_doubles() -> None:
    filter_ = FrequencyFilter(10)
    filter_.decay(0.0)
    see(filter_, 1)
    see(filter_, 1)
    filter_.decay(DECAY_S)  # 1 again
    assert see(filter_, 1) == [True]
    filter_.decay(3 * DECAY_S)  # 0
    assert see(filter_, 1) == [False]


def test_decay_steps_are_counted_from_the_first_call() -> None:
    filter_ = FrequencyFilter(10)
    filter_.decay(1_000_000.0)
    see(filter_, 1)
    filter_.decay(1_000_000.0 + DECAY_S - 1)
    assert seen_before(filter_, 1) == [True]  # 2 now
    filter_.decay(1_000_000.0 + DECAY_S)
    filter_.decay(1_000_000.0 + DECAY_S + 1)
    filter_.decay(1_000_000.0 + 2 * DECAY_S - 1)  # one step, not three
    assert seen_before(filter_, 1) == [True]


def test_remainders_of_steps_are_not_lost() -> None:
    """Asked every 400 s, it decays every 600."""
    filter_ = FrequencyFilter(10)
    filter_.decay(0.0)
    for _ in range(3):
        see(filter_, 1)  # 4
    for now in (400.0, 800.0, 1200.0, 1600.0, 2000.0, 2399.0):
        filter_.decay(now)
    assert seen_before(filter_, 1) == [True]  # 3 steps: 1 was left
    filter_.decay(2400.0)  # 2 - 1
    filter_.decay(3000.0)
    assert seen_before(filter_, 1) == [False]


@pytest.mark.parametrize("steps", [5, 1000, 10**6, 2**21, 2**40])
def test_many_steps_at_once(steps: int) -> None:
    filter_ = FrequencyFilter(4)
    filter_.decay(0.0)
    for _ in range(3):
        see(filter_, 1, 2)
    filter_.decay(steps * DECAY_S)
    assert seen_before(filter_, 1, 2, 3, 4) == [False] * 4
    assert see(filter_, 1, 2, 3, 4) == [True] * 4  # the memory is whole


def test_a_clock_that_goes_back_is_no_decay() -> None:
    filter_ = FrequencyFilter(4)
    filter_.decay(1000 * DECAY_S)
    see(filter_, 1)
    filter_.decay(0.0)
    assert see(filter_, 1) == [True]


def test_a_frequency_does_not_overflow_and_decays_again() -> None:
    filter_ = FrequencyFilter(4)
    filter_.decay(0.0)
    for _ in range(200):  # 2^199 would be far beyond any integer of numpy
        see(filter_, 1)
    assert see(filter_, 1) == [True]
    most = 1 << 20
    filter_.decay((most - 1) * DECAY_S)
    assert see(filter_, 1) == [True]
    filter_.decay((most + 1) * DECAY_S)
    assert see(filter_, 1) == [False]


# ---- memory ----


def test_the_oldest_are_forgotten() -> None:
    filter_ = FrequencyFilter(3)
    for number in (1, 2, 3):
        see(filter_, number)
    assert see(filter_, 1) == [True]  # now 2 is the oldest
    assert see(filter_, 4) == [False]
    assert seen_before(filter_, 1) == [True]
    assert seen_before(filter_, 3) == [True]
    assert seen_before(filter_, 4) == [True]
    assert seen_before(filter_, 2) == [False]


def test_what_is_seen_in_a_call_is_not_forgotten_in_it() -> None:
    filter_ = FrequencyFilter(3)
    see(filter_, 1, 2, 3)
    assert see(filter_, 1, 4, 5) == [True, False, False]
    assert see(filter_, 1, 4, 5) == [True, True, True]


@pytest.mark.parametrize("before", [0, 1, 3])
def test_more_than_it_can_remember_in_one_call(before: int) -> None:
    filter_ = FrequencyFilter(3)
    see(filter_, *range(100, 100 + before))
    assert see(filter_, 1, 2, 3, 4, 5, 6, 7) == [False] * 7
    assert see(filter_, 1, 2, 3, 4, 5, 6, 7) == [True] * 3 + [False] * 4
    assert seen_before(filter_, 100, 101, 102) == [False] * 3


@pytest.mark.parametrize("batch", [1, 7, 100, 3000])
def test_a_scan_admits_nothing(batch: int) -> None:
    """Ten times what it remembers, twice over: what it forgot meanwhile is new again."""
    filter_ = FrequencyFilter(1000)
    numbers = np.arange(10_000)
    for _ in range(2):
        for start in range(0, len(numbers), batch):
            assert not filter_.admit(ALL_HASHES[numbers[start : start + batch]]).any()


class Model:
    """The rule, one block at a time."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.frequencies: dict[int, int] = {}  # those seen last come last

    def admit(self, numbers: list[int]) -> list[bool]:
        numbers, rest = numbers[: self.capacity], numbers[self.capacity :]
        for number in numbers:
            if number in self.frequencies:
                self.frequencies[number] = self.frequencies.pop(number) * 2
        new = [number for number in numbers if number not in self.frequencies]
        while len(self.frequencies) + len(new) > self.capacity:
            self.frequencies.pop(next(iter(self.frequencies)))
        self.frequencies |= dict.fromkeys(new, 1)
        return [self.frequencies[number] >= 2 for number in numbers] + [False] * len(rest)

    def step(self) -> None:
        self.frequencies = {number: f - 1 for number, f in self.frequencies.items() if f > 1}


@given(
    capacity=st.integers(1, 8),
    calls=st.lists(
        st.one_of(st.lists(st.integers(0, 11), unique=True, max_size=10), st.integers(0, 3)), max_size=40
    ),
)
@settings(max_examples=300, deadline=None)
def test_like_the_rule_applied_one_by_one(capacity: int, calls: list[list[int] | int]) -> None:
    filter_, model, now = FrequencyFilter(capacity), Model(capacity), 0.0
    filter_.decay(now)
    for call in calls:
        if isinstance(call, int):
            now += call * DECAY_S
            filter_.decay(now)
            for _ in range(call):
                model.step()
        else:
            assert see(filter_, *call) == model.admit(call)


# ---- budget ----


def test_the_budget_is_given_once_a_day() -> None:
    budget = WriteBudget(100)
    assert budget.take(60, 0.0) == 60
    assert budget.take(60, 10.0) == 40
    assert budget.take(1, HOUR_S) == 0
    assert budget.take(1, DAY_S - 1) == 0
    # What was written in an hour counts until a day after that hour's end.
    assert budget.take(1, DAY_S + HOUR_S - 1) == 0
    assert budget.take(150, DAY_S + HOUR_S) == 100
    assert budget.take(1, DAY_S + HOUR_S) == 0


def test_what_was_written_comes_free_hour_by_hour() -> None:
    budget = WriteBudget(3)
    for hour in range(3):
        assert budget.take(1, hour * HOUR_S) == 1
    assert budget.take(5, 24.9 * HOUR_S) == 0
    assert budget.take(5, 25.0 * HOUR_S) == 1
    assert budget.take(5, 27.0 * HOUR_S) == 2


@pytest.mark.parametrize("start", [0.0, 12345.6, 1e9])
@pytest.mark.parametrize("pause_h", [25, 26, 49, 50, 51, 1000, 10**7])
def test_after_a_long_pause_all_of_it_is_there(start: float, pause_h: int) -> None:
    budget = WriteBudget(10)
    for hour in range(5):
        budget.take(2, start + hour * HOUR_S)
    assert budget.take(20, start + (5 + pause_h) * HOUR_S) == 10


def test_a_budget_of_nothing() -> None:
    budget = WriteBudget(0)
    assert budget.take(5, 0.0) == 0
    assert budget.take(5, 100 * DAY_S) == 0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    budget = WriteBudget(10)
    assert budget.take(8, 100 * HOUR_S) == 8
    assert budget.take(8, 10 * HOUR_S) == 2
    assert budget.take(8, 120 * HOUR_S) == 0
    assert budget.take(8, 125 * HOUR_S) == 8


@given(
    blocks=st.integers(0, 50),
    start=st.floats(0, 1e7),
    takes=st.lists(
        st.tuples(
            st.one_of(st.floats(0, 2 * HOUR_S), st.floats(0, 2 * DAY_S), st.just(DAY_S), st.just(HOUR_S)),
            st.integers(0, 60),
        ),
        max_size=60,
    ),
)
@settings(max_examples=300, deadline=None)
def test_never_more_in_any_day(blocks: int, start: float, takes: list[tuple[float, int]]) -> None:
    budget, now = WriteBudget(blocks), start
    made: list[tuple[float, int]] = []
    for pause, wanted in takes:
        now += pause
        granted = budget.take(wanted, now)
        assert 0 <= granted <= wanted
        # Neither is it stingy: what is more than 25 hours old does not count.
        recent = sum(count for when, count in made if when > now - 25 * HOUR_S)
        assert granted >= min(wanted, blocks - recent)
        made.append((now, granted))
        assert sum(count for when, count in made if when >= now - DAY_S) <= blocks
