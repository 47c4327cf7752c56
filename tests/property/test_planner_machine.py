"""The planner on a simulated engine: several ranks, a clock that only we turn, bytes that tell what they are.

Every rank has a device (block to content) and a host arena (slot to content); a content names the tokens it
belongs to, and the rank. Copies run block by block in any order between ranks and operations, read and write
what is there at that moment, and end well, badly, late or never. The engine frees and reuses device blocks as
eagerly as it is allowed to and scribbles on each it gives out. What must hold is checked after every step.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbm.logic.hashing import SequenceHasher, root_hash
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.logic.outcome import Outcome
from kvbm.logic.planner import Planner
from kvbm.logic.policies import Lru, SegmentedLru
from kvbm.logic.pool import BlockEvent, BlockPool, BlockState, EventKind
from kvbm.runtime.upkeep import Upkeep

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "150"))
LONG_RUNS = int(os.environ.get("PROPERTY_LONG_RUNS", "12"))
LONG_RUN_STEPS = 1500

BLOCK_SIZE = 2
MAX_BLOCKS = 6
TIMEOUT_S = 10.0
ROOT = root_hash(b"simulation", BLOCK_SIZE)

Prefix = tuple[int, ...]  # all tokens up to the end of a block
Content = tuple[object, int]  # whose bytes, and which rank's

_any = st.integers(0, 10**6)


@dataclass
class Request:
    id: str
    tokens: list[int]
    hasher: SequenceHasher
    table: list[int] = field(default_factory=list)
    computed: int = 0  # blocks
    state: str = "waiting"  # waiting, loading, running
    aborted: bool = False

    @property
    def blocks(self) -> int:
        return len(self.tokens) // BLOCK_SIZE

    def prefix(self, block: int) -> Prefix:
        return tuple(self.tokens[: (block + 1) * BLOCK_SIZE])


@dataclass
class Copy:
    """One rank's share of an operation."""

    operation: Operation
    rank: int
    done: int = 0  # blocks copied
    cancelled: bool = False
    timed_out: bool = False
    over: bool = False
    corrupt: set[int] = field(default_factory=set)  # positions that the checksum refused


@dataclass
class Load:
    """A load that the engine waits for."""

    request: Request
    operation: Operation
    first: int
    table: list[int]
    waiting_for: set[int]
    failed: set[int] = field(default_factory=set)
    timed_out: bool = False


