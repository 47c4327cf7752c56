"""KvBlockManager: the whole life of blocks without an engine."""

import threading

import numpy as np
import pytest

from kvbm import KvBlockManager
from kvbm.errors import CapacityError, ConfigError, LayoutError, UsageError
from kvbm.logic.pool import BlockEvent, EventKind

BLOCK = 16
TOKENS = list(range(1000, 1000 + 8 * BLOCK))


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in ("DYN_KVBM_CPU_CACHE_GB", "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS", "KVBM_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def caches(blocks=32, layers=3, seed=0):
    rng = np.random.default_rng(seed)
    return {f"layer.{i}": rng.random((blocks, 2, BLOCK, 8), dtype=np.float32) for i in range(layers)}


def manager(kv=None, blocks=16, **settings):
    size = {"kv_caches": kv} if kv else {"block_bytes": 64}
    return KvBlockManager(block_size=BLOCK, **size, host__num_blocks=blocks, **settings)


def test_offload_and_onboard_restore_every_layer():
    kv = caches()
    original = {name: array.copy() for name, array in kv.items()}
    with manager(kv) as m:
        assert m.offload(TOKENS, [3, 1, 4, 0, 5, 9, 2, 6]) == 8
        for array in kv.values():
            array[16:] = -1
        assert m.onboard(TOKENS, range(16, 24)) == 8
        for name, array in kv.items():
            assert (array[16:24] == original[name][[3, 1, 4, 0, 5, 9, 2, 6]]).all()
            assert (array[24:] == -1).all()
        stats = m.stats()
    assert (stats.offloaded, stats.onboarded, stats.registered) == (8, 8, 8)


def test_torch_tensors():
    torch = pytest.importorskip("torch", reason="torch is installed by scripts/setup.sh")
    kv = {"layer": torch.rand(16, 2, BLOCK, 8, dtype=torch.float32).to(torch.bfloat16)}
    with manager(kv) as m:
        m.offload(TOKENS, [0, 1])
        assert m.onboard(TOKENS, [10, 11]) == 2
        assert torch.equal(kv["layer"][10:12], kv["layer"][:2])


def test_offload_copies_only_what_is_missing():
    kv = caches()
    with manager(kv) as m:
        m.offload(TOKENS[: 4 * BLOCK], range(4))
        m.offload(TOKENS, range(8))
        assert m.stats().offloaded == 8


def test_salts_do_not_share():
    kv = caches()
    with manager(kv) as m:
        m.offload(TOKENS, range(8), salt="a")
        assert m.onboard(TOKENS, range(8), salt="b") == 0
        assert m.onboard(TOKENS, range(8)) == 0
        assert m.onboard(TOKENS, range(8), salt="a") == 8


def test_namespaces_do_not_share():
    with manager(namespace={"model": "a"}) as a, manager(namespace={"model": "b"}) as b:
        assert a._hashes(TOKENS, None).tobytes() != b._hashes(TOKENS, None).tobytes()


def test_block_by_block():
    with manager() as m:
        blocks = m.allocate(3)
        for i in range(3):
            m.write(blocks, i, np.full(64, i, np.uint8))
        assert len(m.match(TOKENS)) == 0, "nothing is visible before register"
        m.register(blocks, TOKENS)
        blocks.release()
        with m.match(TOKENS) as found:
            assert [int(m.read(found, i)[0]) for i in range(len(found))] == [0, 1, 2]


def test_duplicates_become_one_block():
    with manager() as m:
        first, second = m.allocate(1), m.allocate(1)
        m.write(first, 0, bytes(64))
        m.write(second, 0, bytes([7]) * 64)
        m.register(first, TOKENS)
        m.register(second, TOKENS)
        assert second.slots.tolist() == first.slots.tolist()
        assert m.stats().registered == 1
        assert m.stats().free == 15
        second.release()
        first.release()
        assert len(m.match(TOKENS)) == 1


def test_matched_blocks_are_not_evicted():
    with manager(blocks=4) as m:
        blocks = m.allocate(2)
        for i in range(2):
            m.write(blocks, i, bytes([i]) * 64)
        m.register(blocks, TOKENS)
        blocks.release()
        held = m.match(TOKENS)
        m.allocate(2).release()
        with pytest.raises(CapacityError, match="in use"):
            m.allocate(3)
        held.release()
        m.allocate(3).release()
        assert m.stats().evicted == 1
        assert len(m.match(TOKENS)) == 1, "the tail went before the head"


def test_offload_stops_where_room_ends():
    kv = caches()
    with manager(kv, blocks=4) as m:
        assert m.offload(TOKENS, range(8)) == 4
        assert m.onboard(TOKENS, range(8)) == 4


def test_a_damaged_block_is_a_miss():
    kv = caches()
    with manager(kv) as m:
        m.offload(TOKENS, range(8))
        with m.match(TOKENS) as found:
            m.read(found, 5)[100] ^= 1
        assert m.onboard(TOKENS, range(16, 24)) == 5
        assert m.stats().corrupt == 1
        m.offload(TOKENS, range(8))
        assert m.onboard(TOKENS, range(16, 24)) == 8


def test_a_failed_copy_leaves_nothing_behind():
    kv = caches()
    with manager(kv) as m:
        with pytest.raises(IndexError):
            m.offload(TOKENS, [0, 1, 9999])
        assert m.onboard(TOKENS, range(8)) == 0
        assert m.stats().free == 16


def test_events_rebuild_the_contents():
    kv = caches()
    present: set[bytes] = set()

    def follow(event: BlockEvent) -> None:
        keys = {row.tobytes() for row in event.hashes}
        if event.kind == EventKind.STORED:
            present.update(keys)
        else:
            present.difference_update(keys)

    with manager(kv, blocks=6) as m:
        end = m.subscribe(follow)
        for start in range(5):
            tokens = [start * 7 + t for t in range(4 * BLOCK)]
            m.offload(tokens, range(4))
        assert len(present) == m.stats().registered == 6
        m.clear()
        assert not present
        end()
        m.offload(TOKENS, range(2))
        assert not present


def test_threads():
    kv = caches(blocks=64)
    errors: list[BaseException] = []
    with manager(kv, blocks=24) as m:

        def work(n: int) -> None:
            try:
                tokens = [n * 1000 + t for t in range(4 * BLOCK)]
                for _ in range(50):
                    m.offload(tokens, range(n * 4, n * 4 + 4))
                    m.onboard(tokens, range(32 + n * 4, 36 + n * 4))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        for n in range(8):
            for array in kv.values():
                assert (array[32 + n * 4 : 36 + n * 4] == array[n * 4 : n * 4 + 4]).all()


def test_misuse_is_told():
    with pytest.raises(ConfigError, match="DYN_KVBM_CPU_CACHE_GB"):
        KvBlockManager(block_size=16, block_bytes=64)
    with pytest.raises(UsageError, match="either"):
        KvBlockManager(block_size=16, host__num_blocks=4)
    with pytest.raises(UsageError, match="either"):
        KvBlockManager(block_size=16, host__num_blocks=4, kv_caches=caches(), block_bytes=64)
    with pytest.raises(CapacityError, match=r"raise host\.cache_gb"):
        KvBlockManager(block_size=16, block_bytes=1 << 20, host__cache_gb=0.0001)
    with pytest.raises(CapacityError, match="available"):
        KvBlockManager(block_size=16, block_bytes=1 << 20, host__cache_gb=1e6)
    with pytest.raises(LayoutError):
        KvBlockManager(
            block_size=16, host__num_blocks=4, kv_caches={"a": np.zeros((8, 4)), "b": np.zeros((7, 4))}
        )
    with manager() as m:
        blocks = m.allocate(2)
        with pytest.raises(UsageError, match="64 bytes"):
            m.write(blocks, 0, bytes(63))
        with pytest.raises(UsageError, match="32 tokens"):
            m.register(blocks, TOKENS[:20])
