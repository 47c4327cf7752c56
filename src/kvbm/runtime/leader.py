"""The leader: index and decisions of one engine, in the engine's scheduler process.

It gives the planner a clock, waits until every rank is ready, and keeps the engine safe from us: an error
inside turns caching off for the rest of the run, with one log entry, and every question is then answered
"not cached".
"""

import functools
import itertools
import logging
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, NamedTuple, TypeVar

import numpy as np

from kvbm.config import Config
from kvbm.logic.disk import DiskTier
from kvbm.logic.estimate import LoadEstimate, StepTimes
from kvbm.logic.followed import NO_BLOCK, Passing
from kvbm.logic.groups import KvGroups
from kvbm.logic.hashing import Hashes, SequenceHasher, epoch_namespace, page_hasher, root_hash, salt_tag
from kvbm.logic.history import Fate
from kvbm.logic.index import Slots
from kvbm.logic.operations import Direction, Operation
from kvbm.logic.outcome import Outcome, Stats
from kvbm.logic.planner import Planner
from kvbm.logic.policies import load_policy
from kvbm.logic.pool import BlockEvent, BlockPool, EventKind, subscribe_to_all
from kvbm.observe.requests import FirstMiss, Identity, Miss
from kvbm.runtime.disk import make_disk_tier
from kvbm.runtime.guard import off_on_error
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.runtime.observer import Observer, first_miss
from kvbm.runtime.upkeep import Upkeep

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class OrderedLoad(NamedTuple):
    """from_disk: how many of its blocks lay on disk until the request asked for them."""

    operation: Operation
    from_disk: int


