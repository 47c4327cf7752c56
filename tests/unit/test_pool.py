"""The life of a block: who may have a slot, what can be matched, and what subscribers hear."""

import numpy as np
import pytest

from kvbm.logic.hashing import Hashes
from kvbm.logic.history import Fate
from kvbm.logic.policies import EvictionPolicy, Lru, SegmentedLru
from kvbm.logic.pool import BlockEvent, BlockPool, BlockState, EventKind

ALL_HASHES: Hashes = np.random.default_rng(5).integers(0, 2**64, (100_000, 2), np.uint64)


def names(*numbers: int) -> Hashes:
    return ALL_HASHES[list(numbers)].reshape(-1, 2)


def slots_of(*slots: int) -> np.ndarray:
    return np.array(slots, np.int64)


def stored(pool: BlockPool, hashes: Hashes) -> np.ndarray:
    """Registered blocks, pinned by nobody."""
    slots, is_new = pool.claim(hashes, pool.capacity)
    assert is_new.all()
    pool.register(slots)
    pool.release(slots)
    return slots


def follow(pool: BlockPool) -> set[bytes]:
    """What a subscriber holds to be matchable."""
    matchable: set[bytes] = set()

    def hear(event: BlockEvent) -> None:
        assert event.tier == pool.tier
        assert len(event.hashes)
        for row in event.hashes:
            key = row.tobytes()
            assert (key in matchable) == (event.kind == EventKind.REMOVED)
            matchable.symmetric_difference_update({key})

    pool.subscribe(hear)
    return matchable


def really_matchable(pool: BlockPool) -> set[bytes]:
    return {row.tobytes() for row in ALL_HASHES[:30] if len(pool.match(row.reshape(1, 2)))}


# ---- life cycle ----


def test_life_cycle() -> None:
    pool = BlockPool(4, Lru)
    slots = pool.allocate(3)
    assert slots.tolist() == [0, 1, 2]  # a young pool touches its memory from the start
    assert pool.num_free == 1
    assert pool.states(slots).tolist() == [BlockState.PARTIAL] * 3
    assert pool.pins(slots).tolist() == [1, 1, 1]
    hashes = names(1, 2, 3)
    assert pool.find(hashes).tolist() == [-1, -1, -1]
    assert pool.complete(slots, hashes).tolist() == slots.tolist()
    assert pool.states(slots).tolist() == [BlockState.COMPLETE] * 3
    assert pool.find(hashes).tolist() == slots.tolist()
    assert len(pool.match(hashes)) == 0
    pool.register(slots[[0, 2]])
    assert pool.match(hashes).tolist() == [0]
    pool.register(slots[[1]])
    assert pool.match(hashes).tolist() == [0, 1, 2]
    np.testing.assert_array_equal(pool.hashes(slots), hashes)
    assert pool.num_registered == 3
    pool.release(slots)
    assert pool.num_free == 1
    assert pool.match(hashes).tolist() == [0, 1, 2]
    pool.withdraw(slots[[1]])
    assert pool.match(hashes).tolist() == [0]
    assert pool.num_free == 2
    assert pool.num_registered == 2


def test_match_is_the_longest_registered_prefix() -> None:
    pool = BlockPool(10, Lru)
    stored(pool, names(0, 1, 3))
    assert len(pool.match(names(0, 1, 2, 3))) == 2
    assert len(pool.match(names(2, 0, 1))) == 0
    assert len(pool.match(names())) == 0
    assert len(pool.match(names(3))) == 1


def test_match_does_not_return_what_is_only_complete() -> None:
    pool = BlockPool(4, Lru)
    slots, _ = pool.claim(names(0, 1), 4)
    assert len(pool.match(names(0, 1))) == 0
    pool.register(slots[1:])
    assert len(pool.match(names(0, 1))) == 0
    assert len(pool.match(names(1))) == 1


def test_partial_blocks_that_are_released_are_free_again() -> None:
    pool = BlockPool(4, Lru)
    pool.release(pool.allocate(4))
    assert pool.num_free == 4
    assert len(pool.allocate(4)) == 4


def test_complete_blocks_that_nobody_uses_any_more_are_gone() -> None:
    pool = BlockPool(4, Lru)
    slots, _ = pool.claim(names(0, 1), 4)
    pool.release(slots)
    assert pool.num_free == 4
    assert pool.find(names(0, 1)).tolist() == [-1, -1]


