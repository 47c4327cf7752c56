"""Eviction policies: the queue below them, their order, and the loading of a user's own."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm.errors import ConfigError
from kvbm.logic.hashing import Hashes, SequenceHasher, root_hash
from kvbm.logic.operations import Completion, Direction
from kvbm.logic.planner import Planner
from kvbm.logic.policies import POLICIES, EvictionPolicy, Lru, SegmentedLru, SlotQueue, load_policy
from kvbm.logic.pool import BlockPool


def slots_of(*slots: int) -> np.ndarray:
    return np.array(slots, np.int64)


def hashes_of(first: int, count: int) -> Hashes:
    return np.random.default_rng(0).integers(0, 2**64, (10_000, 2), np.uint64)[first : first + count]


# ---- SlotQueue ----

_queue_steps = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.lists(st.integers(0, 11), unique=True, max_size=12)),
        st.tuples(st.just("remove"), st.lists(st.integers(0, 11), unique=True, max_size=12)),
        st.tuples(st.just("pop"), st.integers(0, 14)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None, print_blob=True, derandomize=False)
@given(steps=_queue_steps)
def test_queue_against_a_list(steps: list[tuple[str, list[int] | int]]) -> None:
    queue = SlotQueue(12)
    model: list[int] = []
    for action, argument in steps:
        if isinstance(argument, int):
            expected, model = model[:argument], model[argument:]
            assert queue.pop(argument).tolist() == expected
        elif action == "push":
            new = [slot for slot in argument if slot not in model]
            queue.push(slots_of(*new))
            model += new
        else:
            queue.remove(slots_of(*argument))
            model = [slot for slot in model if slot not in argument]
        assert len(queue) == len(model)
    assert queue.pop(12).tolist() == model


def test_queue_crosses_long_stretches_of_stale_entries() -> None:
    queue = SlotQueue(1000)
    queue.push(np.arange(1000))
    queue.remove(np.arange(0, 990))
    assert queue.pop(3).tolist() == [990, 991, 992]
    queue.push(np.arange(900))
    queue.remove(np.arange(890))  # the log has been squeezed once
    queue.push(np.arange(5))
    assert queue.pop(1000).tolist() == [*range(993, 1000), *range(890, 900), *range(5)]
    assert queue.pop(1).tolist() == []


# ---- policies in a pool ----


def fill(pool: BlockPool, hashes: Hashes) -> np.ndarray:
    """Store a sequence and end it."""
    slots, _ = pool.claim(hashes, pool.capacity)
    pool.register(slots[pool.states(slots) == 2])
    pool.release(slots)
    return slots


def use(pool: BlockPool, hashes: Hashes) -> None:
    """Load a sequence that is there."""
    slots = pool.match(hashes)
    assert len(slots) == len(hashes)
    pool.pin(slots)
    pool.release(slots)


@pytest.mark.parametrize("policy", POLICIES.values())
def test_tail_goes_before_head(policy: type[EvictionPolicy]) -> None:
    pool = BlockPool(8, policy)
    chain = hashes_of(0, 6)
    fill(pool, chain)
    for taken in range(1, 9):
        assert len(pool.allocate(1)) == 1
        assert len(pool.match(chain)) == min(6, 8 - taken)


@pytest.mark.parametrize("policy", POLICIES.values())
@pytest.mark.parametrize("ends", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_tail_goes_before_head_in_whatever_order_its_copies_end(
    policy: type[EvictionPolicy], ends: tuple[int, ...]
) -> None:
    pool = BlockPool(8, policy)
    planner = Planner(pool, ranks=1, max_batch_blocks=2, max_queued_blocks=8, timeout_s=1.0)
    hasher = SequenceHasher(root_hash(b"n", 1), 1)
    hasher.extend(range(6))
    planner.add_request("a", hasher)
    operations, _ = planner.finish("a", 6, 0.0, range(6))
    for i in ends:
        planner.complete(0, Completion(operations[i].id, np.empty(0, np.int32)))
    for taken in range(1, 9):
        assert len(pool.allocate(1)) == 1
        assert len(pool.match(hasher.hashes)) == min(6, 8 - taken)


@pytest.mark.parametrize("policy", POLICIES.values())
def test_oldest_sequence_goes_first(policy: type[EvictionPolicy]) -> None:
    pool = BlockPool(9, policy)
    for first in (0, 3, 6):
        fill(pool, hashes_of(first, 3))
    pool.allocate(3)
    assert [len(pool.match(hashes_of(first, 3))) for first in (0, 3, 6)] == [0, 3, 3]


def test_lru_follows_use() -> None:
    pool = BlockPool(9, Lru)
    for first in (0, 3, 6):
        fill(pool, hashes_of(first, 3))
    use(pool, hashes_of(0, 3))
    pool.allocate(3)
    assert [len(pool.match(hashes_of(first, 3))) for first in (0, 3, 6)] == [3, 0, 3]


def scan(pool: BlockPool, blocks: int, length: int = 10) -> None:
    for first in range(1000, 1000 + blocks, length):
        fill(pool, hashes_of(first, length))


@pytest.mark.parametrize(("policy", "left"), [(Lru, 0), (SegmentedLru, 50)])
def test_scan(policy: type[EvictionPolicy], left: int) -> None:
    pool = BlockPool(100, policy)
    working_set = hashes_of(0, 50)
    fill(pool, working_set)
    use(pool, working_set)
    scan(pool, 10 * pool.capacity)
    assert len(pool.match(working_set)) == left


@pytest.mark.parametrize(("policy", "left"), [(Lru, 0), (SegmentedLru, 50)])
def test_scan_through_the_planner(policy: type[EvictionPolicy], left: int) -> None:
    """As above, but stored and loaded by requests, as it happens in an engine."""
    pool = BlockPool(100, policy)
    planner = Planner(pool, ranks=1, max_batch_blocks=16, max_queued_blocks=1000, timeout_s=1.0)
    root = root_hash(b"n", 1)
    serial = iter(range(10_000))

    def serve(tokens: list[int]) -> None:
        id_ = str(next(serial))
        hasher = SequenceHasher(root, 1)
        hasher.extend(tokens)
        planner.add_request(id_, hasher)
        table = list(range(len(tokens)))
        planner.set_table(id_, table)
        operations = []
        if cached := planner.match(id_, 0):
            load = planner.load(id_, 0, cached, 0.0)
            assert load is not None
            planner.complete(0, Completion(load.id, np.empty(0, np.int32)))
        for done in range(cached, len(tokens), 10):
            operations += planner.store([(id_, min(done + 10, len(tokens)))], 0.0)[0]
        more, _ = planner.finish(id_, len(tokens), 0.0, table)
        for operation in [*operations, *more]:
            assert operation.direction == Direction.OFFLOAD
            planner.complete(0, Completion(operation.id, np.empty(0, np.int32)))

    working_set = list(range(50))
    serve(working_set)
    serve(working_set)
    for first in range(1000, 2000, 10):
        serve(list(range(first, first + 10)))
    hasher = SequenceHasher(root, 1)
    hasher.extend(working_set)
    assert len(pool.match(hasher.hashes)) == left


def test_segmented_gives_up_what_is_protected_when_there_is_nothing_else() -> None:
    pool = BlockPool(10, SegmentedLru)
    fill(pool, hashes_of(0, 10))
    use(pool, hashes_of(0, 10))
    assert len(pool.allocate(10)) == 10


def test_segmented_protects_at_most_its_share() -> None:
    pool = BlockPool(10, SegmentedLru)
    fill(pool, hashes_of(0, 10))
    use(pool, hashes_of(0, 10))
    scan(pool, 100, 2)
    # The tail was demoted, the rest of the share stayed.
    assert len(pool.match(hashes_of(0, 10))) == 8


def test_segmented_forgets_that_the_former_block_of_a_slot_was_reused() -> None:
    """The next block in a slot starts on probation, however the former one left it."""
    pool = BlockPool(10, SegmentedLru)
    former = hashes_of(0, 10)
    fill(pool, former)
    use(pool, former)
    evicted = hashes_of(100, 10)
    fill(pool, evicted)  # takes the slots of blocks that were protected
    working_set = hashes_of(200, 2)
    fill(pool, working_set)
    use(pool, working_set)
    fill(pool, hashes_of(300, 8))
    fill(pool, hashes_of(400, 8))
    assert len(pool.match(working_set)) == 2


def test_segmented_forgets_an_abandoned_block() -> None:
    policy = SegmentedLru(4)
    pool = BlockPool(4, lambda _: policy)  # type: ignore[arg-type]
    slots, _ = pool.claim(hashes_of(0, 2), 2)
    pool.pin(slots)  # a second request wants the blocks, which are never written
    pool.release(slots)
    pool.release(slots)
    assert pool.num_free == 4
    assert not policy._reused.any()


# ---- loading ----


@pytest.mark.parametrize("name", POLICIES)
def test_known_names(name: str) -> None:
    assert load_policy(name) is POLICIES[name]


@pytest.mark.parametrize(
    "name", ["", "lrru", "no_such_module:Policy", "json:NoSuchClass", "json", ":", "json:", ".:X"]
)
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError, match=r"host\.policy") as caught:
        load_policy(name)
    assert "lru, segmented-lru" in str(caught.value)


@pytest.mark.parametrize("name", ["json:dumps", "json:JSONDecoder"])
def test_what_is_no_policy(name: str) -> None:
    with pytest.raises(ConfigError, match="not a subclass"):
        load_policy(name)


def test_a_module_that_fails_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvbm_broken_policy.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="no_such_module_anywhere"):
        load_policy("kvbm_broken_policy:Policy")


def test_a_users_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    class MostRecent(EvictionPolicy):
        def __init__(self, capacity: int) -> None:
            super().__init__(capacity)
            self.order: list[int] = []

        def insert(self, slots: np.ndarray) -> None:
            self.order += slots.tolist()

        def reuse(self, slots: np.ndarray) -> None:
            self.order = [slot for slot in self.order if slot not in slots]

        forget = reuse

        def evict(self, count: int) -> np.ndarray:
            victims, self.order = self.order[::-1][:count], self.order[::-1][count:][::-1]
            return slots_of(*victims)

    module = types.ModuleType("kvbm_users_policy")
    module.MostRecent = MostRecent  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvbm_users_policy", module)
    policy = load_policy("kvbm_users_policy:MostRecent")
    assert policy is MostRecent
    pool = BlockPool(9, policy)
    for first in (0, 3, 6):
        fill(pool, hashes_of(first, 3))
    pool.allocate(3)
    assert [len(pool.match(hashes_of(first, 3))) for first in (0, 3, 6)] == [3, 3, 0]
