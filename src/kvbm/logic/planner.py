"""Which blocks are copied where, and what becomes of them: the leader's logic, without clock or I/O.

The planner follows each request's chain of blocks from its head. For every full block that the engine has
computed, the request holds a pin on the host block with that hash: one that exists, or a new one that an
OFFLOAD operation fills. So the chain has no hole, what the host holds is not copied again, and a running
request's blocks are not evicted before their successors. When the host tier has no room the chain stops
growing, and goes on from there when there is room.

A group of layers that needs only the last blocks of a prefix has a chain of its own, with holes: the engine
gives up its device blocks while the request runs, so they are held until they are copied, and what was not
copied in time never will be.

Events in (requests, completions, time), operations out. Not thread-safe.
"""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from kvbm.logic.followed import NO_BLOCK, Followed, Passing, Segment
from kvbm.logic.groups import KvGroups, Mask
from kvbm.logic.hashing import Hashes, SequenceHasher
from kvbm.logic.history import Fate
from kvbm.logic.in_flight import DeviceCopy
from kvbm.logic.index import Slots
from kvbm.logic.operations import BlockIds, Completion, Direction, Failure, Operation
from kvbm.logic.outcome import Loaded, Outcome, Stats
from kvbm.logic.pool import UNKNOWN_TAG, BlockPool, BlockState

# A request whose offloads fail this often is left alone: something is wrong with it, not with a block.
MAX_FAILURES = 3

# Reading a member of an IntEnum costs a microsecond in Python 3.11.
_OFFLOAD = Direction.OFFLOAD
_COMPLETE, _REGISTERED = np.uint8(BlockState.COMPLETE), np.uint8(BlockState.REGISTERED)