def test_allocate_gives_what_there_is() -> None:
    pool = BlockPool(4, Lru)
    first = pool.allocate(3)
    assert len(pool.allocate(3)) == 1
    assert len(pool.allocate(1)) == 0
    assert len(pool.allocate(0)) == 0
    pool.release(first)
    assert len(pool.allocate(5)) == 3


def test_only_unpinned_blocks_are_evicted() -> None:
    pool = BlockPool(6, Lru)
    stored(pool, names(0, 1, 2))
    used = pool.match(names(0, 1))
    pool.pin(used)
    assert len(pool.allocate(6)) == 4
    assert pool.match(names(0, 1, 2)).tolist() == used.tolist()
    assert pool.evictions == 1
    assert pool.num_registered == 2


# ---- duplicates ----


def test_a_duplicate_gives_way_to_the_owner() -> None:
    pool = BlockPool(6, Lru)
    owner = stored(pool, names(7))
    mine = pool.allocate(2)
    held = pool.complete(mine, names(6, 7))
    assert held.tolist() == [mine[0], owner[0]]
    assert pool.pins(held).tolist() == [1, 1]
    assert pool.states(mine).tolist() == [BlockState.COMPLETE, BlockState.RESET]
    assert pool.num_free == 4
    pool.register(held[:1])
    pool.release(held)
    assert len(pool.match(names(6, 7))) == 2
    assert pool.num_registered == 2


def test_duplicates_within_one_call_of_complete() -> None:
    pool = BlockPool(6, Lru)
    mine = pool.allocate(4)
    held = pool.complete(mine, names(3, 4, 3, 3))
    assert held.tolist() == [mine[0], mine[1], mine[0], mine[0]]
    assert pool.pins(mine).tolist() == [3, 1, 0, 0]
    assert pool.num_free == 4
    pool.register(mine[:2])
    for slot in held:
        pool.release(slots_of(slot))
    assert pool.match(names(3, 4)).tolist() == mine[:2].tolist()


def test_claim_shares_finds_and_makes() -> None:
    pool = BlockPool(6, Lru)
    there = stored(pool, names(0))
    slots, is_new = pool.claim(names(0, 1, 2, 1, 0, 2), 10)
    assert is_new.tolist() == [False, True, True, False, False, False]
    assert slots[0] == slots[4] == there[0]
    assert slots[1] == slots[3]
    assert slots[2] == slots[5]
    assert pool.pins(slots[:3]).tolist() == [2, 2, 2]
    assert pool.states(slots[:3]).tolist() == [
        BlockState.REGISTERED,
        BlockState.COMPLETE,
        BlockState.COMPLETE,
    ]
    assert pool.num_free == 3


@pytest.mark.parametrize(("capacity", "max_new"), [(2, 10), (10, 2)])
def test_claim_gives_room_in_the_order_of_the_request(capacity: int, max_new: int) -> None:
    pool = BlockPool(capacity, Lru)
    slots, is_new = pool.claim(names(0, 1, 0, 2, 1, 2, 3), max_new)
    assert (slots >= 0).tolist() == [True, True, True, False, True, False, False]
    assert is_new.tolist() == [True, True, False, False, False, False, False]
    assert pool.pins(slots[:2]).tolist() == [2, 2]
    assert pool.find(names(2, 3)).tolist() == [-1, -1]


def test_claim_does_not_evict_what_it_found() -> None:
    pool = BlockPool(4, Lru)
    there = stored(pool, names(0, 1, 2, 3))
    slots, is_new = pool.claim(names(0, 1, 2, 9, 8), 10)
    assert slots.tolist() == [*there[:3], there[3], -1]
    assert is_new.tolist() == [False, False, False, True, False]
    assert pool.find(names(3)).tolist() == [-1]


def test_claim_of_nothing() -> None:
    pool = BlockPool(4, Lru)
    slots, is_new = pool.claim(names(), 10)
    assert len(slots) == len(is_new) == 0
    slots, is_new = pool.claim(names(1), 0)
    assert slots.tolist() == [-1]
    assert not is_new.any()


