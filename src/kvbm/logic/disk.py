"""The disk tier below the host tier: what is written to it, what is read back, and when. No clock, no I/O.

Blocks move between host slots and disk slots, never past the host tier: a block that the host tier registers
or uses again is written to disk if the admission filter has seen it often enough, and a request whose prefix
lies on disk waits until its blocks are back in the host tier (`fetch`), and is answered from there. So a read
that fails is a miss that no engine ever hears of.

Events in (blocks seen, requests, completions, time), operations out. Not thread-safe.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from kvbm.logic.admission import FrequencyFilter, WriteBudget
from kvbm.logic.edges import Edge
from kvbm.logic.estimate import LoadEstimate
from kvbm.logic.fetch import NO_SLOTS, Fetch, FetchEnd, survey
from kvbm.logic.groups import NOT_TO_BE_HAD, KvGroups
from kvbm.logic.hashing import Hashes
from kvbm.logic.history import Fate
from kvbm.logic.in_flight import InFlight
from kvbm.logic.index import Slots
from kvbm.logic.operations import BlockIds, Completion, Direction, Failure, Operation
from kvbm.logic.pool import UNKNOWN_TAG, BlockPool, BlockState
from kvbm.logic.restore import Restore

# Reading a member of an IntEnum costs a microsecond in Python 3.11.
_WRITE, _READ = Direction.WRITE, Direction.READ
_COMPLETE, _REGISTERED = np.uint8(BlockState.COMPLETE), np.uint8(BlockState.REGISTERED)

# A tier that fails so often in a row is left alone for a while, each time for twice as long.
_FAILURES_BEFORE_PAUSE = 3
_PAUSE_S = (1.0, 60.0)
_ADOPT_AT_ONCE = 32768  # found records entered in one step: about 10 ms


@dataclass(slots=True)
class DiskStats:
    """What happened, counted in blocks when it was complete."""

    recovered_blocks: int = 0  # found on disk at start
    not_admitted_blocks: int = 0  # the filter had not seen them often enough
    dropped_blocks: int = 0  # admitted, but the queue or the budget was full, or the tier had no room
    declined_blocks: int = 0  # on disk, but sooner computed again
    failures: Counter[tuple[Direction, Failure]] = field(default_factory=Counter)
    write: Edge = field(default_factory=Edge)
    read: Edge = field(default_factory=Edge)

    @property
    def written_blocks(self) -> int:
        return self.write.blocks

    @property
    def read_blocks(self) -> int:
        return self.read.blocks


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """timeout_s: of one operation. patience_s: how long requests wait at start for what was stored before."""

    max_batch_blocks: int = 32
    max_queued_writes: int = 1024
    max_fetched_blocks: int = 1024
    timeout_s: float = 10.0
    patience_s: float = 5.0


@dataclass(slots=True, kw_only=True)
class _Transfer(InFlight):
    disk_slots: Slots


class DiskTier:
    """One tier of disk slots, `pool`, below the `host` pool; block i has disk slot i in every rank's store.

    drop: withdraws host blocks whose bytes turned out to be missing or wrong. ids: numbers for operations.
    missed: told of blocks that were not written, and why.
    """

    def __init__(
        self,
        host: BlockPool,
        pool: BlockPool,
        *,
        ranks: int,
        ids: Iterator[int],
        drop: Callable[[Slots, Fate], None],
        limits: DiskLimits,
        groups: KvGroups | None = None,
        missed: Callable[[Hashes, Fate], None] | None = None,
        admission: FrequencyFilter | None = None,
        budget: WriteBudget | None = None,
        estimate: LoadEstimate | None = None,
    ) -> None:
        self.pool = pool
        self.stats = DiskStats()
        self.off_reason: str | None = None
        self._host = host
        self._ranks = ranks
        self._ids = ids
        self._drop = drop
        self._missed = missed or (lambda hashes, fate: None)
        self._limits = limits
        self._groups = groups or KvGroups()
        self._admission = admission
        self._budget = budget
        self._estimate = estimate
        self._now = 0.0
        self._limit = pool.capacity  # slots to be used
        self._orders: list[Operation] = []
        self._forget: list[Slots] = []
        self._in_flight: dict[int, _Transfer] = {}
        self._queued_writes = self._queued_reads = 0
        self._fetches: dict[str, Fetch] = {}
        self._fetched = 0  # blocks that fetches hold
        self._arriving = np.zeros(host.capacity, bool)  # host slots that are being read into
        self._restore = Restore(pool.capacity, ranks)
        self._restore_deadline: float | None = None
        self._failures_in_row = 0
        self._paused_until = -np.inf
        self._pause_s = _PAUSE_S[0]

    # ---- state ----

    @property
    def ready(self) -> bool:
        """What an earlier run left is known, and blocks can be read and written."""
        return self.off_reason is None and self.pool.usable > 0

    @property
    def restoring(self) -> bool:
        """What an earlier run left is not known yet, and is worth waiting for."""
        return (
            self.off_reason is None
            and not self.pool.usable
            and (self._restore_deadline is None or self._now < self._restore_deadline)
        )

    @property
    def has_work(self) -> bool:
        return (
            bool(self._orders)
            or bool(self._forget)
            or self.restoring
            or any(not transfer.expired for transfer in self._in_flight.values())
        )

    @property
    def queued(self) -> tuple[int, int]:
        """Blocks that are being written, and read."""
        return self._queued_writes, self._queued_reads

    def take_orders(self) -> tuple[list[Operation], list[int]]:
        """Operations, and disk slots whose records must not be found again."""
        orders, self._orders = self._orders, []
        forget, self._forget = self._forget, []
        return orders, np.concatenate(forget).tolist() if forget else []

    def tick(self, now: float) -> None:
        """Let time pass. Once a step."""
        self._now = now
        if self._restore_deadline is None:
            self._restore_deadline = now + self._limits.patience_s
        if self._admission is not None:
            self._admission.decay(now)
        if self._restore.complete and not self.pool.usable:
            self._adopt()
        for transfer in self._in_flight.values():
            if transfer.deadline > now:
                break  # the oldest come first
            if not transfer.expired:
                transfer.fail(slice(None), Failure.TIMEOUT)
                self._expire(transfer)

    def wake(self, now: float) -> None:
        """Before what happens between steps: an idle engine makes none, the last `tick` may be long ago."""
        self._now = now

    def turn_off(self, reason: str) -> None:
        self.off_reason = self.off_reason or reason

    # ---- at start ----

    def found(self, rank: int, slots: BlockIds, hashes: Hashes, last: bool) -> None:
        """Some of the records that a rank has; those to be evicted first come first."""
        if not self.pool.usable:
            self._restore.add(rank, slots, hashes, last)

    def _adopt(self) -> None:
        """Enter some of what all ranks have; when all of it is in, start work."""
        slots, hashes = self._restore.take(_ADOPT_AT_ONCE)
        if len(slots):
            self.pool.adopt(slots, hashes)
            self.stats.recovered_blocks += len(slots)
            return
        newest = self._restore.newest
        self._restore = Restore(0, self._ranks)
        self.pool.grow(self._limit)
        self.resize(self._limit)
        newest = newest[self.pool.states(newest) == _REGISTERED]
        room = min(len(newest), self._host.num_free // 2, self._limits.max_fetched_blocks)
        if room:
            disk = newest[::-1][:room]  # heads first, as all sequences are given
            host, is_new = self._host.claim(self.pool.hashes(disk), room)
            self.pool.pin(disk[is_new], reuse=False)
            self._read(host[is_new], disk[is_new])
            self._host.release(host[host >= 0])
        # What was stored meanwhile; slots are taken in order while a pool is young.
        self.seen(np.flatnonzero(self._host.states(np.arange(self._host.capacity)) == _REGISTERED))

    # ---- write ----

    def seen(self, host_slots: Slots) -> None:
        """These registered host blocks are new, or used again; given head first."""
        if not self.ready or not len(host_slots):
            return
        hashes = self._host.hashes(host_slots)
        on_disk = self.pool.find(hashes)
        known = on_disk >= 0
        kept = on_disk[known & (self.pool.states(on_disk) == _REGISTERED)]
        self.pool.pin(kept)
        self.pool.release(kept)
        self.pool.tag(on_disk[known], self._host.tags(host_slots[known]))
        wanted = ~known
        if self._admission is not None:
            admitted = self._admission.admit(hashes)
            refused = wanted & ~admitted
            if refused.any():
                self.stats.not_admitted_blocks += int(np.count_nonzero(refused))
                self._missed(hashes[refused], Fate.NOT_ADMITTED)
            wanted &= admitted
        if wanted.any():
            self._write(host_slots[wanted], hashes[wanted])

    def _write(self, host_slots: Slots, hashes: Hashes) -> None:
        wanted = len(host_slots)
        room = min(wanted, max(0, self._limits.max_queued_writes - self._queued_writes))
        if self._now < self._paused_until:
            room = 0
        if self._budget is not None and room:
            room = self._budget.take(room, self._now)
        slots, is_new = self.pool.claim(hashes[:room], room)
        self.pool.release(slots[(slots >= 0) & ~is_new])
        dropped = wanted - int(np.count_nonzero(is_new))
        if dropped:
            self.stats.dropped_blocks += dropped
            self._missed(np.concatenate([hashes[:room][slots < 0], hashes[room:]]), Fate.NO_ROOM)
        host_slots, slots = host_slots[:room][is_new], slots[is_new]
        self.pool.tag(slots, self._host.tags(host_slots))
        self._host.pin(host_slots, reuse=False)
        self._queued_writes += len(slots)
        self._start(_WRITE, host_slots, slots)

    # ---- read ----

    def fetch(self, request_id: str, hashes: Hashes) -> bool:
        """Bring the request's first blocks from disk to the host tier as far as that pays.

        Asked again in every step until it answers True: what comes has come. hashes: of the blocks that the
        request can use.
        """
        if self.restoring:
            return False
        fetch = self._fetches.get(request_id)
        if fetch is None:
            fetch = self._fetches[request_id] = self._begin(hashes)
        if not len(fetch.slots):
            return True
        if self._now >= fetch.deadline:
            fetch.ends = fetch.ends or FetchEnd.LATE
            return True
        states = self._host.states(fetch.slots)
        lost = np.flatnonzero(states < _COMPLETE)
        if len(lost):  # what comes after it is of no use
            states = states[: lost[0]]
        return not (states == _COMPLETE).any()

    def release(self, request_id: str) -> None:
        """The request has what it can use: its blocks may be evicted again. It gets no second fetch."""
        fetch = self._fetches.get(request_id)
        if fetch is not None and len(fetch.slots):
            self._host.release(fetch.slots)
            self._fetched -= len(fetch.from_disk)
            self._fetches[request_id] = Fetch()

    def fetched(self, request_id: str) -> tuple[Slots, FetchEnd | None]:
        """Host slots that were read for the request, and why not more. Until its `release`."""
        fetch = self._fetches.get(request_id)
        return (fetch.from_disk, fetch.ends) if fetch is not None else (NO_SLOTS, None)

    def finish(self, request_id: str) -> None:
        self.release(request_id)
        self._fetches.pop(request_id, None)

    def lacking(self, hashes: Hashes) -> int:
        """How many blocks the host tier lacks to give all of the prefix that can be had with this tier's."""
        reads = survey(self._groups, self._host, self.pool, hashes).reads
        possible = reads[reads != NOT_TO_BE_HAD]
        return int(possible[-1]) if len(possible) else 0

    def _begin(self, hashes: Hashes) -> Fetch:
        if not self.ready or not len(hashes):
            return Fetch()
        if self._now < self._paused_until:
            return Fetch(ends=FetchEnd.PAUSED)
        found = survey(self._groups, self._host, self.pool, hashes)
        reads = found.reads
        possible = np.flatnonzero(reads != NOT_TO_BE_HAD)
        if not len(possible):
            return Fetch()
        end, ends = int(possible[-1]) + 1, None
        if self._estimate is not None:
            paying = self._estimate.paying(reads, self._queued_reads, self._now)
            declined = int(reads[end - 1] - (reads[paying - 1] if paying else 0))
            self.stats.declined_blocks += max(0, declined)
            end, ends = paying, FetchEnd.SLOWER if declined > 0 else None
        room = self._limits.max_fetched_blocks - max(self._fetched, self._queued_reads)
        paying, end = end, int(np.flatnonzero(reads[:end] <= room).max(initial=-1)) + 1
        if end < paying:
            ends = FetchEnd.NO_ROOM
        if not end:
            return Fetch(ends=ends)
        parts = [slice(first, end) for first in self._groups.needed(end)]
        keys = np.concatenate([self._groups.keys(hashes[part], group) for group, part in enumerate(parts)])
        host = np.concatenate([slots[part] for slots, part in zip(found.host, parts, strict=True)])
        disk = np.concatenate([slots[part] for slots, part in zip(found.disk, parts, strict=True)])
        if not ((host < 0) | self._arriving[host]).any():
            return Fetch(ends=ends)
        slots, is_new = self._host.claim(keys, room)
        missing = np.flatnonzero(slots < 0)
        if len(missing):
            kept = int(missing[0]) if self._groups.single else 0
            rest = slots[kept:]
            self._host.release(rest[rest >= 0])
            slots, is_new = slots[:kept], is_new[:kept]
            ends = FetchEnd.NO_ROOM
        sources = disk[: len(slots)][is_new]
        self.pool.pin(sources)
        self._read(slots[is_new], sources)
        self._fetched += len(sources)
        # Twice: ranks count theirs from receipt, and reads may have to wait for each other.
        patience_s = 2 * self._limits.timeout_s
        if self._estimate is not None:
            patience_s = min(patience_s, self._estimate.patience_s(self._queued_reads))
        return Fetch(slots, self._now + patience_s, slots[is_new], ends)

    def _read(self, host_slots: Slots, disk_slots: Slots) -> None:
        """Both complete, or registered, and the disk slots pinned for this."""
        self._host.pin(host_slots)
        self._host.tag(host_slots, self.pool.tags(disk_slots))
        self._arriving[host_slots] = True
        self._queued_reads += len(host_slots)
        self._start(_READ, host_slots, disk_slots)

    # ---- operations ----

    def _start(self, direction: Direction, host_slots: Slots, disk_slots: Slots) -> None:
        hashes = self.pool.hashes(disk_slots)
        for at in range(0, len(host_slots), self._limits.max_batch_blocks):
            part = slice(at, at + self._limits.max_batch_blocks)
            operation = Operation(
                next(self._ids),
                direction,
                "",
                np.empty(0, np.int32),
                host_slots[part].astype(np.int32),
                self._limits.timeout_s,
                disk_slots=disk_slots[part].astype(np.int32),
                hashes=hashes[part],
            )
            self._in_flight[operation.id] = _Transfer(
                operation=operation,
                slots=host_slots[part],
                disk_slots=disk_slots[part],
                waiting_for=set(range(self._ranks)),
                started=self._now,
                deadline=self._now + 2 * self._limits.timeout_s,
                failed=np.zeros(len(operation.host_slots), bool),
            )
            self._orders.append(operation)

    def complete(self, rank: int, completion: Completion) -> None:
        """A rank's report on an operation. Reports on unknown operations are ignored."""
        transfer = self._in_flight.get(completion.operation_id)
        if transfer is None or not transfer.report(rank, completion):
            return
        if not completion.quiesced:
            self._expire(transfer)
        elif transfer.is_over:
            del self._in_flight[completion.operation_id]
            self._settle(transfer)

    def _expire(self, transfer: _Transfer) -> None:
        """Nobody may use the blocks that were to be filled, nor their memory before all is over."""
        transfer.expired = True
        if transfer.operation.direction == _READ:
            self._drop_host(transfer.slots[transfer.failed])
        else:
            self._withdraw(transfer.disk_slots[transfer.failed])

    def _settle(self, transfer: _Transfer) -> None:
        failed, reason, direction = transfer.failed, transfer.reason, transfer.operation.direction
        host, disk = transfer.slots, transfer.disk_slots
        self._count(direction, reason, int(np.count_nonzero(failed)))
        if direction == _READ:
            self._queued_reads -= len(host)
            self._arriving[host] = False
            arrived = host[~failed & (self._host.states(host) == _COMPLETE)]
            self._host.register(arrived)
            self.stats.read.done(len(arrived), len(host) - len(arrived), self._now - transfer.started)
            if self._estimate is not None and transfer.seconds:
                self._estimate.read(len(host), transfer.seconds, self._now)
            self._drop_host(host[failed])
            fate = Fate.DAMAGED if reason == Failure.CORRUPT else Fate.LOST
            if reason >= Failure.ERROR:  # it can't be read, or is damaged: it never will be better
                bad = disk[failed & (self.pool.states(disk) == _REGISTERED)]
                self.pool.withdraw(bad, fate)
                self._forget.append(bad)
        else:
            self._queued_writes -= len(host)
            written = disk[~failed & (self.pool.states(disk) == _COMPLETE)]
            self.pool.register(written)
            self.stats.write.done(len(written), len(host) - len(written), self._now - transfer.started)
            self._withdraw(disk[failed])
            # Failed, or cleared while they were written: some ranks may have them.
            self._no_more(disk[self.pool.states(disk) != _REGISTERED])
            if reason == Failure.CORRUPT:  # the host's bytes are not those that were offloaded
                bad = host[failed]
                self._drop(bad[self._host.states(bad) >= _COMPLETE], Fate.DAMAGED)
        self.pool.release(disk)
        self._host.release(host)

    def _count(self, direction: Direction, reason: Failure, failed: int) -> None:
        if failed:
            self.stats.failures[direction, reason] += failed
        if not failed or reason in (Failure.CANCELLED, Failure.CORRUPT):
            self._failures_in_row, self._pause_s = 0, _PAUSE_S[0]
            return
        self._failures_in_row += 1
        if self._failures_in_row >= _FAILURES_BEFORE_PAUSE and self._now >= self._paused_until:
            self._paused_until = self._now + self._pause_s
            self._pause_s = min(2 * self._pause_s, _PAUSE_S[1])

    def _drop_host(self, slots: Slots) -> None:
        """Host blocks that were to be filled."""
        self._drop(slots[self._host.states(slots) == _COMPLETE], Fate.LOST)

    def _withdraw(self, disk_slots: Slots) -> None:
        """Disk blocks that were to be filled."""
        lost = disk_slots[self.pool.states(disk_slots) == _COMPLETE]
        if len(lost):  # nobody could match them, so the pool tells nobody
            self._missed(self.pool.hashes(lost), Fate.LOST)
            self.pool.withdraw(lost)

    def resize(self, blocks: int) -> None:
        """Use the first `blocks` slots, now or when what an earlier run left is known."""
        self._limit = blocks
        if self.pool.usable:
            self._no_more(self.pool.beyond(blocks))
            self.pool.shrink(blocks)
            self.pool.grow(blocks)

    def clear_tag(self, tag: int) -> int:
        """Forget the blocks with this tag, and those of unknown origin; returns how many."""
        slots = self.pool.tagged(np.uint32(tag), UNKNOWN_TAG)
        self._no_more(slots)
        self.pool.withdraw(slots, Fate.CLEARED)
        return len(slots)

    def _no_more(self, slots: Slots) -> None:
        """Their records must not be found again. Those being written are forgotten when that is over, too."""
        if len(slots):
            self._forget.append(slots)

    def clear(self) -> None:
        """Forget all blocks. The ranks have to be told as well."""
        self._restore.forget()
        self.pool.clear()
        # Writes that no rank has heard of would come after the clearing.
        writes = [order for order in self._orders if order.direction == _WRITE]
        self._orders = [order for order in self._orders if order.direction != _WRITE]
        for order in writes:
            transfer = self._in_flight.pop(order.id)
            transfer.fail(slice(None), Failure.CANCELLED)
            self._settle(transfer)
