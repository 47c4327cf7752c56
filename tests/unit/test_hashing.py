"""Sequence hashes: the same everywhere and for ever, and different whenever the block may be different."""

import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.logic.hashing import SequenceHasher, namespace_digest, root_hash

NAMESPACE = namespace_digest({"model": "meta/Llama-3.1-8B", "dtype": "bfloat16", "block_size": 16})


def chain(
    tokens: Sequence[int] | np.ndarray,
    *,
    namespace: bytes = NAMESPACE,
    block_size: int = 4,
    salt: str | None = None,
    adapter: str | None = None,
    extra_keys: Mapping[int, bytes] | None = None,
) -> list[str]:
    hasher = SequenceHasher(root_hash(namespace, block_size, salt=salt, adapter=adapter), block_size)
    hasher.extend(tokens, extra_keys)
    return [row.tobytes().hex() for row in hasher.hashes]


# ---- golden values: a change here makes every stored cache worthless ----


def test_namespace_golden() -> None:
    assert NAMESPACE.hex() == "031a25e7852d443a0a35da2c2a5b0c86"


@pytest.mark.parametrize(
    ("salt", "adapter", "golden"),
    [
        (None, None, "61e9eacc01e85da20027703cc0614c62"),
        ("tenant-1", None, "06a360c74f44beedb963eefec25fb601"),
        (None, "lora-a", "8ffd336ef1c2fd7bdab409423267452b"),
        ("tenant-1", "lora-a", "69814ea4c37f4c241e9151663d107c39"),
        (
            "\ud800é",
            "",
            "2a40f35499855bded6cd6a467e9562cb",
        ),  # salts are whatever a client sent, also lone surrogates
    ],
)
def test_root_golden(salt: str | None, adapter: str | None, golden: str) -> None:
    assert root_hash(NAMESPACE, 16, salt=salt, adapter=adapter).hex() == golden


def test_chain_golden() -> None:
    assert chain([*range(8), 128_255, 2**31, 2**32 - 1, 0]) == [
        "86a76888b96301c30320f7412db256f4",
        "9785b459224d21380cac368e2d2125c7",
        "dad1d21627ec2aa626971680b7482004",
    ]


def test_chain_with_extra_keys_golden() -> None:
    assert chain(range(8), salt="s", extra_keys={1: b"image-1"}) == [
        "c10f6aa6eb73210efb7fac1cd9edf637",
        "00cc1ddb82d39e09d6e08e49404670b0",
    ]


def test_hashes_are_little_endian_words() -> None:
    hasher = SequenceHasher(root_hash(NAMESPACE, 4), 4)
    hasher.extend(range(4))
    assert hasher.hashes.shape == (1, 2)
    assert hasher.hashes.dtype == np.uint64
    raw = bytes.fromhex(chain(range(4))[0])
    assert [int(word) for word in hasher.hashes[0]] == [
        int.from_bytes(raw[:8], "little"),
        int.from_bytes(raw[8:], "little"),
    ]


def test_same_in_every_process() -> None:
    program = (
        "from kvbm.logic.hashing import *\n"
        "n = namespace_digest({'b': [1, 2], 'a': 'x', 'c': None})\n"
        "h = SequenceHasher(root_hash(n, 4, salt='s', adapter='a'), 4)\n"
        "h.extend(list(range(40)), {2: b'image'})\n"
        "print(n.hex(), h.hashes.tobytes().hex())\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("0", "1", "4242")
    }
    assert len(printed) == 1
    assert len(printed.pop().split()[1]) == 10 * 32


# ---- the chain grows ----


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=120),
    block_size=st.integers(1, 7),
    cuts=st.lists(st.integers(0, 120), max_size=6),
    extra=st.dictionaries(st.integers(0, 20), st.binary(max_size=4)),
)
def test_any_split_equals_one_go(
    tokens: list[int], block_size: int, cuts: list[int], extra: dict[int, bytes]
) -> None:
    root = root_hash(NAMESPACE, block_size)
    whole = SequenceHasher(root, block_size)
    whole.extend(tokens, extra)
    parts = SequenceHasher(root, block_size)
    views = []
    for end in [*sorted(cuts), len(tokens)]:
        # As the scheduler does it: all that is known, from what is hashed on.
        parts.extend(tokens[parts.num_tokens : end] if end > parts.num_tokens else [], extra)
        views.append((parts.hashes, parts.hashes.copy()))
    assert len(parts) == len(whole) == len(tokens) // block_size
    assert parts.num_tokens == whole.num_tokens == len(whole) * block_size
    np.testing.assert_array_equal(parts.hashes, whole.hashes)
    for view, copy in views:  # earlier views stay what they were
        np.testing.assert_array_equal(view, copy)