def test_hashes_that_share_a_word_are_not_duplicates() -> None:
    pool = BlockPool(8, Lru)
    hashes = np.array([(1, 2 << 32), (1, 3 << 32), (2, 2 << 32), (1, 2 << 32)], np.uint64)
    slots, is_new = pool.claim(hashes, 10)
    assert is_new.tolist() == [True, True, True, False]
    assert slots[3] == slots[0]
    assert len(set(slots.tolist())) == 3


# ---- pins ----


def test_pins_are_counted() -> None:
    pool = BlockPool(2, Lru)
    slots = stored(pool, names(0, 1))
    pool.pin(slots_of(slots[0], slots[0], slots[1]))
    assert pool.pins(slots).tolist() == [2, 1]
    pool.release(slots)
    assert len(pool.allocate(2)) == 1  # only the second can go
    assert len(pool.match(names(0))) == 1
    pool.release(slots[:1])
    assert len(pool.allocate(2)) == 1
    assert len(pool.match(names(0))) == 0


def test_repeats_count_also_when_pins_are_undone() -> None:
    """As of requests that share a prefix and are released together."""
    pool = BlockPool(4, Lru)
    slots = stored(pool, names(0, 1, 2, 3))
    together = np.concatenate([slots, slots[:2]])
    pool.pin(together)
    pool.release(together)
    assert pool.pins(slots).tolist() == [0] * 4
    # Each can be evicted once, the tail first.
    assert [stored(pool, names(4 + i)).tolist() for i in range(3)] == slots[:0:-1].reshape(-1, 1).tolist()
    assert len(pool.match(names(0))) == 1
    twice, _ = pool.claim(names(8, 8), 1)  # of a caller who names a block twice
    pool.release(twice)  # unwritten, so it is free: once
    assert pool.pins(twice).tolist() == [0, 0]
    assert sorted(pool.allocate(8).tolist()) == slots.tolist()


def test_withdrawn_while_pinned_is_quarantined() -> None:
    pool = BlockPool(3, Lru)
    slots, _ = pool.claim(names(0, 1), 3)
    pool.pin(slots)
    pool.withdraw(slots)
    assert pool.find(names(0, 1)).tolist() == [-1, -1]
    assert pool.num_free == 1
    # The same content gets another slot, and what is quarantined is given to nobody.
    again, is_new = pool.claim(names(0, 1), 3)
    assert is_new.tolist() == [True, False]
    assert again.tolist()[0] not in slots.tolist()
    assert again[1] == -1
    pool.release(slots)
    assert pool.num_free == 0
    assert len(pool.allocate(1)) == 0
    pool.release(slots)
    assert pool.num_free == 2
    assert set(pool.allocate(3).tolist()) == set(slots.tolist())


def test_registered_and_withdrawn_while_pinned() -> None:
    pool = BlockPool(2, SegmentedLru)
    slots = stored(pool, names(0, 1))
    pool.pin(slots)
    pool.withdraw(slots)
    assert pool.num_registered == 0
    assert len(pool.allocate(2)) == 0
    pool.release(slots)
    assert pool.num_free == 2
    stored(pool, names(5, 6))
    assert len(pool.match(names(5, 6))) == 2
    assert len(pool.match(names(0))) == 0


def test_clear() -> None:
    pool = BlockPool(6, Lru)
    matchable = follow(pool)
    idle = stored(pool, names(0, 1))
    used, _ = pool.claim(names(2, 3), 6)
    pool.register(used[:1])
    partial = pool.allocate(1)
    assert set(pool.clear().tolist()) == {*idle.tolist(), *used.tolist()}
    assert matchable == set()
    assert pool.num_registered == 0
    assert pool.num_free == 3
    assert pool.states(partial).tolist() == [BlockState.PARTIAL]
    pool.release(used)
    assert pool.num_free == 5


# ---- events ----


