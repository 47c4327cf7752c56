"""KV events: what a router rebuilds from the merged stream is what the tiers hold. No vLLM is needed."""

import logging
from array import array
from collections import Counter
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbm.config import load_config
from kvbm.logic.hashing import SequenceHasher, root_hash
from kvbm.runtime.leader import Leader
from kvbm.vllm_integration import events
from kvbm.vllm_integration.events import CPU, GPU, STORAGE, Block, EventMerger, merge_events

SIZE = 4


# ---- vLLM's events, as far as they matter


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    session_id: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True):
    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    pass


TYPES = SimpleNamespace(BlockStored=BlockStored, BlockRemoved=BlockRemoved, AllBlocksCleared=AllBlocksCleared)


class Router:
    """What a router knows, and all that it would take offence at. An index for each medium, as they have."""

    def __init__(self) -> None:
        self.known: dict[str, set[int]] = {GPU: set(), CPU: set(), STORAGE: set()}

    def read(self, batch: list[Any]) -> None:
        for event in batch:
            if isinstance(event, BlockStored):
                assert event.medium is not None
                names = event.block_hashes
                assert len({event.parent_block_hash, *names}) == len(names) + 1
                assert len(event.token_ids) == event.block_size * len(names)
                assert event.extra_keys is None or len(event.extra_keys) == len(names)
                parents = [event.parent_block_hash, *names[:-1]]
                for i, (name, parent) in enumerate(zip(names, parents, strict=True)):
                    assert name not in self.known[event.medium], "announced twice"
                    assert parent == parent_of(name)
                    assert event.token_ids[i * SIZE : i * SIZE + SIZE] == tokens_of(name)
                    self.known[event.medium].add(name)
            elif isinstance(event, BlockRemoved):
                assert event.medium is not None
                for name in event.block_hashes:
                    self.known[event.medium].remove(name)
            else:
                assert not any(self.known.values()), "says again what was said block by block"

    @property
    def union(self) -> set[int]:
        return set().union(*self.known.values())


# ---- blocks: 10 * chain + position; position 0 has no parent


def parent_of(name: int) -> int | None:
    return name - 1 if name % 10 else None


def tokens_of(name: int) -> list[int]:
    return [100 * name + i for i in range(SIZE)]


def key(name: int, salt: int = 0) -> bytes:
    return bytes([name, salt]) * 8


def block(name: int) -> Block:
    return Block(name, parent_of(name), array("I", tokens_of(name)), (None, None), None)


def stored(*names: int) -> BlockStored:
    tokens = [token for name in names for token in tokens_of(name)]
    extra: list[Any] = [None for _ in names]
    return BlockStored(list(names), parent_of(names[0]), tokens, SIZE, None, GPU, None, extra, 0, "session")


def removed(*names: int) -> BlockRemoved:
    return BlockRemoved(list(names), GPU, 0)


def merger(mode: str = "dedup", max_expected: int = 1000) -> EventMerger:
    return EventMerger(TYPES, block_size=SIZE, mode=mode, max_expected=max_expected)


BIT = {CPU: 1, STORAGE: 2}


class Histories(RuleBasedStateMachine):
    """Random histories of a device cache with copies and of two tiers, read by a router after each event."""

    mode = "dedup"

    def __init__(self) -> None:
        super().__init__()
        self.merger = merger(self.mode)
        self.router = Router()
        self.device: Counter[int] = Counter()
        self.tiers: dict[str, set[bytes]] = {CPU: set(), STORAGE: set()}
        self.noted: dict[bytes, int] = {}

    chains = st.integers(0, 2)
    names = st.integers(0, 2).flatmap(lambda c: st.integers(10 * c, 10 * c + 4))

    @rule(chain=chains, start=st.integers(0, 4), count=st.integers(1, 4))
    def device_stores(self, chain: int, start: int, count: int) -> None:
        names = [10 * chain + i for i in range(start, min(start + count, 5))]
        event = stored(*names)
        before = msgspec.json.encode(event)
        self.merger.engine([event])
        assert msgspec.json.encode(event) == before  # it may have to be published as it was
        self.device.update(names)

    @precondition(lambda self: self.device)
    @rule(data=st.data())
    def device_evicts(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.device)))
        self.merger.engine([removed(name)])
        self.device[name] -= 1
        self.device += Counter()

    @rule()
    def device_is_cleared(self) -> None:
        self.merger.engine([AllBlocksCleared()])
        self.device.clear()

    @rule(name=names, salt=st.integers(0, 1))
    def request_names_a_block(self, name: int, salt: int) -> None:
        """Two of our hashes may have one name: what tells them apart, vLLM does not hash."""
        own = key(name, salt)
        self.noted[own] = name
        held = sum(BIT[medium] for medium, keys in self.tiers.items() if own in keys)
        self.merger.expect(own, block(name), held)

    @rule(medium=st.sampled_from([CPU, STORAGE]), name=names, salt=st.integers(0, 1))
    def tier_stores(self, medium: str, name: int, salt: int) -> None:
        self.merger.stored(medium, [key(name, salt)])
        self.tiers[medium].add(key(name, salt))

    @rule(medium=st.sampled_from([CPU, STORAGE]), names=st.sets(names, min_size=1), salt=st.integers(0, 1))
    def tier_removes(self, medium: str, names: set[int], salt: int) -> None:
        keys = [own for own in (key(name, salt) for name in sorted(names)) if own in self.tiers[medium]]
        self.merger.removed(medium, keys)
        self.tiers[medium].difference_update(keys)

    @rule(medium=st.sampled_from([CPU, STORAGE]))
    def tier_breaks(self, medium: str) -> None:
        self.merger.lose(medium)
        self.tiers[medium].clear()

    @invariant()
    def router_knows_what_is_held(self) -> None:
        self.router.read(self.merger.take())
        assert not self.merger.pending
        held: dict[str, set[int]] = {GPU: set(self.device)}
        for medium, keys in self.tiers.items():
            # Blocks of an earlier run, which no request has named yet, are not known by name.
            held[medium] = {self.noted[own] for own in keys if own in self.noted}
        if self.mode == "passthrough":
            assert self.router.known == held
        else:
            assert self.router.union == set().union(*held.values())
            assert sum(map(len, self.router.known.values())) == len(self.router.union)


