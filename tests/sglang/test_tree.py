"""KVBM as a storage backend of SGLang's own tree, controller and threads: bytes, tiers, events."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.sglang.router import TOPIC, Router
from tests.sglang.tree import PAGE, Pool, Tokens, Tree, store_of, tokens

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
HOST: dict[str, Any] = {"host": {"num_blocks": 64}}
A, B, C = (tokens(first, 10) for first in (1, 1001, 2001))


def disk(folder: Path, **host: int) -> dict[str, Any]:
    return {
        "host": host,
        "disk": {"num_blocks": 100, "dir": str(folder), "disable_filter": True, "max_queued_blocks": 100},
    }


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_from_host_memory(pool: Pool) -> None:
    with Tree(HOST, pool) as tree:
        tree.store(A)
        tree.store(B)
        assert tree.load_anew(B) == 10
        assert tree.load(A[: 7 * PAGE] + C) == 7
        assert tree.load(C) == 0
        assert tree.backend.stats().onboarded == 17


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_from_disk_what_host_memory_has_no_room_for(pool: Pool, tmp_path: Path) -> None:
    with Tree(disk(tmp_path, num_blocks=20), pool) as tree:
        for sequence in (A, B, C):
            tree.store(sequence)
            assert store_of(tree.backend).flush()
        tree.forget()
        assert [tree.load(sequence) for sequence in (A, B, C)] == [10, 10, 10]
        stats = tree.backend.stats()
        assert stats.evicted >= 10
        assert stats.disk.read_blocks >= 10


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_from_disk_after_a_restart(pool: Pool, tmp_path: Path) -> None:
    with Tree(disk(tmp_path), pool) as tree:
        tree.store(A)
    with Tree(disk(tmp_path), pool) as tree:
        assert tree.load(A) == 10
        assert tree.backend.stats().disk.read_blocks == 10


@pytest.mark.parametrize(
    "other",
    [
        {"settings": {"revision": "another"}},
        {"settings": {"kv_cache_dtype": "fp8_e5m2"}},
        {"pool": Pool("layer_first", "kernel", True)},
        {"pool": Pool("page_first", "kernel", False)},
        {},
    ],
    ids=["weights", "dtype", "layout", "interface", "the same"],
)
def test_another_engine_finds_only_what_is_its_own(other: dict[str, Any], tmp_path: Path) -> None:
    with Tree(disk(tmp_path)) as tree:
        tree.store(A)
    with Tree(disk(tmp_path), **other) as tree:
        assert tree.load(A) == (0 if other else 10)


def test_memory_and_disk_are_emptied_by_clear(tmp_path: Path) -> None:
    with Tree(disk(tmp_path)) as tree:
        tree.store(A)
        assert store_of(tree.backend).flush()
        assert tree.cache.clear_storage_backend()
        assert tree.load_anew(A) == 0
        tree.store(B)
        assert tree.load_anew(B) == 10
    with Tree(disk(tmp_path)) as tree:
        assert tree.load(A) == 0


def test_more_than_the_tiers_hold(tmp_path: Path) -> None:
    """Random requests that share prefixes, through tiers that are too small for all of them."""
    rng = np.random.default_rng(0)
    stems = [tokens(5000 + 1000 * i, 12) for i in range(6)]
    settings = disk(tmp_path, num_blocks=24)
    settings["disk"]["num_blocks"] = 40
    served = 0
    with Tree(settings) as tree:
        for i in range(40):
            stem = stems[rng.integers(6)][: PAGE * int(rng.integers(1, 12))]
            request = stem + tokens(20_000 + 1000 * i, int(rng.integers(1, 5)))
            tree.forget()
            served += tree.load(request)
            tree.forget()
            tree.store(request)
        stats = tree.backend.stats()
    assert stats.evicted > 40
    assert stats.disk.read_blocks > 0
    assert served > 40


def test_attached_and_detached_while_it_runs(tmp_path: Path) -> None:
    with Tree(None) as tree:
        tree.attach(disk(tmp_path))
        tree.store(A)
        first = tree.backend
        assert tree.cache.detach_storage_backend()[0]
        assert first.batch_exists(["0" * 64]) == 0  # closed: a miss
        tree.attach(disk(tmp_path))
        assert tree.backend is not first
        assert tree.load_anew(A) == 10


def test_a_wrong_setting_is_one_message_at_start() -> None:
    with Tree(None) as tree:
        for settings, said in (
            ({"host": {"cache_gbs": 1}}, "cache_gbs"),
            ({}, "DYN_KVBM_CPU_CACHE_GB"),
            ({"host": {"num_blocks": 1 << 40}}, "memory"),
        ):
            ok, message = tree.try_attach(settings)
            assert not ok
            assert said in message
        tree.store(A)  # without a backend
        tree.attach(HOST)
        tree.store(B)
        assert tree.load_anew(B) == 10


def test_sizes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "12")
    with Tree({}) as tree:
        tree.store(A)
        assert tree.backend.stats().capacity == 12
        assert tree.load_anew(A) == 10


def test_sglang_is_told_how_much_was_moved() -> None:
    with Tree(HOST) as tree:
        tree.store(A)
        tree.load_anew(A)
        told = tree.backend.get_stats()
        assert (sum(told.backup_pgs), sum(told.prefetch_pgs)) == (10, 10)
        assert min(told.backup_bandwidth + told.prefetch_bandwidth) > 0
        assert tree.backend.get_stats().backup_pgs == []


def test_a_model_with_other_state_is_not_cached() -> None:
    """SGLang names a second pool then: its state would be missing where only KV comes back."""
    with Tree(HOST) as tree:
        tree.store(A)
        tree.backend.register_mem_host_pool_v2(tree.cache.cache_controller.mem_pool_host, "mamba")
        assert tree.load_anew(A) == 0
        tree.store(B)
        assert tree.load_anew(B) == 0


# ---- KV events


def event_hashes(sequence: Tokens) -> list[int]:
    """As SGLang's own events have them."""
    digest, hashes = b"", []
    for begin in range(0, len(sequence), PAGE):
        page = np.array(sequence[begin : begin + PAGE], "<u4").tobytes()
        digest = hashlib.sha256(digest + page).digest()
        hashes.append(int.from_bytes(digest[:8], "big", signed=True))
    return hashes


def test_events_of_what_is_stored_and_removed(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/events"
    held: dict[str, list[set[int]]] = {"EXTERNAL": [set()], "DISK": [set()]}  # after each event
    numbers = []
    with (
        Router(address) as router,
        Tree(disk(tmp_path, num_blocks=24), kv_events={"endpoint": address, "topic": TOPIC}) as tree,
    ):
        router.wait_connected()
        for sequence in (A, B, C):
            tree.store(sequence)
            assert store_of(tree.backend).flush()
        tree.cache.clear_storage_backend()
        while not numbers or any(states[-1] for states in held.values()):
            number, events = router.receive()
            numbers.append(number)
            for event in events:
                states, hashes = held[event["medium"]], set(event["block_hashes"])
                if event["type"] == "BlockStored":
                    assert event["block_size"] == PAGE
                    assert not states[-1] & hashes
                    states.append(states[-1] | hashes)
                else:
                    assert event["type"] == "BlockRemoved"
                    assert hashes <= states[-1]
                    states.append(states[-1] - hashes)
    assert numbers == list(range(len(numbers)))
    a, b, c = (set(event_hashes(sequence)) for sequence in (A, B, C))
    assert max(held["DISK"], key=len) == a | b | c
    assert a | b in held["EXTERNAL"]
    assert any(b | c < state and len(state) == 24 for state in held["EXTERNAL"])  # without six of A