def test_events_rebuild_what_can_be_matched() -> None:
    pool = BlockPool(20, Lru)
    matchable = follow(pool)
    random = np.random.default_rng(3)
    held: list[np.ndarray] = []
    for _ in range(400):
        action = random.integers(0, 5)
        if action <= 1:
            slots, is_new = pool.claim(names(*random.integers(0, 30, 4)), 4)
            pool.register(slots[is_new])
            for slot in slots[slots >= 0]:
                held.append(slots_of(slot))
        elif action == 2 and held:
            for _ in range(6):
                if held:
                    pool.release(held.pop(int(random.integers(0, len(held)))))
        elif action == 3:
            first = int(random.integers(0, 30))
            slots = pool.match(names(first))
            pool.withdraw(slots)
        elif random.integers(0, 20) == 0:
            pool.clear()
        assert matchable == really_matchable(pool)
        assert len(matchable) == pool.num_registered
    assert pool.evictions > 20


def test_a_subscription_ends() -> None:
    pool = BlockPool(4, Lru)
    heard: list[BlockEvent] = []
    unsubscribe = pool.subscribe(heard.append)
    stored(pool, names(0))
    unsubscribe()
    stored(pool, names(1))
    assert len(heard) == 1


def test_version_tells_when_a_match_may_change() -> None:
    pool = BlockPool(2, Lru)
    version = pool.version
    slots, _ = pool.claim(names(0), 2)
    pool.register(slots)
    assert pool.version > version
    pool.release(slots)
    version = pool.version
    assert len(pool.match(names(0))) == 1
    assert pool.version == version
    pool.allocate(2)  # evicts it
    assert pool.version > version
    pool = BlockPool(2, Lru)
    slots = stored(pool, names(0))
    version = pool.version
    pool.withdraw(slots)
    assert pool.version > version


# ---- a policy of the user's that is wrong ----


