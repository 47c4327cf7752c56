"""The block pool against a model in plain Python, under random sequences of calls."""

import os
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbm.logic.hashing import Hashes
from kvbm.logic.policies import Lru, SegmentedLru
from kvbm.logic.pool import BlockEvent, BlockPool, BlockState, EventKind

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "100"))

NAMES = 16
HASHES: Hashes = np.random.default_rng(11).integers(0, 2**64, (NAMES, 2), np.uint64)
NAME_OF = {row.tobytes(): name for name, row in enumerate(HASHES)}

_numbers = st.lists(st.integers(0, NAMES - 1), max_size=6)
_any = st.integers(0, 10**6)


def array(*slots: int) -> np.ndarray:
    return np.array(slots, np.int64)


def hashes_of(names: list[int]) -> Hashes:
    return HASHES[names].reshape(-1, 2)


@dataclass
class Block:
    state: BlockState = BlockState.RESET
    name: int | None = None
    pins: int = 0
    tag: int | None = None  # None: nobody has said


class PoolMachine(RuleBasedStateMachine):
    @initialize(
        capacity=st.integers(1, 10),
        policy=st.sampled_from([Lru, SegmentedLru]),
        usable=st.none() | st.integers(0, 10),
    )
    def start(self, capacity: int, policy: type[Lru] | type[SegmentedLru], usable: int | None) -> None:
        self.pool = BlockPool(capacity, policy, usable=usable)
        self.usable = capacity if usable is None else min(usable, capacity)
        self.exact_order = policy is Lru
        self.blocks = [Block() for _ in range(capacity)]
        self.order: list[int] = []  # least recently used first
        self.holds: list[list[int]] = []  # distinct slots with a pin each, in the order of their sequence
        self.partial: list[list[int]] = []  # the same, of blocks without a name
        self.heard: set[int] = set()
        self.evicted: list[int] = []
        self.pool.subscribe(self.hear)

    def hear(self, event: BlockEvent) -> None:
        names = {NAME_OF[row.tobytes()] for row in event.hashes}
        assert len(names) == len(event.hashes)
        if event.kind == EventKind.STORED:
            assert not names & self.heard
            self.heard |= names
        else:
            assert names <= self.heard
            self.heard -= names

    # ---- the model ----

    def slot_of(self, name: int) -> int:
        return next((slot for slot, block in enumerate(self.blocks) if block.name == name), -1)

    def free_slots(self) -> set[int]:
        return {
            s for s, b in enumerate(self.blocks[: self.usable]) if b.state == BlockState.RESET and not b.pins
        }

    def model_allocate(self, wanted: int, taken: list[int]) -> None:
        """Check what an allocation took: what was free, and of the rest what may be evicted, in order."""
        free = self.free_slots()
        needed = max(0, wanted - len(free))
        evictable = {s for s, b in enumerate(self.blocks) if b.state == BlockState.REGISTERED and not b.pins}
        assert len(taken) == len(set(taken)) == min(wanted, len(free) + len(evictable))
        gone = {s for s in evictable if (self.blocks[s].name not in self.heard)}
        assert len(gone) == min(needed, len(evictable)), "evicts what it needs, and no more"
        assert set(taken) <= free | gone
        if self.exact_order:
            assert gone == set(self.order[: len(gone)]), "least recently used first, tail before head"
        for slot in gone:
            self.blocks[slot] = Block()
            self.order.remove(slot)
        for slot in taken:
            self.blocks[slot] = Block(BlockState.PARTIAL, None, 1)

    def model_pin(self, slot: int) -> None:
        self.blocks[slot].pins += 1
        if slot in self.order:
            self.order.remove(slot)

    def model_release(self, slots: list[int]) -> None:
        for slot in slots:
            self.blocks[slot].pins -= 1
        for slot in reversed(slots):
            block = self.blocks[slot]
            if not block.pins:
                if block.state == BlockState.REGISTERED and slot < self.usable:
                    self.order.append(slot)
                else:
                    self.blocks[slot] = Block()

    def model_withdraw(self, slots: list[int]) -> None:
        for slot in slots:
            self.blocks[slot] = Block(BlockState.RESET, None, self.blocks[slot].pins)
            if slot in self.order:
                self.order.remove(slot)

    # ---- calls ----

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        slots = self.pool.allocate(count).tolist()
        self.model_allocate(count, slots)
        if slots:
            self.partial.append(slots)

    @precondition(lambda self: self.partial)
    @rule(which=_any, names=st.lists(st.integers(0, NAMES - 1), min_size=5, max_size=5))
    def complete(self, which: int, names: list[int]) -> None:
        slots = self.partial.pop(which % len(self.partial))
        names = names[: len(slots)]
        owners = self.pool.complete(array(*slots), hashes_of(names)).tolist()
        given_back = []
        for slot, name, owner in zip(slots, names, owners, strict=True):
            expected = self.slot_of(name)
            if expected < 0:
                assert owner == slot
                self.blocks[slot].state = BlockState.COMPLETE
                self.blocks[slot].name = name
            else:
                assert owner == expected
                self.model_pin(owner)
                given_back.append(slot)
        self.model_release(given_back)
        self.hold(owners)

    def hold(self, slots: list[int]) -> None:
        """Remember one pin for each; equal slots go to holds of their own."""
        while slots:
            chain = list(dict.fromkeys(slots))
            self.holds.append(chain)
            for slot in chain:
                slots.remove(slot)

    @rule(names=_numbers, max_new=st.integers(0, 6))
    def claim(self, names: list[int], max_new: int) -> None:
        got, is_new = self.pool.claim(hashes_of(names), max_new)
        slots = got.tolist()
        found = [self.slot_of(name) for name in names]
        for slot in found:
            if slot >= 0:
                self.model_pin(slot)
        missing = list(dict.fromkeys(name for name, slot in zip(names, found, strict=True) if slot < 0))
        new = {name: slot for name, slot, fresh in zip(names, slots, is_new, strict=True) if fresh}
        assert list(new) == missing[: len(new)], "room is given out in order"
        wanted = missing[:max_new]
        if missing:
            self.model_allocate(len(wanted), list(new.values()))
        assert len(new) == int(is_new.sum())
        for name, slot in new.items():
            self.blocks[slot] = Block(BlockState.COMPLETE, name, 0)
        for name, slot, before in zip(names, slots, found, strict=True):
            assert slot == (before if before >= 0 else new.get(name, -1))
            if before < 0 <= slot:
                self.blocks[slot].pins += 1
        self.hold([slot for slot in slots if slot >= 0])

    @precondition(lambda self: self.holds)
    @rule(which=_any, mask=_any)
    def register(self, which: int, mask: int) -> None:
        chain = self.holds[which % len(self.holds)]
        slots = [
            slot
            for i, slot in enumerate(chain)
            if mask >> i & 1 and self.blocks[slot].state == BlockState.COMPLETE
        ]
        for slot in slots:
            self.blocks[slot].state = BlockState.REGISTERED
        self.pool.register(array(*slots))

    @precondition(lambda self: self.holds)
    @rule(which=_any)
    def pin_again(self, which: int) -> None:
        chain = self.holds[which % len(self.holds)]
        self.pool.pin(array(*chain))
        for slot in chain:
            self.model_pin(slot)
        self.holds.append(list(chain))

    @rule(names=_numbers)
    def come_and_go(self, names: list[int]) -> None:
        """A sequence is stored and let go as a whole: its tail is the first to be evicted."""
        before = len(self.holds)
        self.claim(list(dict.fromkeys(names)), len(self.blocks))
        if len(self.holds) > before:
            self.register(before, -1)
            self.release(before)

    @rule(names=_numbers)
    def match_and_pin(self, names: list[int]) -> None:
        slots = self.pool.match(hashes_of(names)).tolist()
        expected = []
        for name in names:
            slot = self.slot_of(name)
            if slot < 0 or self.blocks[slot].state != BlockState.REGISTERED:
                break
            expected.append(slot)
        assert slots == expected
        self.pool.pin(array(*slots))
        for slot in slots:
            self.model_pin(slot)
        self.hold(slots)

    @precondition(lambda self: self.holds or self.partial)
    @rule(which=_any)
    def release(self, which: int) -> None:
        lists = [*self.holds, *self.partial]
        chain = lists[which % len(lists)]
        (self.holds if which % len(lists) < len(self.holds) else self.partial).remove(chain)
        self.pool.release(array(*chain))
        self.model_release(chain)

    @rule(mask=_any)
    def withdraw(self, mask: int) -> None:
        slots = [
            slot
            for slot, block in enumerate(self.blocks)
            if mask >> slot & 1 and mask % 3 == 0 and block.state >= BlockState.COMPLETE
        ]
        self.model_withdraw(slots)
        self.pool.withdraw(array(*slots))

    @precondition(lambda self: self.usable < len(self.blocks))
    @rule(usable=st.integers(0, 11))
    def grow(self, usable: int) -> None:
        self.pool.grow(usable)
        self.usable = max(self.usable, min(usable, len(self.blocks)))

    @precondition(lambda self: self.usable > 1)
    @rule(usable=st.integers(0, 11), sure=st.integers(0, 2))
    def shrink(self, usable: int, sure: int) -> None:
        if sure:
            return
        lost = [
            slot
            for slot, block in enumerate(self.blocks)
            if slot >= usable and block.state >= BlockState.COMPLETE
        ]
        assert self.pool.beyond(usable).tolist() == lost
        self.model_withdraw(lost)
        self.pool.shrink(usable)
        self.usable = min(self.usable, usable)

    @precondition(lambda self: self.holds)
    @rule(which=_any, tag=st.integers(0, 2))
    def tag(self, which: int, tag: int) -> None:
        chain = self.holds[which % len(self.holds)]
        self.pool.tag(array(*chain), np.uint32(tag))
        for slot in chain:
            self.blocks[slot].tag = tag

    @rule(tags=st.lists(st.integers(0, 2), min_size=1, max_size=2))
    def tagged(self, tags: list[int]) -> None:
        found = set(self.pool.tagged(*map(np.uint32, tags)).tolist())
        for slot, block in enumerate(self.blocks):
            if block.state < BlockState.COMPLETE:
                assert slot not in found
            elif block.tag is not None:
                assert (slot in found) == (block.tag in tags)

    @rule(sure=st.integers(0, 9))
    def clear(self, sure: int) -> None:
        if sure:
            return
        slots = [slot for slot, block in enumerate(self.blocks) if block.state >= BlockState.COMPLETE]
        self.model_withdraw(slots)
        assert set(self.pool.clear().tolist()) == set(slots)

    # ---- what always holds ----

    @invariant()
    def states_and_pins(self) -> None:
        everything = np.arange(len(self.blocks))
        assert self.pool.states(everything).tolist() == [block.state for block in self.blocks]
        assert self.pool.pins(everything).tolist() == [block.pins for block in self.blocks]
        assert min(block.pins for block in self.blocks) >= 0

    @invariant()
    def every_slot_is_in_one_place(self) -> None:
        free = self.pool._free[: self.pool.num_free].tolist()
        assert len(set(free)) == len(free)
        assert set(free) == self.free_slots()
        used = sum(block.state > BlockState.RESET or block.pins > 0 for block in self.blocks[: self.usable])
        registered = sum(block.state == BlockState.REGISTERED for block in self.blocks)
        assert registered == self.pool.num_registered
        assert self.pool.num_free + used == self.pool.usable == self.usable
        for block in self.blocks[self.usable :]:
            assert block.pins or block == Block(), "what is given up is used until it is released"

    @invariant()
    def the_index_holds_exactly_the_named(self) -> None:
        expected = [self.slot_of(name) for name in range(NAMES)]
        assert self.pool.find(HASHES).tolist() == expected
        for name, slot in enumerate(expected):
            registered = slot >= 0 and self.blocks[slot].state == BlockState.REGISTERED
            assert (name in self.heard) == registered
            if name % 4 == self.pool.version % 4:
                assert self.pool.match(HASHES[[name]]).tolist() == ([slot] if registered else [])
        named = [slot for slot, block in enumerate(self.blocks) if block.name is not None]
        stored = [NAME_OF[row.tobytes()] for row in self.pool.hashes(array(*named))]
        assert stored == [self.blocks[slot].name for slot in named]


PoolMachine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=40, deadline=None, print_blob=True, derandomize=False
)
TestPool = PoolMachine.TestCase