class PlannerMachine(RuleBasedStateMachine):
    @initialize(
        ranks=st.integers(1, 3),
        capacity=st.integers(2, 10),
        device_blocks=st.integers(6, 14),
        max_batch=st.integers(1, 4),
        max_queued=st.integers(1, 8),
        policy=st.sampled_from([Lru, SegmentedLru]),
    )
    def start(
        self,
        ranks: int,
        capacity: int,
        device_blocks: int,
        max_batch: int,
        max_queued: int,
        policy: type[Lru] | type[SegmentedLru],
    ) -> None:
        self.ranks = ranks
        self.max_queued = max_queued
        self.max_batch = max_batch
        self.pool = BlockPool(capacity, policy)
        self.planner = Planner(
            self.pool,
            ranks=ranks,
            max_batch_blocks=max_batch,
            max_queued_blocks=max_queued,
            timeout_s=TIMEOUT_S,
        )
        self.pool.subscribe(self.hear)
        self.upkeep = Upkeep(self.planner, None)
        self.upkeep.host_has(capacity)
        self.not_stored: set[str] = set()  # requests whose blocks were cleared while they ran
        self.now = 0.0
        self.serial = 0
        self.device: list[list[Content]] = [[("new", r)] * device_blocks for r in range(ranks)]
        self.arena: list[list[Content]] = [[("new", r)] * capacity for r in range(ranks)]
        self.damaged: set[tuple[int, int]] = set()  # (rank, slot) whose checksum does not agree
        self.uses = [0] * device_blocks
        self.free = list(range(device_blocks))
        self.requests: dict[str, Request] = {}
        self.copies: list[Copy] = []
        self.settled: list[Copy] = []
        self.loads: dict[int, Load] = {}
        self.prefix_of: dict[bytes, Prefix] = {}
        self.told: set[bytes] = set()  # hashes of blocks that subscribers hold to be matchable

    def pick(self, options: list, number: int):
        return options[number % len(options)]

    def hear(self, event: BlockEvent) -> None:
        """Others are told of blocks: what they are told is true when they are told."""
        for row in event.hashes:
            key = row.tobytes()
            assert (key in self.told) == (event.kind == EventKind.REMOVED)
            self.told ^= {key}
            if event.kind == EventKind.STORED:
                (slot,) = self.pool.match(row.reshape(1, 2)).tolist()
                for rank in range(self.ranks):
                    assert (
                        self.arena[rank][slot] == (self.prefix_of[key], rank) or (rank, slot) in self.damaged
                    )

    # ---- the engine's blocks ----

    def allocate(self, count: int) -> list[int] | None:
        if count > len(self.free):
            return None
        blocks = [self.free.pop() for _ in range(count)]  # the one freed last is the first to go
        for block in blocks:
            for copy in self.copies:
                touched = not copy.over and block in copy.operation.device_blocks
                if copy.operation.direction == Direction.ONBOARD:
                    assert not touched, "a device block that a load may still write is given away"
                else:
                    assert not touched or copy.cancelled, "a device block that an offload reads is given away"
            assert self.uses[block] == 0
            self.uses[block] = 1
            self.serial += 1
            for rank in range(self.ranks):
                self.device[rank][block] = ("scribble", self.serial)
        return blocks

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.uses[block] -= 1
            assert self.uses[block] >= 0
            if not self.uses[block]:
                self.free.append(block)

    def apply(self, outcome: Outcome) -> None:
        for blocks in outcome.hold:
            for block in blocks.tolist():
                if not self.uses[block]:
                    self.free.remove(block)
                self.uses[block] += 1
        for blocks in (*outcome.release, *outcome.release_loaded):
            self.release(blocks.tolist())

    # ---- requests ----

    @precondition(lambda self: len(self.requests) < 5)
    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_BLOCKS))
    def arrive(self, prompt: list[int]) -> None:
        """A token a block varies, so that prefixes repeat."""
        self.serial += 1
        hasher = SequenceHasher(ROOT, BLOCK_SIZE)
        request = Request(f"r{self.serial}", [t for token in prompt for t in (token, 7)], hasher)
        self.hash(request)
        self.requests[request.id] = request
        self.planner.add_request(request.id, hasher, self.tag(request.tokens))

    def tag(self, tokens: Sequence[int]) -> int:
        """Of a request's blocks: those that begin alike are of one salt."""
        return 1 + tokens[0]

    @precondition(lambda self: self.prefix_of and len(self.requests) < 5)
    @rule(which=_any, length=st.integers(1, MAX_BLOCKS))
    def arrive_again(self, which: int, length: int) -> None:
        """A prompt that was there before, or a part of it, and perhaps more."""
        known = sorted(self.prefix_of.values())
        prefix = self.pick(known, which)
        self.arrive([*prefix[::BLOCK_SIZE], 0, 1][:length])

    def hash(self, request: Request) -> None:
        request.hasher.extend(request.tokens[request.hasher.num_tokens :])
        for i, row in enumerate(request.hasher.hashes):
            self.prefix_of[row.tobytes()] = request.prefix(i)

    def in_state(self, *states: str) -> list[Request]:
        return [r for r in self.requests.values() if r.state in states and not r.aborted]

    @precondition(lambda self: self.in_state("waiting"))
    @rule(which=_any, more=st.integers(0, 4))
    def schedule(self, which: int, more: int) -> None:
        """Give a waiting request its blocks: from another request, the host, or empty ones."""
        request = self.pick(self.in_state("waiting"), which)
        shared: list[int] = []
        for other in self.in_state("running"):
            common = 0
            while common < min(other.computed, request.blocks) and other.prefix(common) == request.prefix(
                common
            ):
                common += 1
            if common > len(shared):
                shared = other.table[:common]
        first = len(shared)
        matched = self.planner.match(request.id, first)
        assert matched == self.planner.match(request.id, first)
        assert first + matched <= request.blocks
        fresh = self.allocate(request.blocks - first)
        if fresh is None:
            return
        for block in shared:
            self.uses[block] += 1
        request.table = [*shared, *fresh]
        request.computed = first
        self.planner.set_table(request.id, request.table)
        if not matched:
            request.state = "running"
            return
        # Now and then the host has less than it offered when it was asked.
        count = min(matched + (more == 0), request.blocks - first)
        operation = self.planner.load(request.id, first, count, self.now)
        assert operation is not None
        assert operation.direction == Direction.ONBOARD
        assert operation.device_blocks.tolist() == request.table[first : first + count]
        assert (operation.host_slots[:matched] >= 0).all()
        request.state = "loading"
        self.loads[operation.id] = Load(request, operation, first, request.table, set(range(self.ranks)))
        self.start_copies([operation])

    @precondition(lambda self: self.in_state("running"))
    @rule(which=_any, counts=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def compute(self, which: int, counts: list[int]) -> None:
        """A step of the model: chunks of some requests, whose full blocks are offloaded."""
        running = self.in_state("running")
        computed = []
        for i, count in enumerate(counts[: len(running)]):
            request = running[(which + i) % len(running)]
            for block in range(request.computed, min(request.computed + count, request.blocks)):
                for rank in range(self.ranks):
                    self.device[rank][request.table[block]] = request.prefix(block), rank
                request.computed = block + 1
            computed.append((request.id, request.computed))
        self.start_copies(self.planner.store(computed, self.now)[0])

    def full(self) -> list[Request]:
        return [r for r in self.in_state("running") if r.computed == r.blocks < MAX_BLOCKS + 2]

    @precondition(lambda self: self.full())
    @rule(which=_any, token=st.integers(0, 1))
    def grow(self, which: int, token: int) -> None:
        request = self.pick(self.full(), which)
        blocks = self.allocate(1)
        if blocks is None:
            self.preempt(which)
            return
        request.tokens += [token, 7]
        request.table = request.table + blocks
        self.hash(request)
        self.planner.extend_table(request.id, blocks)

    @precondition(lambda self: self.in_state("running"))
    @rule(which=_any)
    def preempt(self, which: int) -> None:
        request = self.pick(self.in_state("running"), which)
        self.cancel(self.planner.preempt(request.id))
        self.to_waiting(request)

    def to_waiting(self, request: Request) -> None:
        self.release(request.table[::-1])
        request.table, request.computed, request.state = [], 0, "waiting"

    @precondition(lambda self: self.in_state("waiting", "loading", "running"))
    @rule(which=_any)
    def finish(self, which: int) -> None:
        """A request ends, or is aborted, in whatever state it is."""
        request = self.pick(self.in_state("waiting", "loading", "running"), which)
        operations, outcome = self.planner.finish(request.id, request.computed, self.now, request.table)
        assert self.planner.finish(request.id, request.computed, self.now, request.table)[0] == []
        self.start_copies(operations)
        self.apply(outcome)
        if request.state == "loading":
            request.aborted = True  # its blocks are freed when the load has been heard of
        else:
            self.release(request.table[::-1])
            del self.requests[request.id]

    @rule(which=_any, prompt=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_BLOCKS))
    def serve(self, which: int, prompt: list[int]) -> None:
        """The usual course of things, so that there is something to disturb."""
        if len(self.requests) < 5:
            self.arrive(prompt)
        for _ in self.in_state("waiting"):
            self.schedule(0, 1)
        if self.in_state("running"):
            self.compute(which, [1 + which % MAX_BLOCKS] * 3)

    @precondition(lambda self: self.under_way())
    @rule(count=st.integers(1, 10))
    def work_off(self, count: int) -> None:
        for copy in self.under_way()[:count]:
            self.end(copy, "well")

    # ---- operations ----

    def start_copies(self, operations: list[Operation]) -> None:
        for operation in operations:
            assert len(operation.device_blocks) == len(operation.host_slots)
            if operation.direction == Direction.OFFLOAD:
                assert 0 < len(operation.host_slots) <= self.max_batch
                assert len(set(operation.host_slots.tolist())) == len(operation.host_slots)
                for copy in self.copies:
                    both = set(copy.operation.host_slots.tolist()) & set(operation.host_slots.tolist())
                    assert copy.over or not both, "a slot that an operation may still touch is given away"
                for block, row in zip(
                    operation.device_blocks.tolist(),
                    self.pool.hashes(operation.host_slots.astype(np.int64)),
                    strict=True,
                ):
                    for rank in range(self.ranks):
                        assert self.device[rank][block] == (self.prefix_of[row.tobytes()], rank)
            self.copies += [Copy(operation, rank) for rank in range(self.ranks)]

    def cancel(self, operation_ids: list[int]) -> None:
        for copy in self.copies:
            if copy.operation.id in operation_ids:
                assert copy.operation.direction == Direction.OFFLOAD
                copy.cancelled = True

    def advance(self, copy: Copy, blocks: int) -> None:
        """Copy some more: whatever is there now."""
        operation, rank = copy.operation, copy.rank
        while blocks > 0 and copy.done < len(operation.host_slots):
            at = copy.done
            block, slot = int(operation.device_blocks[at]), int(operation.host_slots[at])
            copy.done += 1
            blocks -= 1
            if operation.direction == Direction.OFFLOAD:
                self.arena[rank][slot] = self.device[rank][block]
                self.damaged.discard((rank, slot))
            elif slot < 0:
                continue
            elif (rank, slot) in self.damaged:
                copy.corrupt.add(at)
            else:
                self.device[rank][block] = self.arena[rank][slot]

    def under_way(self) -> list[Copy]:
        return [copy for copy in self.copies if not copy.over]

    @precondition(lambda self: self.under_way())
    @rule(which=_any, blocks=st.integers(1, 4))
    def copy_some(self, which: int, blocks: int) -> None:
        self.advance(self.pick(self.under_way(), which), blocks)

    @precondition(lambda self: self.under_way())
    @rule(which=_any, how=st.sampled_from(["well", "well", "well", "badly", "partly"]), mask=_any)
    def end_copy(self, which: int, how: str, mask: int) -> None:
        self.end(self.pick(self.under_way(), which), how, mask)

    def end(self, copy: Copy, how: str, mask: int = 0) -> None:
        operation = copy.operation
        size = len(operation.host_slots)
        if copy.cancelled or copy.timed_out:
            failed = set(range(size))
            reason = max(
                Failure.CANCELLED if copy.cancelled else Failure.NONE,
                Failure.TIMEOUT if copy.timed_out else Failure.NONE,
            )
        elif how == "badly":
            failed, reason = set(range(size)), Failure.ERROR
        else:
            self.advance(copy, size)
            failed = {i for i in range(size) if operation.host_slots[i] < 0} | copy.corrupt
            reason = Failure.CORRUPT if copy.corrupt else Failure.ERROR if failed else Failure.NONE
            if how == "partly":
                bad = {i for i in range(size) if mask >> i & 1}
                for i in bad:
                    # Whatever was written last is wrong.
                    if operation.direction == Direction.OFFLOAD:
                        self.arena[copy.rank][int(operation.host_slots[i])] = ("half", copy.rank)
                    else:
                        self.device[copy.rank][int(operation.device_blocks[i])] = ("half", copy.rank)
                failed |= bad
                reason = max(reason, Failure.ERROR) if bad else reason
        copy.over = True
        self.report(copy, Completion(operation.id, np.array(sorted(failed), np.int32), reason))

    @precondition(lambda self: self.under_way())
    @rule(which=_any, how=st.sampled_from(["well", "well", "well", "badly"]))
    def end_operation(self, which: int, how: str) -> None:
        """All ranks at once: how most operations end."""
        chosen = self.pick(self.under_way(), which)
        for copy in self.under_way():
            if copy.operation is chosen.operation:
                self.end(copy, how)

    @precondition(lambda self: not all(copy.timed_out for copy in self.under_way()))
    @rule(which=_any)
    def time_out(self, which: int) -> None:
        """The rank gives up, but its copy goes on; it will report again."""
        copy = self.pick([copy for copy in self.under_way() if not copy.timed_out], which)
        copy.timed_out = True
        everything = np.arange(len(copy.operation.host_slots), dtype=np.int32)
        self.report(copy, Completion(copy.operation.id, everything, Failure.TIMEOUT, quiesced=False))

    def report(self, copy: Copy, completion: Completion) -> None:
        self.apply(self.planner.complete(copy.rank, completion))
        if all(other.over for other in self.copies if other.operation is copy.operation):
            gone = [other for other in self.copies if other.operation is copy.operation]
            self.copies = [other for other in self.copies if other.operation is not copy.operation]
            self.settled = (self.settled + gone)[-10:]
        load = self.loads.get(completion.operation_id)
        if load is not None and copy.rank in load.waiting_for:
            load.waiting_for.discard(copy.rank)
            load.failed.update(completion.failed.tolist())
            load.timed_out |= not completion.quiesced
            if not load.waiting_for:
                self.loaded(self.loads.pop(completion.operation_id))

    def loaded(self, load: Load) -> None:
        """Every rank has said something: the engine goes on."""
        request, operation = load.request, load.operation
        for at in set(range(len(operation.host_slots))) - load.failed:
            for rank in range(self.ranks):
                content = self.device[rank][int(operation.device_blocks[at])]
                assert content == (request.prefix(load.first + at), rank), "a good block with wrong bytes"
        if request.aborted:
            self.release(load.table[::-1])
            del self.requests[request.id]
        elif load.timed_out:
            # A copy may still write to these blocks: the request begins anew, with others.
            self.cancel(self.planner.preempt(request.id))
            self.to_waiting(request)
        else:
            good = min(load.failed, default=len(operation.host_slots))
            request.computed = load.first + good
            request.state = "running"

    @precondition(lambda self: self.settled or self.copies)
    @rule(which=_any, quiesced=st.booleans())
    def stray_completion(self, which: int, quiesced: bool) -> None:
        """What was reported before, or never asked for, changes nothing."""
        copies = [*self.settled, *(copy for copy in self.copies if copy.over)]
        operation_id, rank, size = 10**9, 0, 1
        if copies:
            copy = copies[which % len(copies)]
            operation_id, rank, size = copy.operation.id, copy.rank, len(copy.operation.host_slots)
        outcome = self.planner.complete(
            rank, Completion(operation_id, np.arange(size, dtype=np.int32), Failure.ERROR, quiesced=quiesced)
        )
        assert outcome == Outcome()

    @precondition(lambda self: self.pool.num_registered)
    @rule(rank=_any, which=_any)
    def damage(self, rank: int, which: int) -> None:
        """A record goes bad where it lies; its checksum tells."""
        everything = np.arange(self.pool.capacity)
        registered = everything[self.pool.states(everything) == BlockState.REGISTERED].tolist()
        rank, slot = rank % self.ranks, self.pick(registered, which)
        self.arena[rank][slot] = ("damaged", rank)
        self.damaged.add((rank, slot))

    # ---- time, and the whole ----

    @rule(seconds=st.floats(0.0, 1.5 * TIMEOUT_S))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        self.planner.expire(self.now)
        self.upkeep.tick(self.now)

    @precondition(lambda self: self.copies)
    @rule()
    def abandon(self) -> None:
        cancelled, outcome = self.planner.abandon()
        self.cancel(cancelled)
        self.apply(outcome)

    @rule(sure=st.integers(0, 5))
    def clear(self, sure: int) -> None:
        if sure == 5:
            self.planner.clear()
            assert self.pool.num_registered == 0

    @rule(token=st.integers(0, 1), sure=st.integers(0, 3))
    def clear_tag(self, token: int, sure: int) -> None:
        """Those that begin with this token are forgotten, and not stored again by who runs now."""
        if sure != 3:
            return
        self.planner.clear_tag(1 + token)
        gone = [key for key, prefix in self.prefix_of.items() if prefix[0] == token]
        if gone:
            hashes = np.array([np.frombuffer(key, np.uint64) for key in gone])
            assert (self.pool.find(hashes) < 0).all()
        self.not_stored |= {id_ for id_, request in self.requests.items() if request.tokens[0] == token}

    @rule(blocks=st.integers(1, 10), sure=st.integers(0, 3))
    def resize(self, blocks: int, sure: int) -> None:
        if sure == 3:
            self.upkeep.resize("host", min(blocks, self.pool.capacity))
            assert self.pool.usable == min(blocks, self.pool.capacity)

    @precondition(lambda self: self.requests)
    @rule(which=_any, seconds=st.floats(0.0, 3 * TIMEOUT_S))
    def pin(self, which: int, seconds: float) -> None:
        request = self.pick(list(self.requests.values()), which)
        self.serial += 1
        self.upkeep.pin(f"pin{self.serial}", request.hasher.hashes.copy(), self.now + seconds)
        assert self.upkeep.pinned_blocks <= self.pool.usable // 2

    @rule(order=_any, how=st.sampled_from(["well", "badly"]), ends_first=st.booleans())
    def wind_down(self, order: int, how: str, ends_first: bool) -> None:
        if order % 4 == 3:
            self.drain(order, how, ends_first)

    def drain(self, order: int, how: str, ends_first: bool) -> None:
        """Everything ends: nothing is left in use."""

        def end_copies() -> None:
            while copies := self.under_way():
                self.end(copies[order % len(copies)], how)

        def end_requests() -> None:
            while requests := self.in_state("waiting", "loading", "running"):
                self.finish(order % len(requests))

        for name in list(self.upkeep._pins):
            self.upkeep.unpin(name)
        for action in (end_requests, end_copies) if ends_first else (end_copies, end_requests, end_copies):
            action()
        assert not self.requests
        assert not self.loads
        assert not self.planner.has_work
        assert self.pool.pins(np.arange(self.pool.capacity)).tolist() == [0] * self.pool.capacity
        assert self.pool.num_free + self.pool.num_registered == self.pool.usable
        assert sorted(self.free) == list(range(len(self.uses)))
        assert self.planner._queued_blocks == 0

    def teardown(self) -> None:
        if hasattr(self, "planner") and sys.exc_info()[0] is None:
            self.check()
            self.drain(0, "well", True)
            self.check()

    # ---- what always holds ----

    @invariant()
    def check(self) -> None:
        self.visible_after_written()
        self.what_can_be_matched_is_written()
        self.what_is_in_use_is_pinned()
        self.what_is_in_use_is_not_free()
        self.queue_is_bounded()
        self.chains_have_no_hole()
        self.has_work_tells_of_completions()
        self.no_pin_is_lost_or_kept()

    def visible_after_written(self) -> None:
        everything = np.arange(self.pool.capacity)
        registered = everything[self.pool.states(everything) == BlockState.REGISTERED]
        assert len(registered) == self.pool.num_registered == len(self.told)
        for slot, row in zip(registered.tolist(), self.pool.hashes(registered), strict=True):
            assert self.pool.match(row.reshape(1, 2)).tolist() == [slot]
            for rank in range(self.ranks):
                if (rank, slot) not in self.damaged:
                    assert self.arena[rank][slot] == (self.prefix_of[row.tobytes()], rank)

    def what_can_be_matched_is_written(self) -> None:
        for request in self.requests.values():
            for i, slot in enumerate(self.pool.match(request.hasher.hashes).tolist()):
                for rank in range(self.ranks):
                    if (rank, slot) not in self.damaged:
                        assert self.arena[rank][slot] == (request.prefix(i), rank)

    def what_is_in_use_is_pinned(self) -> None:
        for copy in self.copies:
            slots = copy.operation.host_slots[copy.operation.host_slots >= 0]
            assert (self.pool.pins(slots.astype(np.int64)) > 0).all()

    def what_is_in_use_is_not_free(self) -> None:
        for copy in self.under_way():
            if not copy.cancelled:
                assert all(self.uses[block] for block in copy.operation.device_blocks.tolist())

    def queue_is_bounded(self) -> None:
        operations = {
            copy.operation.id: len(copy.operation.host_slots)
            for copy in self.copies
            if copy.operation.direction == Direction.OFFLOAD
        }
        assert sum(operations.values()) <= self.max_queued

    def chains_have_no_hole(self) -> None:
        for request in self.requests.values():
            followed = self.planner._requests.get(request.id)
            if followed is None:
                assert request.aborted
                continue
            chain = followed.chains[0].rows
            assert len(chain) <= len(request.hasher)
            assert self.pool.find(request.hasher.hashes[: len(chain)]).tolist() == chain.tolist()
            assert (self.pool.pins(chain) > 0).all()
            assert request.id not in self.not_stored or not len(chain)

    def has_work_tells_of_completions(self) -> None:
        waited_for = {copy.operation.id for copy in self.copies if not copy.over}
        if not waited_for:
            assert not self.planner.has_work

    def no_pin_is_lost_or_kept(self) -> None:
        expected = np.zeros(self.pool.capacity, int)
        operations = {copy.operation.id: copy.operation for copy in self.copies}
        for operation in operations.values():
            np.add.at(expected, operation.host_slots[operation.host_slots >= 0], 1)
        followed = {id(r): r for r in self.planner._requests.values()}
        for in_flight in self.planner._in_flight.values():
            followed |= {id(r): r for r, _ in in_flight.members}
        for request in followed.values():
            np.add.at(expected, request.chains[0].rows, 1)
        for slots, _ in self.upkeep._pins.values():
            np.add.at(expected, slots, 1)
        assert self.pool.pins(np.arange(self.pool.capacity)).tolist() == expected.tolist()