class PassthroughHistories(Histories):
    mode = "passthrough"


TestDedup = Histories.TestCase
TestDedup.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPassthrough = PassthroughHistories.TestCase
TestPassthrough.settings = TestDedup.settings


def test_first_and_last_holder_speak_in_dedup() -> None:
    m = merger()
    m.engine([stored(0, 1)])
    for name in (0, 1):
        m.expect(key(name), block(name), 0)
    m.stored(CPU, [key(0), key(1)])
    m.stored(STORAGE, [key(0)])
    m.engine([removed(1), removed(0)])
    m.removed(CPU, [key(1), key(0)])
    # The medium is the one of the announcement: routers keep an index for each.
    assert m.take() == [stored(0, 1), BlockRemoved([1], GPU, 0)]
    m.removed(STORAGE, [key(0)])
    assert m.take() == [BlockRemoved([0], GPU, 0)]


def test_every_tier_speaks_in_passthrough() -> None:
    m = merger("passthrough")
    m.engine([stored(0)])
    m.expect(key(0), block(0), 0)
    m.stored(CPU, [key(0)])
    m.engine([removed(0)])
    cpu = BlockStored([0], None, tokens_of(0), SIZE, None, CPU, None, [None], 0)
    assert m.take() == [stored(0), cpu, BlockRemoved([0], GPU, 0)]


def test_events_of_a_chain_are_joined() -> None:
    m = merger()
    for name in (0, 1, 2, 11):
        m.expect(key(name), block(name), 0)
    m.stored(CPU, [key(0), key(1), key(2), key(11)])
    m.removed(CPU, [key(1), key(0)])
    chain, other, gone = m.take()
    assert (chain.block_hashes, chain.parent_block_hash) == ([0, 1, 2], None)
    assert chain.token_ids == [*tokens_of(0), *tokens_of(1), *tokens_of(2)]
    assert chain.extra_keys == [None, None, None]
    assert (other.block_hashes, other.parent_block_hash) == ([11], 10)
    assert gone == BlockRemoved([1, 0], CPU, 0)


def test_adapters_are_not_joined() -> None:
    m = merger()
    for name, lora in ((0, (1, "a")), (1, (2, "b"))):
        m.expect(key(name), Block(name, parent_of(name), array("I", tokens_of(name)), lora, ("x",)), 1)
    first, second = m.take()
    assert (first.lora_id, first.lora_name, first.extra_keys) == (1, "a", [("x",)])
    assert (second.lora_id, second.lora_name) == (2, "b")


def test_an_event_of_the_engine_is_divided_around_known_blocks() -> None:
    m = merger()
    m.engine([stored(1)])
    m.engine([stored(0, 1, 2, 3)])
    got = [(event.block_hashes, event.parent_block_hash, event.session_id) for event in m.take()]
    assert got == [([1], 0, "session"), ([0], None, "session"), ([2, 3], 1, "session")]


def test_a_cleared_device_is_told_block_by_block_while_a_tier_holds_something() -> None:
    """Whoever takes AllBlocksCleared for "forget this worker" would forget what can still be loaded."""
    m = merger()
    m.engine([stored(0, 1)])
    m.expect(key(0), block(0), 1)
    m.take()
    m.engine([AllBlocksCleared()])
    assert m.pending
    assert m.take() == [BlockRemoved([1], GPU, 0)]
    m.engine([AllBlocksCleared()])
    m.removed(CPU, [key(0)])
    assert m.take() == [BlockRemoved([0], GPU, 0), AllBlocksCleared()]