class Planner:
    """Plans over one host pool for the KV groups of one model.

    ranks: how many workers execute every operation. max_queued_blocks bounds the offloads in flight. ids: for
    operations, where others number theirs too. seen: told of registered blocks, new or used again.
    missed: told of blocks that were not stored, and why.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        ranks: int,
        max_batch_blocks: int,
        max_queued_blocks: int,
        timeout_s: float,
        groups: KvGroups | None = None,
        ids: Iterator[int] | None = None,
        seen: Callable[[Slots], None] | None = None,
        missed: Callable[[Hashes, Fate], None] | None = None,
    ) -> None:
        self.pool = pool
        self.stats = Stats()
        self.groups = groups or KvGroups()
        self._ranks = ranks
        self._max_batch = max_batch_blocks
        self._max_queued = max_queued_blocks
        self._timeout_s = timeout_s
        self._ids = ids or itertools.count()
        self._seen = seen or (lambda slots: None)
        self._missed = missed or (lambda hashes, fate: None)
        self._requests: dict[str, Followed] = {}
        self._in_flight: dict[int, DeviceCopy] = {}  # oldest first
        self._queued_blocks = 0

    # ---- requests ----

    def add_request(self, request_id: str, hasher: SequenceHasher, tag: int = 0) -> None:
        """Follow a request. The caller extends `hasher` as the request's tokens become known.

        tag: what `clear_tag` names its blocks by.
        """
        self._requests[request_id] = Followed(hasher, self.groups, tag)

    def hasher(self, request_id: str) -> SequenceHasher | None:
        request = self._requests.get(request_id)
        return request.hasher if request else None

    def may_load(self, request_id: str) -> bool:
        """Whether the request is followed and no load for it has failed."""
        request = self._requests.get(request_id)
        return request is not None and not request.load_failed

    def match(self, request_id: str, first: int, limit: int = sys.maxsize) -> int:
        """How many blocks from block `first` on, at most `limit`, the host can load now. No side effect."""
        request = self._requests.get(request_id)
        if request is None or request.load_failed:
            return 0
        asked = (self.pool.version, first, min(limit, len(request.hasher) - first))
        if request.match[0] != asked:
            request.match = (asked, self.longest(request.hasher.hashes[first : first + limit]))
        return request.match[1]

    def longest(self, hashes: Hashes) -> int:
        """How many of the first blocks of a sequence the host can give."""
        if self.groups.single:
            return len(self.pool.match(hashes))
        return self.groups.longest([slots >= 0 for slots in self.groups.lookup(self.pool.registered, hashes)])

    def slots_of(self, hashes: Hashes) -> Slots:
        """Host blocks that a prefix which the host can give needs."""
        starts = enumerate(self.groups.needed(len(hashes)))
        return np.concatenate(
            [self.pool.registered(self.groups.keys(hashes[at:], group)) for group, at in starts]
        )

    def set_table(self, request_id: str, *tables: Sequence[int]) -> None:
        """The device blocks that hold the request's sequence, from its head, of each group."""
        if request := self._requests.get(request_id):
            for table, blocks in zip(request.tables, tables, strict=True):
                table.cut(0)
                table.append(blocks)

    def extend_table(self, request_id: str, *tables: Sequence[int]) -> None:
        if request := self._requests.get(request_id):
            for table, blocks in zip(request.tables, tables, strict=True):
                table.append(blocks)

    # ---- onboard ----

    def load(
        self, request_id: str, first: int, count: int, now: float, *, in_step: bool = False
    ) -> Operation | None:
        """Load blocks first .. first+count-1 of the request into the device blocks of its tables.

        Blocks that the host no longer has get slot -1: the workers report them failed, so that the engine
        hears of them the way it hears of any failed load. None if the request or its table is unknown.
        """
        request = self._requests.get(request_id)
        end = first + count
        if request is None or min(map(len, request.tables)) < end:
            return None
        slots, blocks = [], []
        for group, needed in enumerate(self.groups.needed(count)):
            part = slice(first + needed, end)
            blocks.append(request.tables[group].rows[part])
            slots.append(self.pool.registered(self.groups.keys(request.hasher.hashes[part], group)))
        targets, sources = np.concatenate(blocks), np.concatenate(slots)
        sources[targets == NO_BLOCK] = -1
        found = sources[sources >= 0]
        self.pool.pin(found)
        self.pool.tag(found, np.uint32(request.tag))
        self._seen(found)
        self.stats.matched_blocks += count
        operation = self._start(
            Direction.ONBOARD, request_id, [(request, targets)], targets, sources, now, in_step=in_step
        )
        self._in_flight[operation.id].prefix = count
        return operation

    # ---- offload ----

    def store(
        self,
        computed: Iterable[tuple[str, int]],
        now: float,
        passing: Mapping[str, Passing] | None = None,
    ) -> tuple[list[Operation], Outcome]:
        """Offload what the host lacks of the first `n` blocks of each request, given as (request, n).

        The blocks' KV is computed, or will be when the operations are executed. passing: by request, where
        there are groups that don't need all blocks. Outcome.hold: device blocks that the engine may give up
        before they are copied.
        """
        segments: list[Segment] = []
        for request_id, blocks in computed:
            request = self._requests.get(request_id)
            if request is not None and request.failures < MAX_FAILURES:
                end = min(blocks, len(request.hasher))
                segments += request.to_store(end, passing[request_id] if passing else Passing(0))
        if not segments:
            return [], Outcome()
        keys = [segment.keys for segment in segments]
        slots, is_new = self.pool.claim(
            keys[0] if len(keys) == 1 else np.concatenate(keys), self._max_queued - self._queued_blocks
        )
        new: list[tuple[Segment, BlockIds, Slots]] = []
        offset = 0
        for segment in segments:
            part = slice(offset, offset + len(segment.positions))
            offset = part.stop
            own, fresh = self._chain(segment, slots[part], is_new[part])
            if len(own):
                self.pool.tag(own, np.uint32(segment.request.tag))
            self.stats.shared_blocks += len(own) - int(np.count_nonzero(fresh))
            if fresh.any():
                new.append((segment, segment.device_blocks[: len(fresh)][fresh], own[fresh]))
        operations, outcome = self._offloads(new, now)
        for segment in segments:
            if segment.passing:  # what left the window is no longer kept for the request
                self.pool.release(segment.request.outside_window(segment.group))
        return operations, outcome

    def _chain(self, segment: Segment, own: Slots, new: Mask) -> tuple[Slots, Mask]:
        """Add to the request's chain what of a segment has a host block: these, and which are new."""
        lost = np.flatnonzero(own < 0)
        if len(lost) and segment.passing:
            self.stats.deferred_blocks += len(lost)
            self._missed(segment.keys[lost], Fate.NO_ROOM)
        elif len(lost):
            # None of what follows is new: room is given out in order. Others' blocks are let go.
            request, cut, positions = segment.request, int(lost[0]), segment.positions
            rest = own[cut:]
            self.pool.release(rest[rest >= 0])
            self.stats.deferred_blocks += len(rest)
            # Once a block: it is wanted again in every step.
            end = int(positions[-1]) + 1
            self._missed(request.hasher.hashes[max(int(positions[cut]), request.told) : end], Fate.NO_ROOM)
            request.told = max(request.told, end)
            own, new = own[:cut], new[:cut]
        segment.chain(own)
        return own, new

    def _offloads(
        self, new: list[tuple[Segment, BlockIds, Slots]], now: float
    ) -> tuple[list[Operation], Outcome]:
        """Operations of at most max_batch_blocks blocks; short runs of several requests share one."""
        operations: list[Operation] = []
        outcome = Outcome()
        batch: list[tuple[Segment, BlockIds, Slots]] = []
        room = self._max_batch

        def flush() -> None:
            nonlocal room
            if batch:
                blocks = np.concatenate([blocks for _, blocks, _ in batch])
                targets = np.concatenate([slots for _, _, slots in batch])
                members = [(of.request, blocks[:0] if of.passing else blocks) for of, blocks, _ in batch]
                self.pool.pin(targets)
                operations.append(self._start(_OFFLOAD, "", members, blocks, targets, now))
                held = [blocks for of, blocks, _ in batch if of.passing]
                self._in_flight[operations[-1].id].held += held
                outcome.hold += held
                batch.clear()
                room = self._max_batch

        for segment, blocks, own in new:
            at = 0
            while at < len(own):
                take = min(room, len(own) - at)
                batch.append((segment, blocks[at : at + take], own[at : at + take]))
                at += take
                room -= take
                if not room:
                    flush()
        flush()
        return operations, outcome

    # ---- ends ----

    def preempt(self, request_id: str) -> list[int]:
        """The request lost its device blocks: returns the offloads that can't read them any more.

        Its table stays: it may be the new one already, as a request can be admitted again in the same step.
        """
        request = self._requests.get(request_id)
        if request is None:
            return []
        cancelled = [id_ for id_ in request.operations if self._in_flight[id_].is_offload]
        for id_ in cancelled:
            members = self._in_flight[id_].members
            members[:] = [(member, read[:0] if member is request else read) for member, read in members]
        return cancelled

    def finish(
        self, request_id: str, blocks: int, now: float, *tables: Sequence[int]
    ) -> tuple[list[Operation], Outcome]:
        """The request ends; its first `blocks` blocks are computed, and `tables` says where they lie.

        Outcome.hold names the device blocks that offloads still read or will read.
        """
        if request_id not in self._requests:
            return [], Outcome()
        self.set_table(request_id, *tables)
        operations, outcome = self.store([(request_id, blocks)], now, {request_id: Passing(0)})
        request = self._requests.pop(request_id)
        request.finished = True
        for id_ in request.operations:
            in_flight = self._in_flight[id_]
            if in_flight.is_offload:
                own = [read for member, read in in_flight.members if member is request and len(read)]
                in_flight.held += own
                outcome.hold += own
        self._let_go(request)
        return operations, outcome

    def abandon(self) -> tuple[list[int], Outcome]:
        """Give up the offloads that hold device blocks of finished requests, so that these can be freed."""
        outcome = Outcome()
        abandoned = []
        for id_, in_flight in self._in_flight.items():
            if in_flight.held and in_flight.is_offload:
                outcome.release += in_flight.held
                in_flight.held = []
                in_flight.fail(slice(None), Failure.CANCELLED)
                self._expire(in_flight)
                abandoned.append(id_)
        return abandoned, outcome

    def complete(self, rank: int, completion: Completion, now: float = 0.0) -> Outcome:
        """A rank's report on an operation. Reports on unknown operations are ignored."""
        outcome = Outcome()
        in_flight = self._in_flight.get(completion.operation_id)
        if in_flight is None or not in_flight.report(rank, completion):
            return outcome
        if not completion.quiesced:
            self._expire(in_flight)
            if not in_flight.is_offload and not in_flight.held:
                in_flight.held = [in_flight.targets]
                outcome.hold += in_flight.held
            return outcome
        if in_flight.is_over:
            outcome.loaded = self._settle(in_flight, now)
            (outcome.release if in_flight.is_offload else outcome.release_loaded).extend(in_flight.held)
        return outcome

    def expire(self, now: float) -> None:
        """Give up offloads whose deadline has passed. Their memory stays out of use until they report."""
        for in_flight in self._in_flight.values():
            if in_flight.deadline > now:
                break  # the oldest come first
            if not in_flight.expired and in_flight.is_offload:
                in_flight.fail(slice(None), Failure.TIMEOUT)
                self._expire(in_flight)

    def clear(self) -> None:
        """Forget every block, also those in flight. Running requests are not cached from here on."""
        self.drop(self.pool.clear())
        for request in self._requests.values():
            request.failures = MAX_FAILURES

    def fence(self) -> None:
        """What is on its way is never registered, and who runs now neither reads nor writes any more.

        Takes as long as there are requests and operations, however many blocks there are.
        """
        for in_flight in list(self._in_flight.values()):
            if in_flight.is_offload:
                slots = in_flight.slots
                self.drop(slots[self.pool.states(slots) == _COMPLETE], Fate.CLEARED)
        for request in self._requests.values():
            request.failures, request.load_failed = MAX_FAILURES, True

    def clear_tag(self, tag: int) -> int:
        """Forget the blocks with this tag, and those of unknown origin; returns how many.

        Running requests with it are not cached from here on.
        """
        slots = self.pool.tagged(np.uint32(tag), UNKNOWN_TAG)
        self.drop(slots, Fate.CLEARED)
        for request in self._requests.values():
            if request.tag == tag:
                request.failures = MAX_FAILURES
        return len(slots)

    def load_target(self, operation_id: int) -> BlockIds | None:
        """Device blocks that a load under way may still write to; None if it is not one."""
        in_flight = self._in_flight.get(operation_id)
        return in_flight.targets if in_flight and not in_flight.is_offload else None

    @property
    def queued(self) -> tuple[int, int]:
        """Blocks that are being offloaded, and onboarded."""
        loads = sum(len(op.slots) for op in self._in_flight.values() if not op.is_offload)
        return self._queued_blocks, loads

    @property
    def has_work(self) -> bool:
        """Whether completions are due."""
        return any(not in_flight.expired for in_flight in self._in_flight.values())

    # ---- inside ----

    def _start(
        self,
        direction: Direction,
        request_id: str,
        members: list[tuple[Followed, BlockIds]],
        device_blocks: BlockIds,
        slots: Slots,
        now: float,
        in_step: bool = False,
    ) -> Operation:
        operation = Operation(
            next(self._ids),
            direction,
            request_id,
            device_blocks,
            slots.astype(np.int32),
            self._timeout_s,
            in_step,
        )
        # Workers count their deadline from receipt; the leader waits twice as long for their word.
        self._in_flight[operation.id] = DeviceCopy(
            operation=operation,
            slots=slots,
            members=members,
            waiting_for=set(range(self._ranks)),
            started=now,
            deadline=now + 2 * self._timeout_s,
            failed=np.zeros(len(slots), bool),
        )
        for request, _ in members:
            request.operations.add(operation.id)
        if direction == _OFFLOAD:
            self._queued_blocks += len(slots)
        return operation

    def _expire(self, in_flight: DeviceCopy) -> None:
        """Nobody may use the failed blocks from now on; the operation stays, and keeps its pins."""
        in_flight.expired = True
        self.drop(in_flight.failed_slots)

    def _settle(self, in_flight: DeviceCopy, now: float) -> Loaded | None:
        operation, slots = in_flight.operation, in_flight.slots
        loaded = None
        del self._in_flight[operation.id]
        for request, _ in in_flight.members:
            request.operations.discard(operation.id)
        failed = int(np.count_nonzero(in_flight.failed))
        if failed:
            self.stats.failures[operation.direction, in_flight.reason] += failed
        if in_flight.is_offload:
            self._queued_blocks -= len(slots)
            written = slots[~in_flight.failed & (self.pool.states(slots) == _COMPLETE)]
            self.pool.register(written)
            self._seen(written)
            self.stats.offload.done(len(written), failed, now - in_flight.started)
            if failed:
                self.drop(in_flight.failed_slots, count_failure=in_flight.reason > Failure.CANCELLED)
        else:
            self.stats.onboard.done(len(slots) - failed, failed, now - in_flight.started)
            loaded = Loaded(
                operation.id,
                operation.request_id,
                len(slots) - failed,
                failed,
                self._usable(in_flight, failed),
                in_flight.reason,
            )
            if failed:
                # A request gets one chance: offering it what is left could go on for ever.
                request = in_flight.members[0][0]
                request.load_failed = True
                lost = in_flight.failed_slots
                if operation.in_step:
                    # What was computed on these blocks, and is stored or about to be, is wrong as well.
                    request.failures = MAX_FAILURES
                    lost = np.union1d(lost, request.built_on(lost))
                self.drop(lost, Fate.DAMAGED if in_flight.reason == Failure.CORRUPT else Fate.LOST)
            slots = slots[slots >= 0]
        self.pool.release(slots)
        for request, _ in in_flight.members:
            self._let_go(request)
        return loaded

    def _usable(self, in_flight: DeviceCopy, failed: int) -> int:
        """Of the blocks of the sequence that a load covers, those that the engine goes on from."""
        if not failed:
            return in_flight.prefix
        return int(np.argmax(in_flight.failed)) if self.groups.single else 0

    def drop(self, slots: Slots, fate: Fate = Fate.LOST, *, count_failure: bool = False) -> None:
        """Withdraw those blocks that still have a name, and cut every chain there."""
        if not len(slots):
            return
        states = self.pool.states(slots)
        unwritten = slots[states == _COMPLETE]
        if len(unwritten):  # nobody could match them, so the pool tells nobody
            self._missed(self.pool.hashes(unwritten), fate)
        self.pool.withdraw(slots[states >= _COMPLETE], fate)
        for request in self._requests.values():
            for rest in request.lose(slots):
                request.failures += count_failure
                self.pool.release(rest)

    def _let_go(self, request: Followed) -> None:
        # The chain is released at once, when its last offload is over: a tail released after its head
        # would be evicted after it.
        if request.finished and not request.operations:
            for group in reversed(range(len(self.groups))):
                self.pool.release(request.all_of(group))