class Shameless(EvictionPolicy):
    """Offers whatever it likes."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.offer = np.arange(capacity)

    def insert(self, slots: np.ndarray) -> None: ...

    def reuse(self, slots: np.ndarray) -> None: ...

    def forget(self, slots: np.ndarray) -> None: ...

    def evict(self, count: int) -> np.ndarray:
        return self.offer


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_wrong_policy_never_gives_away_a_block_in_use(repeats: int) -> None:
    pool = BlockPool(8, Shameless)
    matchable = follow(pool)
    assert isinstance(pool._policy, Shameless)
    pool._policy.offer = np.concatenate([np.arange(8)] * repeats)
    idle = stored(pool, names(0, 1))
    pinned = stored(pool, names(2, 3))
    pool.pin(pinned)
    complete, _ = pool.claim(names(4), 1)
    partial = pool.allocate(1)
    quarantined, _ = pool.claim(names(5), 1)
    pool.withdraw(quarantined)
    assert pool.num_free == 1
    taken = pool.allocate(8)
    assert len(taken) == len(set(taken.tolist())) == 3
    assert set(taken.tolist()) == {*idle.tolist(), 7}
    assert pool.match(names(2, 3)).tolist() == pinned.tolist()
    assert pool.find(names(4)).tolist() == complete.tolist()
    assert pool.states(partial).tolist() == [BlockState.PARTIAL]
    assert matchable == really_matchable(pool)
    assert len(pool.allocate(1)) == 0
    assert pool.num_registered == 2


# ---- many blocks ----


def test_a_pool_of_some_size_stays_consistent() -> None:
    """Enough blocks, and turnover, that index buckets overflow."""
    pool = BlockPool(3 * 2048, Lru)
    random = np.random.default_rng(1)
    for _ in range(300):
        chain = names(*random.choice(20_000, 400, replace=False))
        slots, is_new = pool.claim(chain, 400)
        assert (slots >= 0).all()
        assert (pool.find(chain) == slots).all()
        pool.register(slots[is_new])
        assert len(pool.match(chain)) == 400
        pool.release(slots)
    assert pool.num_free + pool.num_registered == pool.capacity
    pool.clear()
    assert pool.num_free == pool.capacity


# ---- memory that is not there yet ----


def test_slots_become_usable_bit_by_bit() -> None:
    pool = BlockPool(10, Lru, usable=0)
    assert (pool.capacity, pool.usable, pool.num_free) == (10, 0, 0)
    assert len(pool.allocate(3)) == 0
    slots, is_new = pool.claim(names(0, 1), 2)
    assert slots.tolist() == [-1, -1]
    assert not is_new.any()
    pool.grow(3)
    assert (pool.usable, pool.num_free) == (3, 3)
    assert stored(pool, names(0, 1)).tolist() == [0, 1]
    pool.grow(6)
    assert (pool.usable, pool.num_free) == (6, 4)
    assert sorted(pool.allocate(9).tolist()) == [0, 1, 2, 3, 4, 5]  # what was stored made room
    assert pool.evictions == 2


def test_growth_takes_nothing_away() -> None:
    pool = BlockPool(8, Lru, usable=4)
    matchable = follow(pool)
    slots = stored(pool, names(0, 1, 2))
    version = pool.version
    pool.grow(8)
    assert pool.match(names(0, 1, 2)).tolist() == slots.tolist()
    assert matchable == really_matchable(pool)
    assert pool.version == version
    assert pool.evictions == 0
    assert pool.num_free == 5


@pytest.mark.parametrize("usable", [-1, 0, 3, 4])
def test_it_never_shrinks(usable: int) -> None:
    pool = BlockPool(8, Lru, usable=4)
    pool.grow(usable)
    assert (pool.usable, pool.num_free) == (4, 4)
    assert pool.allocate(8).tolist() == [0, 1, 2, 3]
    pool.grow(usable)  # nor does it give out what is in use
    assert (pool.usable, pool.num_free) == (4, 0)


def test_no_more_than_its_capacity() -> None:
    pool = BlockPool(8, Lru, usable=5)
    pool.grow(100)
    pool.grow(100)
    assert (pool.usable, pool.num_free) == (8, 8)
    assert sorted(pool.allocate(9).tolist()) == list(range(8))
    assert BlockPool(8, Lru).usable == BlockPool(8, Lru, usable=99).usable == 8


def test_lowest_slots_first() -> None:
    pool = BlockPool(8, Lru, usable=0)
    pool.grow(4)
    assert pool.allocate(4).tolist() == [0, 1, 2, 3]
    pool.grow(8)
    assert pool.allocate(3).tolist() == [4, 5, 6]


def test_what_was_in_use_when_the_pool_shrank_is_given_up_with_its_last_pin() -> None:
    pool = BlockPool(6, Lru)
    slots = pool.allocate(6)
    events: list[BlockEvent] = []
    pool.subscribe(events.append)
    pool.shrink(2)
    assert (pool.usable, pool.num_free, len(events)) == (2, 0, 0)
    pool.complete(slots, names(*range(6)))
    pool.register(slots)
    assert len(pool.match(names(*range(6)))) == 6
    pool.release(slots)
    assert pool.match(names(*range(6))).tolist() == [0, 1]
    assert (pool.num_registered, pool.num_free) == (2, 0)
    assert [(event.kind, len(event.hashes), event.fate) for event in events] == [
        (EventKind.STORED, 6, None),
        (EventKind.REMOVED, 4, Fate.EVICTED),
    ]
    assert pool.allocate(6).tolist() == [0, 1]
    pool.grow(6)
    assert sorted(pool.allocate(6).tolist()) == [2, 3, 4, 5]


def test_blocks_are_found_by_their_tag() -> None:
    pool = BlockPool(6, Lru)
    slots = stored(pool, names(*range(4)))
    pool.tag(slots, np.array([1, 2, 1, 3], np.uint32))
    assert pool.tagged(np.uint32(1)).tolist() == [slots[0], slots[2]]
    assert pool.tagged(np.uint32(2), np.uint32(3)).tolist() == [slots[1], slots[3]]
    pool.withdraw(slots[:1])
    assert pool.tagged(np.uint32(1)).tolist() == [slots[2]]


def test_clearing_a_pool_that_grows() -> None:
    pool = BlockPool(8, Lru, usable=3)
    stored(pool, names(0, 1))
    assert pool.clear().tolist() == [0, 1]
    assert pool.num_free == 3
    pool.grow(8)
    assert pool.num_free == 8


# ---- blocks from an earlier run ----


def adopted(policy: type[EvictionPolicy] = Lru) -> BlockPool:
    """Slots 5, 1 and 3 of 6 have blocks 0, 1 and 2, to be evicted in this order."""
    pool = BlockPool(6, policy, tier="disk", usable=0)
    pool.adopt(slots_of(5, 1, 3), names(0, 1, 2))
    return pool


def test_adopted_blocks_can_be_matched() -> None:
    pool = BlockPool(6, Lru, tier="disk", usable=0)
    matchable, version = follow(pool), pool.version
    pool.adopt(slots_of(5, 1, 3), names(0, 1, 2))
    assert pool.version > version
    assert pool.match(names(0, 1, 2)).tolist() == [5, 1, 3]
    assert matchable == really_matchable(pool)
    assert (pool.num_registered, pool.num_free, pool.usable) == (3, 0, 0)
    pool.grow(6)
    assert (pool.num_registered, pool.num_free) == (3, 3)
    assert pool.allocate(3).tolist() == [0, 2, 4]
    pool.adopt(slots_of(), names())
    assert pool.num_registered == 3


@pytest.mark.parametrize("policy", [Lru, SegmentedLru])
def test_adopted_blocks_are_evicted_in_the_order_given(policy: type[EvictionPolicy]) -> None:
    pool = adopted(policy)
    pool.grow(6)
    pool.allocate(3)
    assert [pool.allocate(1).tolist() for _ in range(4)] == [[5], [1], [3], []]


@pytest.mark.parametrize("policy", [Lru, SegmentedLru])
def test_adopted_blocks_in_several_calls(policy: type[EvictionPolicy]) -> None:
    pool = adopted(policy)
    pool.adopt(slots_of(0, 4), names(3, 4))
    pool.grow(6)
    assert [pool.allocate(1).tolist() for _ in range(6)] == [[2], [5], [1], [3], [0], [4]]


def test_adopted_blocks_that_are_withdrawn_before_the_pool_grows() -> None:
    pool = adopted()
    pool.withdraw(slots_of(1))
    assert pool.num_free == 0
    assert len(pool.allocate(1)) == 0
    pool.clear()
    assert len(pool.allocate(1)) == 0
    pool.grow(4)
    assert sorted(pool.allocate(9).tolist()) == [0, 1, 2, 3]
    pool.grow(6)
    assert sorted(pool.allocate(9).tolist()) == [4, 5]


def test_adopted_blocks_in_use_when_the_pool_grows() -> None:
    pool = adopted()
    pool.pin(slots_of(5, 3))
    pool.withdraw(slots_of(5))
    pool.grow(6)
    assert pool.num_free == 3
    pool.release(slots_of(5, 3))
    assert pool.num_free == 4
    assert sorted(pool.allocate(9).tolist()) == [0, 1, 2, 3, 4, 5]


# ---- pins of the tier below ----


def test_a_pin_without_reuse_does_not_protect_from_scans() -> None:
    pool = BlockPool(4, SegmentedLru)
    held, used = stored(pool, names(0)), stored(pool, names(1))
    pool.pin(held, reuse=False)
    pool.release(held)
    pool.pin(used)
    pool.release(used)
    for number in range(10, 15):
        stored(pool, names(number))
    assert len(pool.match(names(1))) == 1
    assert len(pool.match(names(0))) == 0


def test_what_was_reused_stays_so_when_it_is_pinned_without_reuse() -> None:
    pool = BlockPool(4, SegmentedLru)
    used = stored(pool, names(0))
    pool.pin(used)
    pool.release(used)
    pool.pin(used, reuse=False)
    pool.release(used)
    for number in range(10, 15):
        stored(pool, names(number))
    assert len(pool.match(names(0))) == 1


@pytest.mark.parametrize("policy", [Lru, SegmentedLru])
@pytest.mark.parametrize("reuse", [True, False])
def test_a_pin_keeps_from_eviction_with_and_without_reuse(policy: type[EvictionPolicy], reuse: bool) -> None:
    pool = BlockPool(3, policy)
    slots = stored(pool, names(0, 1))
    pool.pin(slots, reuse=reuse)
    assert len(pool.allocate(3)) == 1
    assert len(pool.match(names(0, 1))) == 2
    pool.release(slots)
    assert len(pool.allocate(3)) == 2


def test_a_policy_of_the_users_that_does_not_tell_them_apart() -> None:
    pool = BlockPool(3, Shameless)
    told: list[list[int]] = []
    slots = stored(pool, names(0, 1))
    pool._policy.reuse = lambda slots: told.append(slots.tolist())
    pool.pin(slots, reuse=False)
    assert told == [slots.tolist()]