def test_a_clear_of_nothing_is_passed_on() -> None:
    m = merger()
    m.engine([AllBlocksCleared()])
    assert m.pending
    assert m.take() == [AllBlocksCleared()]


def test_foreign_media_pass() -> None:
    m = merger()
    foreign = [BlockStored([5], None, [1], 1, None, "FS", None), BlockRemoved([5], "FS")]
    m.engine(foreign)
    assert m.take() == foreign


def test_repeats_pass_and_count_for_nothing() -> None:
    m = merger()
    m.engine([stored(0)])
    m.relay([stored(0)])
    m.engine([removed(0)])
    assert m.take() == [stored(0), stored(0), BlockRemoved([0], GPU, 0)]


def test_what_is_remembered_has_a_bound() -> None:
    m = merger(max_expected=3)
    for name in range(9):
        m.expect(key(name), block(name), 1 if name < 2 else 0)
    assert len(m) == 2 + 3
    m.removed(CPU, [key(0), key(1)])
    m.expect(key(20), block(20), 0)
    assert len(m) == 3
    m.stored(CPU, [key(2)])  # forgotten: announced when a request names it again
    assert [event.block_hashes for event in m.take() if isinstance(event, BlockStored)] == [[0, 1]]
    m.expect(key(2), block(2), 1)
    assert [event.block_hashes for event in m.take()] == [[2]]


# ---- over a leader and a block pool


class FakePool:
    """vLLM's block pool, as far as events go."""

    def __init__(self, publishes: bool = True) -> None:
        self.enable_kv_cache_events = publishes
        self.kv_event_queue: list[Any] = []
        self.num_gpu_blocks = 8

    def take_events(self) -> list[Any]:
        taken, self.kv_event_queue = self.kv_event_queue, []
        return taken

    def emit_cached_block_events(self, name: int) -> None:
        self.kv_event_queue.append(stored(name))


