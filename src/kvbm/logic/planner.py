"""Which blocks are copied where, and what becomes of them: the leader's logic, without clock or I/O.

The planner follows each request's chain of blocks from its head. For every full block that the engine has
computed, the request holds a pin on the host block with that hash: one that exists, or a new one that an
OFFLOAD operation fills. So the chain has no hole, what the host holds is not copied again, and a running
request's blocks are not evicted before their successors. When the host tier has no room the chain stops
growing, and goes on from there when there is room.

Events in (requests, completions, time), operations out. Not thread-safe.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.hashing import SequenceHasher
from kvbm.logic.index import Slots
from kvbm.logic.operations import BlockIds, Completion, Direction, Failure, Operation
from kvbm.logic.pool import BlockPool, BlockState

# A request whose offloads fail this often is left alone: something is wrong with it, not with a block.
MAX_FAILURES = 3

_NO_SLOTS = np.empty(0, np.int64)
_NO_BLOCKS = np.empty(0, np.int32)


@dataclass(slots=True)
class Stats:
    """What happened, counted in blocks when it was complete."""

    matched_blocks: int = 0  # offered to the engine and accepted
    onboarded_blocks: int = 0
    offloaded_blocks: int = 0
    shared_blocks: int = 0  # full blocks that needed no copy because the host had them
    deferred_blocks: int = 0  # found no room, or the queue full; counted each time they were wanted
    failures: Counter[tuple[Direction, Failure]] = field(default_factory=Counter)  # in blocks


@dataclass(slots=True)
class Outcome:
    """Device blocks whose reuse depends on what was just planned or reported."""

    hold: list[BlockIds] = field(default_factory=list)  # must not be reused until released
    release: list[BlockIds] = field(default_factory=list)


@dataclass(slots=True)
class _Request:
    hasher: SequenceHasher
    table: BlockIds = field(default_factory=lambda: _NO_BLOCKS)  # device block of each block of the sequence
    chain: Slots = field(default_factory=lambda: _NO_SLOTS)  # pinned host block of each, from the head
    operations: set[int] = field(default_factory=set)
    failures: int = 0
    load_failed: bool = False
    finished: bool = False
    match: tuple[int, int, int] = (-1, 0, 0)  # pool version, first block, result


@dataclass(slots=True)
class _InFlight:
    operation: Operation
    request: _Request
    slots: Slots
    waiting_for: set[int]  # ranks
    deadline: float
    failed: NDArray[np.bool_]
    reason: Failure = Failure.NONE
    expired: bool = False
    holds_device: bool = False


class Planner:
    """Plans for one KV group over one host pool.

    ranks: how many workers execute every operation. max_queued_blocks bounds the offloads in flight.
    """

    def __init__(
        self, pool: BlockPool, *, ranks: int, max_batch_blocks: int, max_queued_blocks: int, timeout_s: float
    ) -> None:
        self.pool = pool
        self.stats = Stats()
        self._ranks = ranks
        self._max_batch = max_batch_blocks
        self._max_queued = max_queued_blocks
        self._timeout_s = timeout_s
        self._requests: dict[str, _Request] = {}
        self._in_flight: dict[int, _InFlight] = {}  # oldest first
        self._queued_blocks = 0
        self._next_id = 0

    # ---- requests ----

    def add_request(self, request_id: str, hasher: SequenceHasher) -> None:
        """Follow a request. The caller extends `hasher` as the request's tokens become known."""
        self._requests[request_id] = _Request(hasher)

    def hasher(self, request_id: str) -> SequenceHasher | None:
        request = self._requests.get(request_id)
        return request.hasher if request else None

    def match(self, request_id: str, first: int) -> int:
        """How many blocks from block `first` on the host can load now. No side effect."""
        request = self._requests.get(request_id)
        if request is None or request.load_failed:
            return 0
        version, cached_first, count = request.match
        if (version, cached_first) != (self.pool.version, first):
            count = len(self.pool.match(request.hasher.hashes[first:]))
            request.match = (self.pool.version, first, count)
        return count

    def set_table(self, request_id: str, device_blocks: Sequence[int]) -> None:
        """The device blocks that hold the request's sequence, from its head."""
        if request := self._requests.get(request_id):
            request.table = np.asarray(device_blocks, np.int32)

    def extend_table(self, request_id: str, device_blocks: Sequence[int]) -> None:
        if request := self._requests.get(request_id):
            request.table = np.concatenate([request.table, np.asarray(device_blocks, np.int32)])

    # ---- onboard ----

    def load(self, request_id: str, first: int, count: int, now: float) -> Operation | None:
        """Load blocks first .. first+count-1 of the request into the device blocks of its table.

        Blocks that the host no longer has get slot -1: the workers report them failed, so that the engine
        hears of them the way it hears of any failed load. None if the request or its table is unknown.
        """
        request = self._requests.get(request_id)
        if request is None or len(request.table) < first + count:
            return None
        slots = np.full(count, -1, np.int64)
        found = self.pool.match(request.hasher.hashes[first : first + count])
        slots[: len(found)] = found
        self.pool.pin(found)
        self.stats.matched_blocks += count
        return self._start(Direction.ONBOARD, request_id, request, first, slots, now)

    # ---- offload ----

    def store(self, computed: Iterable[tuple[str, int]], now: float) -> list[Operation]:
        """Offload what the host lacks of the first `n` blocks of each request, given as (request, n).

        The blocks' KV is computed, or will be when the operations are executed.
        """
        segments: list[tuple[str, _Request, int, int]] = []
        for request_id, blocks in computed:
            request = self._requests.get(request_id)
            if request is None or request.failures >= MAX_FAILURES:
                continue
            start = len(request.chain)
            end = min(blocks, len(request.hasher), len(request.table))
            if end > start:
                segments.append((request_id, request, start, end))
        if not segments:
            return []
        hashes = [request.hasher.hashes[start:end] for _, request, start, end in segments]
        slots, is_new = self.pool.claim(
            hashes[0] if len(hashes) == 1 else np.concatenate(hashes), self._max_queued - self._queued_blocks
        )
        operations: list[Operation] = []
        offset = 0
        for request_id, request, start, end in segments:
            size = end - start
            own, new = slots[offset : offset + size], is_new[offset : offset + size]
            offset += size
            missing = np.flatnonzero(own < 0)
            if len(missing):
                # None of what follows is new: room is given out in order. Others' blocks are let go.
                rest = own[missing[0] :]
                self.pool.release(rest[rest >= 0])
                self.stats.deferred_blocks += len(rest)
                own, new = own[: missing[0]], new[: missing[0]]
            request.chain = np.concatenate([request.chain, own])
            positions = np.flatnonzero(new)
            self.stats.shared_blocks += len(own) - len(positions)
            for at in range(0, len(positions), self._max_batch):
                batch = positions[at : at + self._max_batch]
                self.pool.pin(own[batch])
                operations.append(
                    self._start(Direction.OFFLOAD, request_id, request, start + batch, own[batch], now)
                )
        return operations

    # ---- ends ----

    def preempt(self, request_id: str) -> list[int]:
        """The request lost its device blocks: returns the offloads that can't read them any more."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        request.table = _NO_BLOCKS
        return [
            id_ for id_ in request.operations if self._in_flight[id_].operation.direction == Direction.OFFLOAD
        ]

    def finish(
        self, request_id: str, device_blocks: Sequence[int], blocks: int, now: float
    ) -> tuple[list[Operation], Outcome]:
        """The request ends; its first `blocks` blocks are computed and lie in `device_blocks`.

        Outcome.hold names the device blocks that offloads still read or will read.
        """
        outcome = Outcome()
        if request_id not in self._requests:
            return [], outcome
        self.set_table(request_id, device_blocks)
        operations = self.store([(request_id, blocks)], now)
        request = self._requests.pop(request_id)
        request.finished = True
        for id_ in request.operations:
            in_flight = self._in_flight[id_]
            if in_flight.operation.direction == Direction.OFFLOAD:
                in_flight.holds_device = True
                outcome.hold.append(in_flight.operation.device_blocks)
        self._let_go(request)
        return operations, outcome

    def abandon(self) -> tuple[list[int], Outcome]:
        """Give up the offloads that hold device blocks of finished requests, so that these can be freed."""
        outcome = Outcome()
        abandoned = []
        for id_, in_flight in self._in_flight.items():
            if in_flight.holds_device and in_flight.operation.direction == Direction.OFFLOAD:
                in_flight.holds_device = False
                in_flight.failed[:] = True
                in_flight.reason = max(in_flight.reason, Failure.CANCELLED)
                self._expire(in_flight)
                abandoned.append(id_)
                outcome.release.append(in_flight.operation.device_blocks)
        return abandoned, outcome

    def complete(self, rank: int, completion: Completion) -> Outcome:
        """A rank's report on an operation. Reports on unknown operations are ignored."""
        outcome = Outcome()
        in_flight = self._in_flight.get(completion.operation_id)
        if in_flight is None or rank not in in_flight.waiting_for:
            return outcome
        in_flight.failed[completion.failed] = True
        in_flight.reason = max(in_flight.reason, completion.reason)
        if not completion.quiesced:
            self._expire(in_flight)
            if in_flight.operation.direction == Direction.ONBOARD and not in_flight.holds_device:
                in_flight.holds_device = True
                outcome.hold.append(in_flight.operation.device_blocks)
            return outcome
        in_flight.waiting_for.discard(rank)
        if not in_flight.waiting_for:
            self._settle(in_flight)
            if in_flight.holds_device:
                outcome.release.append(in_flight.operation.device_blocks)
        return outcome

    def expire(self, now: float) -> None:
        """Give up offloads whose deadline has passed. Their memory stays out of use until they report."""
        for in_flight in self._in_flight.values():
            if in_flight.deadline > now:
                break  # the oldest come first
            if not in_flight.expired and in_flight.operation.direction == Direction.OFFLOAD:
                in_flight.failed[:] = True
                in_flight.reason = max(in_flight.reason, Failure.TIMEOUT)
                self._expire(in_flight)

    def clear(self) -> None:
        """Forget every block, also those in flight. Running requests are not cached from here on."""
        self._drop(self.pool.clear())
        for request in self._requests.values():
            request.failures = MAX_FAILURES

    @property
    def has_work(self) -> bool:
        """Whether completions are due."""
        return any(not in_flight.expired for in_flight in self._in_flight.values())

    # ---- inside ----

    def _start(
        self,
        direction: Direction,
        request_id: str,
        request: _Request,
        blocks: int | NDArray[np.int64],
        slots: Slots,
        now: float,
    ) -> Operation:
        if isinstance(blocks, int):
            device_blocks = request.table[blocks : blocks + len(slots)]
        else:
            device_blocks = request.table[blocks]
        operation = Operation(
            self._next_id, direction, request_id, device_blocks, slots.astype(np.int32), self._timeout_s
        )
        self._next_id += 1
        # Workers count their deadline from receipt; the leader waits twice as long for their word.
        self._in_flight[operation.id] = _InFlight(
            operation,
            request,
            slots,
            waiting_for=set(range(self._ranks)),
            deadline=now + 2 * self._timeout_s,
            failed=np.zeros(len(slots), bool),
        )
        request.operations.add(operation.id)
        if direction == Direction.OFFLOAD:
            self._queued_blocks += len(slots)
        return operation

    def _expire(self, in_flight: _InFlight) -> None:
        """Nobody may use the failed blocks from now on; the operation stays, and keeps its pins."""
        in_flight.expired = True
        self._drop(self._untrusted(in_flight))

    def _untrusted(self, in_flight: _InFlight) -> Slots:
        """Slots of failed blocks that still have a name."""
        slots = in_flight.slots[in_flight.failed & (in_flight.slots >= 0)]
        return slots[self.pool.states(slots) >= BlockState.COMPLETE]

    def _settle(self, in_flight: _InFlight) -> None:
        operation, request = in_flight.operation, in_flight.request
        del self._in_flight[operation.id]
        request.operations.discard(operation.id)
        slots = in_flight.slots
        failed = int(np.count_nonzero(in_flight.failed))
        if failed:
            self.stats.failures[operation.direction, in_flight.reason] += failed
        if operation.direction == Direction.OFFLOAD:
            self._queued_blocks -= len(slots)
            written = slots[~in_flight.failed & (self.pool.states(slots) == BlockState.COMPLETE)]
            self.pool.register(written)
            self.stats.offloaded_blocks += len(written)
            self._drop(self._untrusted(in_flight), count_failure=in_flight.reason > Failure.CANCELLED)
        else:
            self.stats.onboarded_blocks += len(slots) - failed
            # A request gets one chance: offering it what is left could go on for ever.
            request.load_failed |= failed > 0
            self._drop(self._untrusted(in_flight))
        self.pool.release(slots[slots >= 0])
        self._let_go(request)

    def _drop(self, slots: Slots, count_failure: bool = False) -> None:
        """Withdraw blocks and cut every chain that has one of them there."""
        if not len(slots):
            return
        named = slots[self.pool.states(slots) >= BlockState.COMPLETE]
        self.pool.withdraw(named)
        for request in self._requests.values():
            lost = np.flatnonzero(np.isin(request.chain, slots))
            if len(lost):
                rest = request.chain[lost[0] :]
                request.chain = request.chain[: lost[0]]
                request.failures += count_failure
                self.pool.release(rest)

    def _let_go(self, request: _Request) -> None:
        # The chain is released at once, when its last offload is over: a tail released after its head
        # would be evicted after it.
        if request.finished and not request.operations:
            self.pool.release(request.chain)
            request.chain = _NO_SLOTS