# How often what happens in a long run: mostly what is usual.
WEIGHTS = {
    "arrive": 4,
    "arrive_again": 6,
    "schedule": 12,
    "compute": 16,
    "grow": 4,
    "preempt": 1,
    "finish": 5,
    "copy_some": 12,
    "end_copy": 16,
    "end_operation": 8,
    "time_out": 1,
    "stray_completion": 1,
    "damage": 0.5,
    "expire": 1,
    "abandon": 0.5,
    "clear": 0.2,
    "clear_tag": 0.3,
    "resize": 0.5,
    "pin": 0.5,
    "wind_down": 0.3,
}


@pytest.mark.parametrize("seed", range(LONG_RUNS))
def test_long_run(seed: int) -> None:
    """The same machine without hypothesis: what needs a long history. The seed is the test's name."""
    random = Random(seed)

    def number() -> int:
        return random.randrange(10**6)

    machine = PlannerMachine()
    machine.start(
        random.randint(1, 3),
        random.randint(2, 12),
        random.randint(6, 16),
        random.randint(1, 4),
        random.randint(1, 10),
        random.choice([Lru, SegmentedLru]),
    )
    for _ in range(LONG_RUN_STEPS):
        action = random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        waiting, running = machine.in_state("waiting"), machine.in_state("running")
        if action == "arrive" and len(machine.requests) < 5:
            machine.arrive([random.randint(0, 1) for _ in range(random.randint(1, MAX_BLOCKS))])
        elif action == "arrive_again" and machine.prefix_of and len(machine.requests) < 5:
            machine.arrive_again(number(), random.randint(1, MAX_BLOCKS))
        elif action == "schedule" and waiting:
            machine.schedule(number(), random.randint(0, 9))
        elif action == "compute" and running:
            machine.compute(number(), [random.randint(1, 3) for _ in range(random.randint(1, 3))])
        elif action == "grow" and machine.full():
            machine.grow(number(), random.randint(0, 1))
        elif action == "preempt" and running:
            machine.preempt(number())
        elif action == "finish" and (waiting or running or machine.loads):
            if machine.in_state("waiting", "loading", "running"):
                machine.finish(number())
        elif action == "copy_some" and machine.under_way():
            machine.copy_some(number(), random.randint(1, 4))
        elif action == "end_copy" and machine.under_way():
            machine.end_copy(number(), random.choices(["well", "badly", "partly"], [30, 1, 1])[0], number())
        elif action == "end_operation" and machine.under_way():
            machine.end_operation(number(), random.choices(["well", "badly"], [30, 1])[0])
        elif action == "time_out" and not all(copy.timed_out for copy in machine.under_way()):
            machine.time_out(number())
        elif action == "stray_completion":
            machine.stray_completion(number(), random.random() < 0.5)
        elif action == "damage" and machine.pool.num_registered:
            machine.damage(number(), number())
        elif action == "expire":
            machine.expire(random.uniform(0, TIMEOUT_S))
        elif action == "abandon":
            machine.abandon()
        elif action == "clear":
            machine.clear(5)
        elif action == "clear_tag":
            machine.clear_tag(random.randint(0, 1), 3)
        elif action == "resize":
            machine.resize(random.randint(1, machine.pool.capacity), 3)
        elif action == "pin" and machine.requests:
            machine.pin(number(), random.uniform(0, 3 * TIMEOUT_S))
        elif action == "wind_down":
            machine.drain(number(), "well", random.random() < 0.5)
        else:
            continue
        machine.check()
    machine.drain(number(), "well", True)
    machine.check()


PlannerMachine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=60, deadline=None, print_blob=True, derandomize=False
)
TestPlanner = PlannerMachine.TestCase
