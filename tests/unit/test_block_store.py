"""BlockStore: what many threads may do at once, and what of it is kept."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.config import load_config
from kvbm.logic.hashing import Hashes
from kvbm.runtime.block_store import BlockStore
from kvbm.transfer.copy import CopyEngine

SIZE = 4096


def names(first: int, count: int) -> Hashes:
    return np.stack([np.arange(first, first + count), np.full(count, 7)], axis=1).astype(np.uint64)


def pages(first: int, count: int) -> list[np.ndarray]:
    return [np.full(SIZE, i % 251, np.uint8) for i in range(first, first + count)]


class IdleEngine(CopyEngine):
    """Copies nothing; closed: how often."""

    closed = 0

    def offload(self, device_blocks: Any, host_slots: Any, after: object = None) -> None: ...

    def onboard(self, device_blocks: Any, host_slots: Any, after: object = None) -> None: ...

    def close(self) -> None:
        self.closed += 1


def make(folder: Path | None = None, **settings: Any) -> BlockStore:
    disk = {"disk__dir": str(folder), "disk__num_blocks": 64, "disk__disable_filter": True} if folder else {}
    config = load_config(environ={}, **{"host__num_blocks": 16, **disk, **settings})
    store = BlockStore(config, SIZE, namespace=bytes(16))
    assert store.wait_found(20)
    return store


def read(store: BlockStore, first: int, count: int) -> int:
    """How many leading blocks come back, each as it was stored."""
    into = [np.zeros(SIZE, np.uint8) for _ in range(count)]
    got = store.get(names(first, count), into)
    assert all((into[i] == (first + i) % 251).all() for i in range(got))
    return got


def test_what_was_put_comes_back_from_host_and_disk(tmp_path: Path) -> None:
    store = make(tmp_path)
    for first in range(0, 64, 8):
        assert store.put(names(first, 8), pages(first, 8)) == 8
        assert store.flush(20)
    assert store.count(names(0, 70)) == 64
    assert [read(store, first, 8) for first in range(0, 64, 8)] == [8] * 8
    stats = store.stats()
    assert stats.disk is not None
    assert stats.disk.read_blocks >= 48
    store.close()


def test_the_disk_is_worked_on_while_nobody_calls(tmp_path: Path) -> None:
    store = make(tmp_path)
    store.put(names(0, 8), pages(0, 8))
    end = time.monotonic() + 20
    while store._disk is not None and store._disk.tier.stats.written_blocks < 8:
        assert time.monotonic() < end
        time.sleep(0.01)
    store.close()


def test_a_prefetch_brings_it_to_the_host_for_the_next(tmp_path: Path) -> None:
    store = make(tmp_path)
    for first in range(0, 32, 8):
        store.put(names(first, 8), pages(first, 8))
        assert store.flush(20)
    assert len(store.match(names(0, 8), wait=False)) == 0
    end = time.monotonic() + 20
    while not len(slots := store.match(names(0, 8), wait=False)):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(slots) == 8
    store.close()


@pytest.mark.parametrize("give_back", [True, False])
def test_memory_that_a_copy_may_use_is_left(give_back: bool, tmp_path: Path) -> None:
    engine = IdleEngine()
    config = load_config(environ={}, host__num_blocks=16, disk__dir=str(tmp_path), disk__num_blocks=64)
    store = BlockStore(config, SIZE, lambda _: engine, namespace=bytes(16))
    store.close(give_back=give_back)
    assert engine.closed == give_back
    assert hasattr(store.records.arena, "slots") != give_back


def test_a_damaged_block_is_a_miss_and_gone() -> None:
    store = make()
    store.put(names(0, 8), pages(0, 8))
    slot = int(store.pool.find(names(5, 1))[0])
    store.records.arena.records()[slot, 17] ^= 1
    assert read(store, 0, 8) == 5
    assert store.stats().corrupt == 1
    assert store.count(names(0, 8)) == 5
    assert store.put(names(0, 8), pages(0, 8)) == 8
    assert read(store, 0, 8) == 8


def test_what_is_stored_during_a_clear_is_not_kept() -> None:
    store = make()
    slots, is_new = store.claim(names(0, 4))
    assert is_new.all()
    store.clear()
    store.register(slots)
    store.release(slots)
    assert store.count(names(0, 4)) == 0
    assert store.pool.num_free == 16


def test_an_error_while_filling_keeps_nothing() -> None:
    store = make()
    with pytest.raises(ValueError, match="broadcast"):
        store.put(names(0, 2), [np.zeros(SIZE, np.uint8), np.zeros(3, np.uint8)])
    assert store.count(names(0, 2)) == 0
    assert store.pool.num_free == 16


def test_a_wait_for_the_disk_holds_nobody_up(tmp_path: Path) -> None:
    store = make(tmp_path, disk__timeout_s=5)
    disk = store._disk
    assert disk is not None
    ready = threading.Event()

    def never(request: str, hashes: Hashes) -> bool:
        ready.set()
        return False

    disk.tier.fetch = never  # type: ignore[method-assign]
    waiting = threading.Thread(target=store.match, args=(names(50, 4),))
    waiting.start()
    assert ready.wait(5)
    begin = time.monotonic()
    assert store.put(names(0, 8), pages(0, 8)) == 8
    assert store.count(names(0, 8)) == 8
    assert time.monotonic() - begin < 4
    waiting.join(20)
    assert not waiting.is_alive()
    store.close()


def test_many_threads(tmp_path: Path) -> None:
    store = make(tmp_path)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                first = 4 * int(rng.integers(0, 12))
                if rng.random() < 0.5:
                    store.put(names(first, 4), pages(first, 4))
                else:
                    read(store, first, 4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert store.flush(20)
    assert not store.pool.pins(np.arange(16)).any()
    store.close()
