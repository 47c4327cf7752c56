"""The index against a dict, with keys crafted to fall into the same bucket and to have the same tag."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.logic.hashing import Hashes
from kvbm.logic.index import HashIndex

Key = tuple[int, int]


def crafted(bucket: int, tag: int, serial: int) -> Key:
    """A key whose low bits name the bucket and whose word 1 holds the tag; `serial` tells keys apart."""
    return serial << 32 | bucket, tag << 32 | serial


def array(keys: list[Key]) -> Hashes:
    return np.array(keys, np.uint64).reshape(-1, 2)


def slots_of(*slots: int) -> np.ndarray:
    return np.array(slots, np.int64)


def random_keys(count: int, seed: int = 0) -> Hashes:
    return np.random.default_rng(seed).integers(0, 2**64, (count, 2), np.uint64)


def test_empty() -> None:
    index = HashIndex(10)
    assert index.find(random_keys(5)).tolist() == [-1] * 5
    assert index.find(random_keys(0)).tolist() == []
    index.insert(random_keys(0), slots_of())
    index.remove(slots_of())


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 12, 13, 1000, 3 * 4096])
def test_filled_to_capacity(capacity: int) -> None:
    index = HashIndex(capacity)
    keys = random_keys(capacity, capacity)
    slots = np.random.default_rng(1).permutation(capacity).astype(np.int64)
    index.insert(keys, slots)
    np.testing.assert_array_equal(index.find(keys), slots)
    np.testing.assert_array_equal(index.hashes(slots), keys)
    np.testing.assert_array_equal(index.find(random_keys(1000, 99)), -1)
    index.remove(slots[::2])
    expected = slots.copy()
    expected[::2] = -1
    np.testing.assert_array_equal(index.find(keys), expected)
    index.remove(slots[1::2])
    np.testing.assert_array_equal(index.find(keys), -1)


def test_half_equal_keys_are_different() -> None:
    index = HashIndex(8)
    index.insert(array([(5, 7), (5, 8), (6, 7)]), slots_of(0, 1, 2))
    assert index.find(array([(5, 7), (5, 8), (6, 7), (6, 8), (0, 0), (7, 5)])).tolist() == [
        0,
        1,
        2,
        -1,
        -1,
        -1,
    ]


def test_the_zero_key_is_a_key() -> None:
    index = HashIndex(4)
    assert index.find(array([(0, 0)])).tolist() == [-1]
    index.insert(array([(0, 0)]), slots_of(3))
    assert index.find(array([(0, 0)])).tolist() == [3]


def test_equal_tags_in_one_bucket() -> None:
    index = HashIndex(100)
    keys = array([crafted(1, 77, serial) for serial in range(1, 4)])
    index.insert(keys, slots_of(4, 5, 6))
    assert index.find(keys).tolist() == [4, 5, 6]
    index.remove(slots_of(4))
    assert index.find(keys).tolist() == [-1, 5, 6]


def test_overflow() -> None:
    index = HashIndex(100)
    keys = array([crafted(1, tag, tag) for tag in range(2, 42, 2)])
    index.insert(keys, np.arange(20))
    assert index.find(keys).tolist() == list(range(20))
    index.remove(np.arange(10, 20))
    assert index.find(keys).tolist() == [*range(10), *[-1] * 10]


@pytest.mark.parametrize("removed", range(8))
def test_overflow_is_found_when_its_bucket_has_room_again(removed: int) -> None:
    index = HashIndex(100)
    keys = array([crafted(1, tag, tag) for tag in range(2, 22, 2)])
    index.insert(keys, np.arange(10))
    index.remove(slots_of(removed))
    assert index.find(keys).tolist() == [-1 if i == removed else i for i in range(10)]


def test_overflow_and_a_new_key_in_the_freed_cell() -> None:
    """What a pool does: it looks keys up and inserts those that it did not find."""
    index = HashIndex(100)
    keys = array([crafted(1, tag, tag) for tag in range(2, 24, 2)])
    index.insert(keys[:9], np.arange(9))
    index.remove(slots_of(7))
    wanted = keys[[9, 8]]  # a new one, and the one that overflowed
    found = index.find(wanted)
    free = iter([20, 21])
    missing = np.flatnonzero(found < 0)
    new = slots_of(*[next(free) for _ in missing])
    index.insert(wanted[missing], new)
    index.remove(slots_of(8))
    index.remove(new)
    assert index.find(keys).tolist() == [*range(7), -1, -1, -1, -1]


CAPACITY = 40
_keys = st.builds(
    crafted, st.integers(0, 2), st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)), st.integers(0, 30)
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.lists(_keys, max_size=14, unique=True)),
        st.tuples(st.just("remove"), st.lists(st.integers(0, 1000), max_size=12)),
        st.tuples(st.just("find"), st.lists(_keys, max_size=8)),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None, print_blob=True, derandomize=False)
@given(steps=_steps)
def test_against_a_dict(steps: list[tuple[str, list]]) -> None:
    index = HashIndex(CAPACITY)
    model: dict[Key, int] = {}
    free = list(range(CAPACITY))
    for action, items in steps:
        if action == "insert":
            new = [key for key in items if key not in model][: len(free)]
            slots = [free.pop() for _ in new]
            index.insert(array(new), slots_of(*slots))
            model.update(zip(new, slots, strict=True))
        elif action == "remove":
            keys = list(model)
            gone = sorted({number % len(keys) for number in items}) if keys else []
            slots = [model.pop(keys[i]) for i in gone]
            index.remove(slots_of(*slots))
            free += slots
        else:
            assert index.find(array(items)).tolist() == [model.get(key, -1) for key in items]
        assert index.find(array(list(model))).tolist() == list(model.values())
        stored = index.hashes(slots_of(*model.values()))
        assert [tuple(map(int, row)) for row in stored] == list(model)