def test_tokens_after_the_last_whole_block_are_ignored() -> None:
    assert chain(range(11)) == chain(range(8))
    hasher = SequenceHasher(root_hash(NAMESPACE, 4), 4)
    hasher.extend([0, 1, 2])
    assert len(hasher) == hasher.num_tokens == 0
    hasher.extend([0, 1, 2, 3, 4])
    hasher.extend([])
    hasher.extend([4, 5, 6, 7])
    assert [row.tobytes().hex() for row in hasher.hashes] == chain(range(8))


def test_a_hash_names_the_whole_prefix() -> None:
    one, other = chain([1, 2, 3, 4, 5, 6, 7, 8]), chain([1, 2, 3, 9, 5, 6, 7, 8])
    assert one[0] != other[0]
    assert one[1] != other[1]
    repeated = chain([1, 2, 3, 4] * 5)
    assert len(set(repeated)) == 5
    assert chain([4, 3, 2, 1])[0] != chain([1, 2, 3, 4])[0]


# ---- what separates sequences ----


def test_everything_that_matters_separates() -> None:
    tokens = list(range(16))
    variants = {
        "plain": chain(tokens),
        "namespace": chain(tokens, namespace=namespace_digest({"model": "other"})),
        "salt": chain(tokens, salt="a"),
        "empty salt": chain(tokens, salt=""),
        "adapter": chain(tokens, adapter="a"),
        "empty adapter": chain(tokens, adapter=""),
        "both empty": chain(tokens, salt="", adapter=""),
        "salt + adapter": chain(tokens, salt="a", adapter="b"),
        "shifted": chain(tokens, salt="ab", adapter=""),
        "shifted back": chain(tokens, salt="", adapter="ab"),
        "swapped": chain(tokens, salt="b", adapter="a"),
        "block size": chain(tokens, block_size=8),
        "extra key": chain(tokens, extra_keys={0: b"x"}),
        "other extra key": chain(tokens, extra_keys={0: b"y"}),
    }
    firsts = {name: hashes[0] for name, hashes in variants.items()}
    assert len(set(firsts.values())) == len(firsts)
    every = [digest for hashes in variants.values() for digest in hashes]
    assert len(set(every)) == len(every)


def test_salt_and_adapter_do_not_run_together() -> None:
    roots = {
        root_hash(NAMESPACE, 16, salt=salt, adapter=adapter)
        for salt in (None, "", "a", "ab", "\1", "\0")
        for adapter in (None, "", "a", "ab", "\1", "\0")
    }
    assert len(roots) == 36
    assert root_hash(b"ab", 16) != root_hash(b"abc", 16)


def test_extra_keys_count_from_their_block_on() -> None:
    plain, keyed = chain(range(16)), chain(range(16), extra_keys={2: b"image"})
    assert keyed[:2] == plain[:2]
    assert keyed[2] != plain[2]
    assert keyed[3] != plain[3]
    # The key of a block that is not there has no effect, and an empty mapping is none.
    assert chain(range(16), extra_keys={9: b"image"}) == chain(range(16), extra_keys={}) == plain


# ---- tokens in any form ----


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32, ">i4", ">i8"])
def test_arrays_and_lists_are_equal(dtype: str) -> None:
    tokens = [random.Random(7).randrange(2**31) for _ in range(64)]
    expected = chain(tokens)
    array = np.array(tokens, dtype)
    assert chain(array) == expected
    assert chain(tuple(tokens)) == expected
    strided = np.empty(128, dtype)
    strided[::2] = array
    assert chain(strided[::2]) == expected


# ---- namespaces ----


def test_namespace_does_not_depend_on_order() -> None:
    assert namespace_digest({"a": 1, "b": {"x": 1, "y": 2}}) == namespace_digest(
        {"b": {"y": 2, "x": 1}, "a": 1}
    )


def test_namespace_separates() -> None:
    digests = [
        namespace_digest(fields)
        for fields in (
            {},
            {"a": 1},
            {"a": "1"},
            {"a": 1.5},
            {"a": None},
            {"a": [1]},
            {"b": 1},
            {"a": 1, "b": 1},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert {len(digest) for digest in digests} == {16}
