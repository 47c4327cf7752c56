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
from numpy.typing import NDArray

from kvbm.logic.admission import FrequencyFilter, WriteBudget
from kvbm.logic.estimate import LoadEstimate
from kvbm.logic.hashing import Hashes
from kvbm.logic.in_flight import InFlight
from kvbm.logic.index import Slots
from kvbm.logic.operations import BlockIds, Completion, Direction, Failure, Operation
from kvbm.logic.pool import BlockPool, BlockState

# Reading a member of an IntEnum costs a microsecond in Python 3.11.
_WRITE, _READ = Direction.WRITE, Direction.READ
_COMPLETE, _REGISTERED = np.uint8(BlockState.COMPLETE), np.uint8(BlockState.REGISTERED)
_NO_SLOTS = np.empty(0, np.int64)

# A tier that fails so often in a row is left alone for a while, each time for twice as long.
_FAILURES_BEFORE_PAUSE = 3
_PAUSE_S = (1.0, 60.0)
_ADOPT_AT_ONCE = 32768  # found records entered in one step: about 10 ms
_WARM_UP_BLOCKS = 64  # read into the host tier at start, which measures the tier as well


@dataclass(slots=True)
class DiskStats:
    """What happened, counted in blocks when it was complete."""

    recovered_blocks: int = 0  # found on disk at start
    written_blocks: int = 0
    read_blocks: int = 0
    not_admitted_blocks: int = 0  # the filter had not seen them often enough
    dropped_blocks: int = 0  # admitted, but the queue or the budget was full, or the tier had no room
    declined_blocks: int = 0  # on disk, but sooner computed again
    failures: Counter[tuple[Direction, Failure]] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class DiskLimits:
    """timeout_s: of one operation. patience_s: how long requests wait at start for what was stored before."""

    max_batch_blocks: int = 32
    max_queued_writes: int = 1024
    max_fetched_blocks: int = 1024
    timeout_s: float = 10.0
    patience_s: float = 5.0


@dataclass(slots=True)
class _Fetch:
    """A request's blocks on their way to the host tier, and kept there until it has used them."""

    slots: Slots = field(default_factory=lambda: _NO_SLOTS)
    deadline: float = 0.0
    read: int = 0  # of them come from disk


@dataclass(slots=True, kw_only=True)
class _Transfer(InFlight):
    disk_slots: Slots