class Leader:
    """Decides for one engine with `ranks` workers. Calls come from one thread, the engine's scheduler.

    lock: held for a call, and by other threads (metrics, administration) for as long as they look at the
    leader's state or change it: never while anybody waits for anything.
    num_slots, disk_slots: blocks in the host and disk tiers. disk_record_bytes: what a block takes on disk,
    on all ranks together. shared: all ranks use the tiers of the first, which alone reports of the disk.
    namespace: 16 bytes, see `namespace_digest`.
    """

    def __init__(
        self,
        config: Config,
        *,
        namespace: bytes,
        block_size: int,
        num_slots: int,
        ranks: int,
        shared: bool = False,
        groups: KvGroups | None = None,
        disk_slots: int = 0,
        disk_record_bytes: int = 0,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lock = threading.RLock()
        self.administered = False  # what happens now is asked for by another thread than the engine's
        self.off_reason: str | None = None  # set: nothing is cached, and why
        self.not_cached: Counter[str] = Counter()  # requests by reason
        self._base_namespace = namespace
        self._namespace = namespace  # of the present weights
        self._block_size = block_size
        self._exchange = config.disk.exchange
        self._num_slots = num_slots
        self._ranks = ranks
        self._clock = clock
        self._observer = observer
        self._init_timeout_s = config.engine.init_timeout_s
        self._init_deadline: float | None = None  # counted from the first step
        self._timeout_s = config.transfer.timeout_s
        self._ready_slots: dict[int, int] = {}  # by rank
        self._loads_in_step = True  # every rank can
        self._orders = StepOrders()
        self._lost_loads = 0
        self._pool = BlockPool(num_slots, load_policy(config.host.policy), usable=0)
        ids = itertools.count()
        self._planner = Planner(
            self._pool,
            ranks=ranks,
            max_batch_blocks=config.transfer.max_batch_blocks,
            max_queued_blocks=config.transfer.max_queued_blocks,
            timeout_s=config.transfer.timeout_s,
            groups=groups,
            ids=ids,
            seen=self._seen if disk_slots else None,
            missed=functools.partial(self._not_taken, "host"),
        )
        self._estimate = LoadEstimate(block_size)
        self._steps = StepTimes(self._estimate)
        self._disk: DiskTier | None = None
        if disk_slots:
            self._disk = make_disk_tier(
                config,
                self._pool,
                capacity=disk_slots,
                record_bytes=disk_record_bytes,
                ranks=1 if shared else ranks,
                ids=ids,
                groups=self._planner.groups,
                drop=self._planner.drop,
                estimate=self._estimate,
                missed=functools.partial(self._not_taken, "disk"),
            )
        self.upkeep = Upkeep(self._planner, self._disk)
        if observer is not None and observer.detailed:
            self.subscribe(lambda event: observer.block_event(event, self._clock()), [EventKind.REMOVED])

    # ---- what users see ----

    @property
    def stats(self) -> Stats:
        return self._planner.stats

    @property
    def disk(self) -> DiskTier | None:
        return self._disk

    @property
    def pool(self) -> BlockPool:
        return self._pool

    @property
    def queued(self) -> tuple[int, int]:
        """Blocks that are being offloaded, and onboarded."""
        return self._planner.queued

    @property
    def ready(self) -> bool:
        """All ranks have some of their memory; until then nothing is matched or offloaded."""
        return self.off_reason is None and self._pool.usable > 0

    @property
    def loads_in_step(self) -> bool:
        """Whether all ranks can order a step's forward pass behind a load."""
        return self._loads_in_step and self.ready

    def subscribe(
        self, subscriber: Callable[[BlockEvent], None], kinds: Sequence[EventKind] = tuple(EventKind)
    ) -> Callable[[], None]:
        """Call with every stored and removed event; an error in the subscriber ends its subscription."""

        def guarded(event: BlockEvent) -> None:
            try:
                subscriber(event)
            except Exception:
                logger.exception("KVBM: an event subscriber raised and is unsubscribed")
                unsubscribe()

        below = [self._disk.pool] if self._disk is not None else []
        unsubscribe = subscribe_to_all([self._pool, *below], guarded, kinds)
        return unsubscribe

    # ---- requests ----

    @off_on_error(lambda: None)
    def start(
        self,
        request_id: str,
        *,
        salt: str | None = None,
        adapter: str | None = None,
        prompt_tokens: int = 0,
        first_block: int = 0,
    ) -> None:
        """Follow a request whose content is identified by salt, adapter and what `tokens` is given.

        first_block: digest of its first block's tokens alone, for observers.
        """
        tag = salt_tag(salt)
        self._planner.add_request(request_id, self._hasher(salt, adapter), tag)
        self._tell(Observer.arrived, request_id, prompt_tokens, Identity(tag, adapter, first_block))

    def _hasher(self, salt: str | None, adapter: str | None = None) -> SequenceHasher:
        # Other engines know neither our adapters nor weights that came later.
        if self._exchange and adapter is None and self._namespace == self._base_namespace:
            return page_hasher(self._block_size, salt=salt)
        root = root_hash(self._namespace, self._block_size, salt=salt, adapter=adapter)
        return SequenceHasher(root, self._block_size)

    def refuse(self, reason: str, request_id: str = "", prompt_tokens: int = 0) -> None:
        """Count a request that isn't cached; the log names each reason once."""
        if not self.not_cached[reason]:
            logger.warning("KVBM: a request is not cached: %s. Further ones are only counted.", reason)
        with self.lock:
            self.not_cached[reason] += 1
        self._tell(Observer.refused, request_id, prompt_tokens, reason)

    def answered(self, request_id: str, first: int, loaded: int, wanted: int, unread: str = "") -> None:
        """For observers: the engine starts on the request, whose first `first` blocks lie on the device.

        `loaded` of the `wanted` next ones will be loaded. Comes before `load` or `set_table`. unread: why the
        cache is not even asked.
        """
        if self._observer is None:
            return
        miss = None
        if unread:
            miss = FirstMiss(first, reason=Miss.UNSUPPORTED, detail=unread)
        elif loaded < wanted and self._observer.detailed:  # without the server nobody sees it
            block = first + loaded
            miss = self._first_miss(request_id, block)
            miss = miss or FirstMiss(
                block, reason=Miss.NOT_READY, detail=f"caching is off: {self.off_reason}"
            )
        self._tell(Observer.answered, request_id, first, wanted, miss, self._clock())

    @off_on_error(lambda: None)
    def _first_miss(self, request_id: str, block: int) -> FirstMiss | None:
        if not self.ready:
            return FirstMiss(block, reason=Miss.NOT_READY, detail="the host tier's memory was not ready yet")
        return first_miss(request_id, block, self._planner, self._disk)

    @off_on_error(lambda: None)
    def hasher(self, request_id: str) -> SequenceHasher | None:
        """The request's hash chain, for the caller to extend; None if the request is not followed."""
        return self._planner.hasher(request_id)

    @off_on_error(lambda: 0)
    def match(self, request_id: str, first: int, limit: int = sys.maxsize) -> int | None:
        """Number of blocks from block `first` on, at most `limit`, that can be loaded. Cheap.

        None: not known yet, as blocks are on their way from disk; ask again in the next step.
        """
        if self._disk is not None and self._disk.restoring and limit > 0:
            return None
        if not self.ready:
            return 0
        if self._disk is not None and limit > 0 and self._planner.may_load(request_id):
            self._disk.wake(self._clock())
            hasher = self._planner.hasher(request_id)
            if hasher and not self._disk.fetch(request_id, hasher.hashes[first : first + limit]):
                return None
        return self._planner.match(request_id, first, limit)

    def load(
        self, request_id: str, first: int, count: int, *tables: Sequence[int], in_step: bool = False
    ) -> OrderedLoad:
        """Order the load of blocks first .. first+count-1; `tables` are the request's, whole, of each group.

        The engine waits for this load, so there is always an operation, if only one that fails.
        in_step: the next step's forward pass reads the blocks.
        """
        with self.lock:
            load = self._load(request_id, first, count, tables, in_step)
            if load is None:
                blocks = np.concatenate(
                    [np.asarray(table[first : first + count], np.int32) for table in tables]
                )
                blocks = blocks[blocks != NO_BLOCK]
                nothing = np.full(len(blocks), -1, np.int32)
                self._lost_loads += 1
                id_ = -self._lost_loads
                operation = Operation(
                    id_, Direction.ONBOARD, request_id, blocks, nothing, self._timeout_s, in_step
                )
                load = OrderedLoad(operation, 0)
            self._orders.operations.append(load.operation)
            return load

    @off_on_error(lambda: None)
    def set_table(self, request_id: str, *tables: Sequence[int]) -> None:
        """The request got these device blocks, and runs without what is not loaded now."""
        self._planner.set_table(request_id, *tables)
        if self._disk is not None:
            self._disk.release(request_id)

    @off_on_error(lambda: None)
    def extend_table(self, request_id: str, *tables: Sequence[int]) -> None:
        self._planner.extend_table(request_id, *tables)

    @off_on_error(Outcome)
    def store(
        self, computed: Iterable[tuple[str, int]], passing: Mapping[str, Passing] | None = None
    ) -> Outcome:
        """Order the offload of what the host lacks of each request's first `n` blocks; see the planner's."""
        if not self.ready:
            return Outcome()
        operations, outcome = self._planner.store(computed, self._clock(), passing)
        self._orders.operations += operations
        return outcome

    @off_on_error(lambda: None)
    def preempt(self, request_id: str) -> None:
        """The request's device blocks are given to others in this step."""
        self._orders.cancel += self._planner.preempt(request_id)

    @off_on_error(Outcome)
    def finish(self, request_id: str, blocks: int, *tables: Sequence[int]) -> Outcome:
        """The request has ended; its first `blocks` blocks are computed and lie where `tables` say."""
        operations, outcome = self._planner.finish(
            request_id, blocks if self.ready else 0, self._clock(), *tables
        )
        self._orders.operations += operations
        if self._disk is not None:
            self._disk.finish(request_id)
        return outcome

    def ended(self, request_id: str, hasher: SequenceHasher | None = None, output_tokens: int = 0) -> None:
        """For observers: the request is over, after `finish`, or without it where it was not followed."""
        self._tell(Observer.finished, request_id, hasher.hashes if hasher else None, output_tokens)

    @off_on_error(Outcome)
    def abandon(self) -> Outcome:
        """Release the device blocks of finished requests now, at the cost of the offloads that read them."""
        cancelled, outcome = self._planner.abandon()
        self._orders.cancel += cancelled
        return outcome

    # ---- workers ----

    def take_orders(self, tokens: int = 0) -> StepOrders:
        """What the ranks have to do in this step, in which the model computes `tokens`. Once a step."""
        with self.lock:
            orders, self._orders = self._orders, StepOrders()
            orders.tokens = tokens
            if self._disk is not None or self._observer is not None:
                orders.timed = self._steps.planned(tokens, self._clock())
            if self._disk is not None and self.off_reason is None:
                operations, orders.forget = self._disk.take_orders()
                orders.operations += operations
            return orders

    def receive(self, reports: Iterable[WorkerReport]) -> list[Outcome]:
        """Take in the ranks' reports on a step. Outcomes say which device blocks to hold and release."""
        reports = list(reports)
        if not reports:  # as in most steps
            self._steps.over(timed=False, now=self._clock())
            return []
        with self.lock:
            return self._take_in(reports)

    def _take_in(self, reports: list[WorkerReport]) -> list[Outcome]:
        self._steps.over(any(report.timed for report in reports), self._clock())
        if self.off_reason is None:
            return [outcome for report in reports for outcome in self._receive(report)]
        # Nobody waits for completions any more, but a load that hangs may still write to its blocks: these
        # stay out of use for good.
        hung = [done.operation_id for report in reports for done in report.completions if not done.quiesced]
        targets = [self._planner.load_target(id_) for id_ in hung]
        return [Outcome(hold=[blocks]) for blocks in targets if blocks is not None]

    def tick(self) -> None:
        """Let deadlines pass. Once a step."""
        if self.off_reason is None:
            self._tick()

    @property
    def has_work(self) -> bool:
        """Whether the engine must step on, though it has no request, so that orders and reports travel."""
        return bool(self._orders.operations) or self._orders.forget_all or self._has_work()

    def reset(self) -> bool:
        """The engine resets its caches, as after a change of weights: forget all blocks.

        False if that could not be done.
        """
        return self._reset()

    # ---- administration, from any thread ----

    def hashes_of(self, tokens: Sequence[int], salt: str | None) -> Hashes:
        """Sequence hashes of the whole blocks among `tokens`, as of a request without adapter."""
        hasher = self._hasher(salt)
        hasher.extend(tokens)
        return hasher.hashes

    @off_on_error(lambda: None)
    def administer(self, action: Callable[[Upkeep, float], _T]) -> _T | None:
        """`action` with the time, between two calls of the engine; None if caching is off."""
        self.administered = True
        try:
            return action(self.upkeep, self._clock())
        finally:
            self.administered = False
            self._orders.forget_all |= self.upkeep.take_forget_all()

    @off_on_error(lambda: None)
    def new_weights(self, version: str | None) -> str:
        """The model's weights have changed: blocks of the old ones are never used for the new ones.

        version: what names the new weights, in this run and others; None: they have no name, and their blocks
        are of no use to another run. Returns the name. Takes no longer for more blocks: those of the old
        weights stay until their room is wanted, and are there again when the old weights are.
        """
        return self._begin_epoch(version)

    def _begin_epoch(self, version: str | None) -> str:
        version = uuid.uuid4().hex if version is None else version
        self._namespace = epoch_namespace(self._base_namespace, version)
        self._planner.fence()
        self._tell(Observer.new_weights, self._clock())
        return version

    # ---- guarded insides ----

    @off_on_error(lambda: None)
    def _load(
        self, request_id: str, first: int, count: int, tables: Sequence[Sequence[int]], in_step: bool
    ) -> OrderedLoad | None:
        self._planner.set_table(request_id, *tables)
        operation = self._planner.load(request_id, first, count, self._clock(), in_step=in_step)
        read = np.empty(0, np.int64)
        if self._disk is not None:
            read, _ = self._disk.fetched(request_id)
            self._disk.release(request_id)
        if operation is None:
            return None
        from_disk = self._planner.groups.by_block(count, np.isin(operation.host_slots, read))
        self._tell(Observer.load_ordered, operation.id, request_id, first, from_disk)
        return OrderedLoad(operation, int(np.count_nonzero(from_disk)))

    @off_on_error(list)
    def _receive(self, report: WorkerReport) -> list[Outcome]:
        if report.refused is not None:
            self.off_reason = report.refused
            logger.warning("KVBM: caching is off: %s", report.refused)
            return []
        if report.ready_slots > self._ready_slots.get(report.rank, 0) and report.rank in range(self._ranks):
            if report.num_slots != self._num_slots:
                self.off_reason = f"rank {report.rank} has {report.num_slots} blocks, not {self._num_slots}"
                logger.error("KVBM: caching is off: %s. Please report this.", self.off_reason)
                return []
            self._ready_slots[report.rank] = report.ready_slots
            self._loads_in_step &= report.loads_in_step
            if len(self._ready_slots) == self._ranks:
                self._grow(min(self._ready_slots.values()))
        if self._disk is not None:
            self._receive_of_disk(self._disk, report)
        now = self._clock()
        outcomes = [self._planner.complete(report.rank, completion, now) for completion in report.completions]
        for outcome in outcomes:
            if outcome.loaded is not None:
                self._tell(Observer.loaded, outcome.loaded, self._estimate.tokens_per_s)
        return outcomes

    def _receive_of_disk(self, disk: DiskTier, report: WorkerReport) -> None:
        if report.disk_refused is not None and disk.off_reason is None:
            logger.error("KVBM: the disk tier is off: %s", report.disk_refused)
            disk.turn_off(report.disk_refused)
        if report.foreign_records and self._observer is not None:
            self._observer.foreign_records = True
        if report.found is not None:
            disk.found(report.rank, *report.found, report.found_all)
        disk.wake(self._clock())
        for completion in report.completions:
            disk.complete(report.rank, completion)

    def _grow(self, usable: int) -> None:
        before, total = self._pool.usable, self._num_slots
        self.upkeep.host_has(usable)
        if self._pool.usable == total > before:
            logger.info("KVBM: host tier ready, %d blocks of %d tokens", total, self._block_size)
        elif not before:
            logger.info("KVBM: host tier in use while its memory is pinned: %d of %d blocks", usable, total)

    @off_on_error(lambda: None)
    def _tick(self) -> None:
        now = self._clock()
        self._planner.expire(now)
        self._tell(Observer.tick, now)
        if self._disk is not None:
            was_ready = self._disk.ready
            self._disk.tick(now)
            if self._disk.ready and not was_ready:
                logger.info(
                    "KVBM: disk tier ready, %d blocks, %d of them from an earlier run",
                    self._disk.pool.capacity,
                    self._disk.stats.recovered_blocks,
                )
        self.upkeep.tick(now)
        if self.ready:
            return
        if self._init_deadline is None:
            self._init_deadline = now + self._init_timeout_s
        elif now > self._init_deadline:
            missing = sorted(set(range(self._ranks)) - set(self._ready_slots))
            self.off_reason = f"ranks {missing} did not report in time"
            logger.error(
                "KVBM: caching is off: %s. Raise DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS?", self.off_reason
            )

    @off_on_error(lambda: False)
    def _has_work(self) -> bool:
        return self._planner.has_work or (self._disk is not None and self._disk.has_work)

    @off_on_error(lambda: False)
    def _reset(self) -> bool:
        self._begin_epoch(None)
        self.upkeep.clear(None, None)
        self._orders.forget_all |= self.upkeep.take_forget_all()
        return True

    def _seen(self, slots: Slots) -> None:
        if self._disk is not None:
            self._disk.seen(slots)

    def _not_taken(self, tier: str, hashes: Hashes, fate: Fate) -> None:
        self._tell(Observer.not_taken, tier, hashes, fate, self._clock())

    def _tell(self, event: Callable[Concatenate[Observer, ...], None], *args: Any) -> None:
        """Nothing that observers do can touch the cache."""
        with self.lock:
            if self._observer is None:
                return
            try:
                event(self._observer, *args)
            except Exception:
                logger.exception("KVBM: an internal error in observing requests, which ends here")
                self._observer = None