class Engine:
    """A leader with host and disk tier, a pool, and requests whose blocks are named by `first` + position."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mode: str = "dedup", publishes: bool = True) -> None:
        config = load_config(environ={}, host__num_blocks=8, disk__num_blocks=16)
        self.leader = Leader(
            config, namespace=b"n" * 16, block_size=SIZE, num_slots=8, ranks=1, disk_slots=16,
            disk_record_bytes=1,
        )  # fmt: skip
        self.disk = self.leader.disk
        assert self.disk is not None
        self.leader.pool.grow(8)
        self.disk.pool.grow(16)
        self.mode = mode
        self.pool = FakePool(publishes)
        monkeypatch.setattr(events.compat, "event_hashes", lambda pool, request, _, a, b: request.names[a:b])
        monkeypatch.setattr(events.compat, "event_extra_keys", lambda *_: None)
        monkeypatch.setattr(events.compat, "event_types", lambda: TYPES)
        self.events = merge_events(self.pool, self.leader, block_size=SIZE, mode=mode)

    def request(self, chain: int, count: int) -> tuple[Any, Any]:
        names = [10 * chain + i for i in range(count)]
        tokens = [token for name in names for token in tokens_of(name)]
        hasher = SequenceHasher(root_hash(b"n" * 16, SIZE), SIZE)
        hasher.extend(tokens)
        return SimpleNamespace(names=names, all_token_ids=tokens, lora_request=None), hasher

    def note(self, chain: int, count: int, first: int = 0) -> Any:
        request, hasher = self.request(chain, count)
        assert self.events is not None
        self.events.note(request, hasher, first)
        return hasher.hashes

    def store(self, tier: str, hashes: Any) -> Any:
        assert self.disk is not None
        pool = self.leader.pool if tier == "host" else self.disk.pool
        slots, _ = pool.claim(hashes, 16)
        pool.register(slots)
        pool.release(slots)
        return slots


@pytest.fixture(params=["dedup", "passthrough"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch, request.param)


def test_the_pool_publishes_what_is_merged(engine: Engine) -> None:
    engine.pool.kv_event_queue.append(stored(10, 11))
    assert engine.events is not None
    assert engine.events.pending
    hashes = engine.note(1, 3)
    engine.store("host", hashes)
    router = Router()
    router.read(engine.pool.take_events())
    assert router.known[GPU] == {10, 11}
    assert router.known[CPU] == ({12} if engine.mode == "dedup" else {10, 11, 12})
    assert not engine.events.pending
    engine.pool.kv_event_queue += [removed(11), removed(10)]
    engine.leader.reset()
    router.read(engine.pool.take_events())
    assert router.union == set()


def test_blocks_noted_in_pieces_have_their_parents(engine: Engine) -> None:
    engine.note(1, 2)
    engine.store("host", engine.note(1, 4, first=2))
    (event,) = engine.pool.take_events()
    assert (event.block_hashes, event.parent_block_hash) == ([10, 11, 12, 13], None)


def test_blocks_of_an_earlier_run_are_announced_when_a_request_names_them(engine: Engine) -> None:
    engine.store("disk", engine.request(1, 3)[1].hashes)
    assert engine.pool.take_events() == []
    engine.note(1, 3)
    (event,) = engine.pool.take_events()
    assert (event.block_hashes, event.medium) == ([10, 11, 12], STORAGE)


def test_what_another_thread_changes_waits_for_the_schedulers(engine: Engine) -> None:
    hashes = engine.note(1, 2)
    engine.store("host", hashes)
    router = Router()
    router.read(engine.pool.take_events())
    engine.pool.kv_event_queue.append(stored(77))
    assert engine.leader.administer(lambda upkeep, now: upkeep.clear("host", None)) == 2
    assert len(engine.pool.kv_event_queue) == 1  # nobody but the engine's thread takes from it
    engine.store("host", hashes[:1])
    router.read(engine.pool.take_events())
    assert router.union == {10, 77}


@pytest.mark.parametrize("what", ["all", "disk"])
def test_a_tier_that_goes_off_is_withdrawn(engine: Engine, what: str) -> None:
    engine.store("host", engine.note(1, 2))
    engine.store("disk", engine.note(2, 2))
    router = Router()
    router.read(engine.pool.take_events())
    assert router.union == {10, 11, 20, 21}
    assert engine.disk is not None
    if what == "all":
        engine.leader.off_reason = "test"
    else:
        engine.disk.turn_off("test")
    for chain in (3, 4):
        engine.store("disk", engine.note(chain, 1))  # was under way
        engine.note(2, 2)
        router.read(engine.pool.take_events())
        assert router.union == (set() if what == "all" else {10, 11})


def test_repeats_on_demand_of_a_request(engine: Engine) -> None:
    engine.pool.kv_event_queue.append(stored(10))
    engine.pool.emit_cached_block_events(10)
    assert engine.pool.take_events() == [stored(10), stored(10)]
    engine.pool.kv_event_queue.append(removed(10))
    assert engine.pool.take_events() == [BlockRemoved([10], GPU, 0)]


@pytest.mark.parametrize("where", ["note", "tier", "take", "repeat"])
def test_an_error_of_ours_leaves_the_engine_its_own_events(
    engine: Engine, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine.store("host", engine.note(1, 2))
    engine.pool.kv_event_queue.append(stored(20))
    assert engine.pool.take_events()
    engine.pool.kv_event_queue.append(stored(21))
    engine.store("disk", engine.note(3, 1))  # the engine's event is with us now

    def broken(*_: Any) -> None:
        raise RuntimeError("injected")

    with caplog.at_level(logging.ERROR):
        if where == "note":
            monkeypatch.setattr(events.compat, "event_hashes", broken)
            engine.note(4, 1)
        elif where == "tier":
            monkeypatch.setattr(EventMerger, "stored", broken)
            engine.store("host", engine.note(4, 1))
        elif where == "repeat":
            monkeypatch.setattr(EventMerger, "relay", broken)
            engine.pool.emit_cached_block_events(20)
        else:
            monkeypatch.setattr(EventMerger, "take", broken)
    engine.pool.kv_event_queue.append(stored(22))
    # What had been said of our tiers is taken back first.
    repeated = [stored(20)] if where == "repeat" else []
    assert engine.pool.take_events() == [AllBlocksCleared(), stored(21), *repeated, stored(22)]
    engine.pool.kv_event_queue.append(removed(22))
    assert engine.events is not None
    assert not engine.events.pending
    engine.note(5, 1)
    engine.store("disk", engine.request(5, 1)[1].hashes)
    engine.pool.emit_cached_block_events(20)
    assert engine.pool.take_events() == [removed(22), stored(20)]
    assert engine.pool.take_events() == []
    assert caplog.text.count("internal error") == 1


def test_an_engine_without_events_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, publishes=False)
    assert engine.events is None
    assert "take_events" not in vars(engine.pool)
    assert not any(engine.leader.pool._subscribers.values())


def test_an_engine_that_can_not_be_hooked_starts_none_the_less(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(FakePool, "take_events")
    engine = Engine(monkeypatch)
    assert engine.events is None
    assert "published alone" in caplog.text


def test_keys() -> None:
    hashes = np.array([[1, 2], [3, 0]], np.uint64)
    assert events.keys_of(hashes) == [hashes[0].tobytes(), hashes[1].tobytes()]
    assert events.keys_of(hashes[:0]) == []