class DiskTier:
    """One tier of disk slots, `pool`, below the `host` pool; block i has disk slot i in every rank's store.

    drop: withdraws host blocks whose bytes turned out to be missing or wrong. ids: numbers for operations.
    """

    def __init__(
        self,
        host: BlockPool,
        pool: BlockPool,
        *,
        ranks: int,
        ids: Iterator[int],
        drop: Callable[[Slots], None],
        limits: DiskLimits,
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
        self._limits = limits
        self._admission = admission
        self._budget = budget
        self._estimate = estimate
        self._now = 0.0
        self._orders: list[Operation] = []
        self._forget: list[Slots] = []
        self._in_flight: dict[int, _Transfer] = {}
        self._queued_writes = self._queued_reads = 0
        self._fetches: dict[str, _Fetch] = {}
        self._fetched = 0  # blocks that fetches hold
        self._arriving = np.zeros(host.capacity, bool)  # host slots that are being read into
        self._restore = _Restore(pool.capacity, ranks)
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
            or self.restoring
            or any(not transfer.expired for transfer in self._in_flight.values())
        )

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
        self._restore = _Restore(0, self._ranks)
        self.pool.grow(self.pool.capacity)
        room = min(len(newest), self._host.num_free // 2, self._limits.max_fetched_blocks)
        if room:
            disk = newest[::-1][:room]  # heads first, as all sequences are given
            host, is_new = self._host.claim(self.pool.hashes(disk), room)
            self.pool.pin(disk[is_new], reuse=False)
            self._read(host[is_new], disk[is_new])
            self._host.release(host[host >= 0])

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
        wanted = ~known
        if self._admission is not None:
            admitted = self._admission.admit(hashes)
            self.stats.not_admitted_blocks += int(np.count_nonzero(wanted & ~admitted))
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
        self.stats.dropped_blocks += wanted - int(np.count_nonzero(is_new))
        host_slots, slots = host_slots[:room][is_new], slots[is_new]
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
        if self._now >= fetch.deadline or not len(fetch.slots):
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
            self._fetched -= fetch.read
            self._fetches[request_id] = _Fetch()

    def finish(self, request_id: str) -> None:
        self.release(request_id)
        self._fetches.pop(request_id, None)

    def _begin(self, hashes: Hashes) -> _Fetch:
        if not self.ready or self._now < self._paused_until or not len(hashes):
            return _Fetch()
        host = self._host.find(hashes)
        in_host = host >= 0
        disk = self.pool.find(hashes)
        on_disk = (disk >= 0) & (self.pool.states(disk) == _REGISTERED) & ~in_host
        gaps = np.flatnonzero(~(in_host | on_disk))
        end = int(gaps[0]) if len(gaps) else len(hashes)
        to_read = on_disk[:end]
        if self._estimate is not None:
            end = self._estimate.paying(to_read, self._queued_reads, self._now)
            self.stats.declined_blocks += int(np.count_nonzero(to_read[end:]))
        room = self._limits.max_fetched_blocks - max(self._fetched, self._queued_reads)
        end = int(np.searchsorted(np.cumsum(to_read[:end]), room, side="right"))
        coming = to_read[:end] | (in_host[:end] & self._arriving[host[:end]])
        if not coming.any():
            return _Fetch()
        slots, is_new = self._host.claim(hashes[:end], room)
        missing = np.flatnonzero(slots < 0)
        if len(missing):
            rest = slots[missing[0] :]
            self._host.release(rest[rest >= 0])
            slots, is_new = slots[: missing[0]], is_new[: missing[0]]
        sources = disk[: len(slots)][is_new]
        self.pool.pin(sources)
        self._read(slots[is_new], sources)
        self._fetched += len(sources)
        # Twice: ranks count theirs from receipt, and reads may have to wait for each other.
        patience_s = 2 * self._limits.timeout_s
        if self._estimate is not None:
            patience_s = min(patience_s, self._estimate.patience_s(self._queued_reads))
        return _Fetch(slots, self._now + patience_s, len(sources))

    def _read(self, host_slots: Slots, disk_slots: Slots) -> None:
        """Both complete, or registered, and the disk slots pinned for this."""
        self._host.pin(host_slots)
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
            self.stats.read_blocks += len(arrived)
            if self._estimate is not None and transfer.seconds:
                self._estimate.read(len(host), transfer.seconds, self._now)
            self._drop_host(host[failed])
            if reason >= Failure.ERROR:  # it can't be read, or is damaged: it never will be better
                bad = disk[failed & (self.pool.states(disk) == _REGISTERED)]
                self.pool.withdraw(bad)
                self._forget.append(bad)
        else:
            self._queued_writes -= len(host)
            written = disk[~failed & (self.pool.states(disk) == _COMPLETE)]
            self.pool.register(written)
            self.stats.written_blocks += len(written)
            self._withdraw(disk[failed])
            if reason == Failure.CORRUPT:  # the host's bytes are not those that were offloaded
                bad = host[failed]
                self._drop(bad[self._host.states(bad) >= _COMPLETE])
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
        self._drop(slots[self._host.states(slots) == _COMPLETE])

    def _withdraw(self, disk_slots: Slots) -> None:
        self.pool.withdraw(disk_slots[self.pool.states(disk_slots) == _COMPLETE])

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


class _Restore:
    """Records that the ranks found at start, until it is known which of them all ranks have."""

    def __init__(self, capacity: int, ranks: int) -> None:
        self._ranks = ranks
        self._reported: set[int] = set()
        self._hashes = np.zeros((capacity, 2), np.uint64)
        self._votes = np.zeros(capacity, np.int32)
        self._order: list[NDArray[np.int64]] = []  # of rank 0
        self._agreed: Slots | None = None
        self._taken = 0

    def add(self, rank: int, slots: BlockIds, hashes: Hashes, last: bool) -> None:
        inside = (slots >= 0) & (slots < len(self._votes))
        own, hashes = slots[inside].astype(np.int64), hashes[inside]
        first = self._votes[own] == 0
        self._hashes[own[first]] = hashes[first]
        same = (self._hashes[own] == hashes).all(axis=1)
        self._votes[own[same]] += 1
        self._votes[own[~same]] = -(1 << 30)
        if rank == 0:
            self._order.append(own)
        if last:
            self._reported.add(rank)

    @property
    def complete(self) -> bool:
        return len(self._reported) == self._ranks

    def forget(self) -> None:
        """What was found, or will be, is not wanted."""
        self._agreed, self._taken = _NO_SLOTS, 0

    @property
    def newest(self) -> Slots:
        """The most recent of what all ranks have, at most _WARM_UP_BLOCKS, oldest first."""
        return self._agreed[-_WARM_UP_BLOCKS:] if self._agreed is not None else _NO_SLOTS

    def take(self, count: int) -> tuple[Slots, Hashes]:
        """The next of what all ranks have, oldest first."""
        if self._agreed is None:
            order = np.concatenate(self._order) if self._order else _NO_SLOTS
            self._agreed = order[self._votes[order] == self._ranks]
        slots = self._agreed[self._taken : self._taken + count]
        self._taken += len(slots)
        return slots, self._hashes[slots]
