"""Random histories of an engine whose KV groups need different parts of a prefix.

The engine keeps a table for each group, gives up what has left a window as soon as it may, and scribbles over
it at once. Copies run any time later. Every block that becomes visible in the host tier, and every block that
a load brings back, must hold the bytes that its name stands for.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from random import Random

import numpy as np
import pytest

from kvbm.logic.followed import NO_BLOCK, Passing
from kvbm.logic.groups import FULL, KvGroup, KvGroups
from kvbm.logic.hashing import SequenceHasher, root_hash
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.logic.outcome import Outcome
from kvbm.logic.planner import Planner
from kvbm.logic.policies import Lru
from kvbm.logic.pool import BlockEvent, BlockPool, EventKind

HISTORIES = int(os.environ.get("PROPERTY_HISTORIES", "20"))
STEPS = 250
BLOCK = 2
MAX_TOKENS = 24
STATE = KvGroup(window=1, reach=1, offered=True)
EVERY_STATE = KvGroup(window=1, reach=1)
MODELS = [
    (KvGroup(window=2, reach=3), FULL),
    (FULL, KvGroup(window=1, reach=2), KvGroup(window=3, reach=5)),
    (STATE, FULL),
    (STATE, STATE, FULL, KvGroup(window=2, reach=4)),
    (EVERY_STATE, FULL),
    (KvGroup(window=2, reach=3),),
    (STATE,),
    (FULL, FULL),
]

Content = tuple[int, tuple[int, ...]]  # group, all tokens up to the block's end


@dataclass(eq=False)
class Request:
    id: str
    tokens: list[int]
    hasher: SequenceHasher
    tables: list[list[int]]
    computed: int = 0
    state: str = "waiting"
    states: dict[int, list[int]] = field(default_factory=dict)  # group to blocks with states that are kept

    def prefix(self, block: int) -> tuple[int, ...]:
        return tuple(self.tokens[: (block + 1) * BLOCK])


class Engine:
    """pages: device blocks. They are counted like vLLM's: a block is free when nobody uses or holds it."""

    def __init__(self, rng: Random, groups: KvGroups) -> None:
        self.rng = rng
        self.groups = groups
        self.pages: list[Content | None] = [None] * 400
        self.uses = Counter[int]()
        self.pool = BlockPool(rng.choice([12, 40, 200]), Lru)
        self.pool.subscribe(self.changed)
        self.planner = Planner(
            self.pool, ranks=1, max_batch_blocks=rng.choice([2, 5, 64]),
            max_queued_blocks=rng.choice([6, 100]), timeout_s=5.0, groups=groups,
        )  # fmt: skip
        self.host: dict[int, Content | None] = {}
        self.names: dict[bytes, Content] = {}
        self.requests: list[Request] = []
        self.copies: list[Operation] = []
        self.cancelled: set[int] = set()
        self.now = 0.0
        self.count = 0
        self.loaded_blocks = 0
        # Few documents, so that requests share prefixes.
        self.documents = [[rng.randrange(100) for _ in range(MAX_TOKENS)] for _ in range(3)]

    # ---- device blocks

    def take(self) -> int:
        free = [page for page in range(len(self.pages)) if not self.uses[page]]
        page = self.rng.choice(free)
        self.uses[page] = 1
        self.pages[page] = None
        return page

    def give_up(self, page: int) -> None:
        self.uses[page] -= 1
        assert self.uses[page] >= 0
        if not self.uses[page]:
            self.pages[page] = None  # others write to it at once

    def apply(self, outcome: Outcome) -> None:
        for blocks in outcome.hold:
            for page in blocks.tolist():
                assert self.uses[page] > 0, "what is held must still be there"
                self.uses[page] += 1
        for blocks in (*outcome.release, *outcome.release_loaded):
            for page in blocks.tolist():
                self.give_up(page)

    # ---- requests

    def arrive(self) -> None:
        tokens = list(self.rng.choice(self.documents)[: self.rng.randrange(4, MAX_TOKENS)])
        if self.rng.random() < 0.3:
            tokens[self.rng.randrange(len(tokens)) :] = [self.rng.randrange(100)]
        hasher = SequenceHasher(root_hash(b"groups", BLOCK), BLOCK)
        hasher.extend(tokens)
        self.count += 1
        request = Request(str(self.count), tokens, hasher, [[] for _ in self.groups])
        for block in range(len(hasher)):
            for group in range(len(self.groups)):
                key = KvGroups.keys(hasher.hashes[block : block + 1], group).tobytes()
                self.names[key] = group, request.prefix(block)
        self.planner.add_request(request.id, hasher)
        self.requests.append(request)

    def admit(self, request: Request) -> None:
        limit = (len(request.tokens) - 1) // BLOCK
        blocks = self.planner.match(request.id, 0, limit)
        assert 0 <= blocks <= limit
        for table, kind in zip(request.tables, self.groups, strict=True):
            first = max(0, blocks - kind.window) if kind.window is not None else 0
            table[:] = [NO_BLOCK] * first + [self.take() for _ in range(blocks - first)]
        if not blocks:
            self.planner.set_table(request.id, *request.tables)
            request.state = "running"
            return
        self.planner.set_table(request.id, *request.tables)
        operation = self.planner.load(request.id, 0, blocks, self.now)
        assert operation is not None
        assert (operation.host_slots >= 0).all(), "what was matched can be loaded"
        self.copies.append(operation)
        request.computed = blocks * BLOCK
        request.state = "loading"

    def compute(self, request: Request) -> None:
        """One step of some tokens: windows move on, blocks are filled, what is new is stored."""
        begun = request.computed
        for group, (table, kind) in enumerate(zip(request.tables, self.groups, strict=True)):
            if kind.window is not None and not kind.offered:
                for block in range(min(len(table), max(0, (begun - kind.reach) // BLOCK))):
                    if table[block] != NO_BLOCK:
                        self.give_up(table[block])
                        table[block] = NO_BLOCK
            if kind.offered:
                for page in request.states.get(group, []):
                    self.give_up(page)
                request.states[group] = []
        chunk = self.rng.choice([1, 2, 2, 3, 4, 8])
        request.computed = end = min(len(request.tokens), begun + chunk)
        offers = []
        added: list[list[int]] = []
        for group, (table, kind) in enumerate(zip(request.tables, self.groups, strict=True)):
            new: list[int] = []
            if kind.offered:
                if end % BLOCK == 0 and end > begun and self.rng.random() < 0.9:
                    page = self.take()
                    self.pages[page] = group, request.prefix(end // BLOCK - 1)
                    request.states[group] = [page]
                    offers.append((group, end // BLOCK - 1, page))
                # What the engine's own table says of states means nothing.
                new = [self.rng.randrange(len(self.pages))] if self.rng.random() < 0.5 else []
            else:
                new = [self.take() for _ in range(-(-end // BLOCK) - len(table))]
                table += new
                for block in range(begun // BLOCK, end // BLOCK):
                    self.pages[table[block]] = group, request.prefix(block)
            added.append(new)
        self.planner.extend_table(request.id, *added)
        if self.rng.random() < 0.8:  # else the leader was not ready in this step
            passing = {request.id: Passing(begun, offers)}
            operations, outcome = self.planner.store([(request.id, end // BLOCK)], self.now, passing)
            self.apply(outcome)
            self.copies += operations

    def finish(self, request: Request, *, completed: bool) -> None:
        tables = [
            table if not kind.offered else [] for table, kind in zip(request.tables, self.groups, strict=True)
        ]
        blocks = request.computed // BLOCK if completed else 0
        operations, outcome = self.planner.finish(request.id, blocks, self.now, *tables)
        self.apply(outcome)
        self.copies += operations
        self.free(request)
        self.requests.remove(request)

    def preempt(self, request: Request) -> None:
        self.cancelled.update(self.planner.preempt(request.id))
        self.free(request)
        request.computed, request.state = 0, "waiting"

    def free(self, request: Request) -> None:
        for pages in (*request.tables, *request.states.values()):
            for page in pages:
                if page != NO_BLOCK:
                    self.give_up(page)
        request.tables = [[] for _ in self.groups]
        request.states = {}

    # ---- copies

    def copy(self, operation: Operation) -> None:
        self.copies.remove(operation)
        failed, reason = [], Failure.NONE
        for i, (page, slot) in enumerate(
            zip(operation.device_blocks.tolist(), operation.host_slots.tolist(), strict=True)
        ):
            if operation.id in self.cancelled or slot < 0 or self.rng.random() < 0.02:
                failed.append(i)
                reason = Failure.ERROR
            elif operation.direction == Direction.OFFLOAD:
                self.host[slot] = self.pages[page]
            else:
                self.pages[page] = self.host[slot]
        completion = Completion(operation.id, np.array(failed, np.int32), reason)
        outcome = self.planner.complete(0, completion, self.now)
        self.apply(outcome)
        if operation.direction == Direction.ONBOARD:
            self.arrived(operation, not failed)

    def arrived(self, operation: Operation, good: bool) -> None:
        request = next((r for r in self.requests if r.id == operation.request_id), None)
        if request is None or request.state != "loading":
            return
        if not good:
            self.free(request)
            request.computed, request.state = 0, "waiting"
            return
        blocks = request.computed // BLOCK
        for group, first in enumerate(self.groups.needed(blocks)):
            for block in range(first, blocks):
                page = request.tables[group][block]
                assert self.pages[page] == (group, request.prefix(block))
                self.loaded_blocks += 1
        for group, kind in enumerate(self.groups):
            if kind.offered:  # the engine goes on from the state, in a block of its own
                request.states[group] = [page for page in request.tables[group] if page != NO_BLOCK]
                request.tables[group] = []
        request.state = "running"

    def changed(self, event: BlockEvent) -> None:
        if event.kind == EventKind.STORED:
            for key in event.hashes:
                slot = int(self.pool.find(key[None])[0])
                assert self.host[slot] == self.names[key.tobytes()]

    def check(self) -> None:
        for followed in self.planner._requests.values():
            for kind, chain in zip(self.groups, followed.chains, strict=True):
                kept = chain.rows[chain.rows >= 0]
                assert kind.window is None or len(kept) <= kind.window
                assert (self.pool.pins(kept) > 0).all()

    # ---- a history

    def step(self) -> None:
        self.now += 0.1
        if len(self.requests) < 4 and self.rng.random() < 0.5:
            self.arrive()
        for request in list(self.requests):
            lot = self.rng.random()
            if request.state == "waiting":
                self.admit(request)
            elif request.state == "running" and lot < 0.05:
                self.preempt(request)
            elif request.state == "running" and (request.computed == len(request.tokens) or lot < 0.1):
                self.finish(request, completed=True)
            elif request.state == "running":
                self.compute(request)
        for operation in list(self.copies):
            if self.rng.random() < 0.5:
                self.copy(operation)
        if self.rng.random() < 0.01:
            cancelled, outcome = self.planner.abandon()
            self.cancelled.update(cancelled)
            self.apply(outcome)
        if self.rng.random() < 0.01:
            self.planner.clear()
        self.check()

    def end(self) -> None:
        while self.requests or self.copies:
            for operation in list(self.copies):
                self.copy(operation)
            for request in list(self.requests):
                self.finish(request, completed=request.state == "running")
        assert not +self.uses
        assert not self.planner.has_work
        assert not self.pool.pins(np.arange(self.pool.capacity)).any()
        assert self.pool.num_free + self.pool.num_registered == self.pool.capacity


@pytest.mark.parametrize("model", range(len(MODELS)))
def test_random_histories(model: int) -> None:
    loaded = 0
    for seed in range(HISTORIES):
        engine = Engine(Random(f"{model} {seed}"), KvGroups(MODELS[model]))
        try:
            for _ in range(STEPS):
                engine.step()
            engine.end()
        except AssertionError as error:
            raise AssertionError(f"model {model}, seed {seed}") from error
        loaded += engine.loaded_blocks
    assert loaded > 10 * HISTORIES
