"""The connector in vLLM's scheduler: vLLM's requests and steps in the leader's words."""

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvbm.config import Config
from kvbm.logic.followed import NO_BLOCK, Passing
from kvbm.logic.groups import KvGroups
from kvbm.logic.operations import Operation
from kvbm.logic.outcome import Outcome
from kvbm.observe.server import Server
from kvbm.runtime.admin import Admin
from kvbm.runtime.disk import disk_record_bytes, require_disk_slots, require_host_slots
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.runtime.observer import Observer
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.events import KvEvents, merge_events
from kvbm.vllm_integration.identity import Geometry, engine_namespace, geometry, identify
from kvbm.vllm_integration.stats import StatsSource

logger = logging.getLogger(__name__)

# Naming a block takes a microsecond.
_FIRST_LOOK = 16  # blocks that are named before the cache is first asked for them
_NAMES_A_STEP = 128  # as many as can be named while the model computes the shortest of steps
# To store one block costs as much as to store ten: those that requests fill one by one, as they decode, are
# stored together, from so many requests, or after so many steps.
_STORED_TOGETHER = 16
_STEPS_TOGETHER = 8


class SchedulerSide:
    """Every method is called by vLLM's scheduler, on its thread, and returns at once.

    leader: None where nothing can be cached. events_mode: how to merge KV events with the engine's, if it has
    any; None: not at all. steps_in_flight: how many the ranks may be at while the next is planned, as in a
    pipeline.
    """

    def __init__(
        self,
        leader: Leader | None,
        block_size: int,
        events_mode: str | None = None,
        groups: KvGroups | None = None,
        steps_in_flight: int = 1,
    ) -> None:
        self.leader = leader
        self._groups = groups or KvGroups()
        self._block_size = block_size
        self._requests: dict[str, Any] = {}
        self._extra_keys: dict[str, Mapping[int, bytes]] = {}  # of multimodal items, by block
        self._refused: set[str] = set()
        # The last offer to vLLM: first block, blocks of use, inside the step?
        self._offered: dict[str, tuple[int, int, bool]] = {}
        self._loading: set[str] = set()  # waiting for their load
        self._from_disk = "", 0  # the last load's request, and tokens that came from there
        # Whom the engine is busy with: of the last steps, and already chosen for the one being made.
        self._running: deque[set[str]] = deque([set()], maxlen=steps_in_flight)
        self._grown: list[str] = []  # who has computed blocks that are not stored
        self._store_in = 0  # steps until they are
        self._step_blocks = 0  # computed in the last step
        self._block_pool: Any = None
        self._held: Counter[int] = Counter()  # device blocks that offloads of finished requests read
        self._events_mode = events_mode
        self._events: KvEvents | None = None
        self.stats: StatsSource | None = None  # for vLLM's own metrics
        self.observer: Observer | None = None
        self.server: Server | None = None

    def bind_block_pool(self, block_pool: Any) -> None:
        self._block_pool = block_pool
        compat.before_reset(block_pool, self._release_held)
        if self.leader is not None and self._events_mode is not None:
            self._events = merge_events(
                block_pool, self.leader, block_size=self._block_size, mode=self._events_mode
            )

    # ---- a request arrives ----

    def match(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond `num_computed_tokens` that can be loaded, and whether the request must wait for them.

        Asked again in every step until it fits. None: the request has to wait for the answer.
        """
        leader = self.leader
        if leader is None or not self._follow(request) or num_computed_tokens % self._block_size:
            return 0, False
        first = num_computed_tokens // self._block_size
        if request.skip_reading_prefix_cache:
            leader.answered(request.request_id, 0, 0, 0, "the request asks not to read the cache")
            return 0, False
        # A step has to compute at least one token, and a whole block costs it no more.
        useful = max(0, (request.num_tokens - 1) // self._block_size - first)
        blocks = self._ask(leader, request, first, useful)
        if blocks is None:
            return None, False
        # An engine that has nothing else to do may as well start on the request while it is loaded. All
        # others would stand still meanwhile, so then the request waits and they go on.
        # Where a load may fail for want of a block in some group there is no way back inside a step.
        in_step = (
            leader.loads_in_step and self._groups.single and not any(self._running) and not self._loading
        )
        self._offered[request.request_id] = (first, useful, in_step)
        return blocks * self._block_size, blocks > 0 and not in_step

    def _ask(self, leader: Leader, request: Any, first: int, useful: int) -> int | None:
        """How many of the `useful` blocks from `first` on can be loaded, or None: see the leader's.

        The engine waits meanwhile: what comes behind the first block that nobody has is named later.
        """
        if self._events is not None or leader.disk is not None or not self._groups.single:
            self._hash(request)
        look = max(_FIRST_LOOK, len(leader.hasher(request.request_id) or ()) - first)
        while True:
            asked = min(look, useful)
            if asked:
                self._hash(request, first + asked)
            blocks = leader.match(request.request_id, first, asked)
            if asked == useful or blocks != asked:
                return blocks
            look *= 2

    def allocated(
        self, request: Any, block_ids: Sequence[Sequence[int]], num_external_tokens: int
    ) -> Operation | None:
        """vLLM gave the request `block_ids`, all of each group; num_external_tokens are ours to load.

        Returns the load if the step that is being planned reads what it brings.
        """
        leader, id_ = self.leader, request.request_id
        if leader is None or id_ not in self._requests:
            return None
        loaded = num_external_tokens // self._block_size
        tables = self._tables(block_ids)
        if id_ in self._offered:
            first, useful, _ = self._offered[id_]
            leader.answered(id_, first, loaded, useful)
        if not loaded:
            leader.set_table(id_, *tables)
            return None
        first, _, in_step = self._offered[id_]
        (self._running[-1] if in_step else self._loading).add(id_)
        load = leader.load(id_, first, loaded, *tables, in_step=in_step)
        self._from_disk = id_, load.from_disk * self._block_size
        return load.operation if in_step else None

    def tokens_from_disk(self, request_id: str) -> int:
        """Of the load that was ordered last, if it is this request's."""
        id_, tokens = self._from_disk
        return tokens if id_ == request_id else 0

    def _tables(self, block_ids: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """vLLM's block tables in the leader's words."""
        if self._groups.single:
            return block_ids
        tables = [np.array(table, np.int32) for table in block_ids]
        for table in tables:
            table[table == compat.NULL_BLOCK] = NO_BLOCK
        return [table.tolist() for table in tables]

    def _follow(self, request: Any) -> bool:
        """Whether the request is cached; decided when it is first seen."""
        id_ = request.request_id
        if id_ in self._requests:
            return True
        if self.leader is None or id_ in self._refused:
            return False
        identity = identify(request)
        if isinstance(identity, str):
            self._refused.add(id_)
            self.leader.refuse(identity, id_, request.num_prompt_tokens)
            return False
        self._requests[id_] = request
        self._extra_keys[id_] = identity.extra_keys(self._block_size)
        self.leader.start(
            id_,
            salt=identity.salt,
            adapter=identity.adapter,
            prompt_tokens=request.num_prompt_tokens,
            first_block=hash(tuple(request.all_token_ids[: self._block_size])),
        )
        return True

    def _hash(self, request: Any, blocks: int | None = None) -> None:
        """Hash the full blocks among the tokens known so far, or only the first `blocks` of them."""
        hasher = self.leader.hasher(request.request_id) if self.leader else None
        end = request.num_tokens if blocks is None else min(request.num_tokens, blocks * self._block_size)
        if hasher is None or end - hasher.num_tokens < self._block_size:
            return
        first = len(hasher)
        hasher.extend(request.all_token_ids[hasher.num_tokens : end], self._extra_keys[request.request_id])
        if self._events is not None:
            self._events.note(request, hasher, first)

    # ---- a step ----

    def build_orders(self, scheduler_output: Any) -> StepOrders:
        """Plan what this step's blocks need; the orders go to all ranks with the step.

        What the step computes is stored with the orders of the next, or of a later one: the device gets this
        one without delay.
        """
        leader = self.leader
        if leader is None:
            return StepOrders()
        leader.tick()
        if self._held and leader.off_reason is not None:
            self._release_held()
        for id_ in scheduler_output.preempted_req_ids or ():
            leader.preempt(id_)
        self._store_in -= 1
        if self._grown and self._store_in <= 0:
            grown, self._grown = self._grown, []
            leader.store(self._due(leader, grown))
        orders = leader.take_orders(scheduler_output.total_num_scheduled_tokens)
        changed = [new.req_id for new in scheduler_output.scheduled_new_reqs]
        prefill = bool(changed)
        cached = scheduler_output.scheduled_cached_reqs
        # A running request gets a block when the one before is full: all others have nothing to offload.
        for i, new_blocks in enumerate(cached.new_block_ids):
            if new_blocks is not None:
                id_ = cached.req_ids[i]
                changed.append(id_)
                prefill |= scheduler_output.num_scheduled_tokens[id_] >= self._block_size
                if id_ not in cached.resumed_req_ids:  # their table came with `allocated`
                    leader.extend_table(id_, *self._tables(new_blocks))
        self._running.append(set(scheduler_output.num_scheduled_tokens))
        if not self._groups.single:  # of some groups vLLM gives up blocks with the next step
            self._store_passing(changed, scheduler_output)
            return orders
        if not self._grown:
            self._store_in = _STEPS_TOGETHER
        self._grown = list(dict.fromkeys([*self._grown, *changed]))
        if prefill or len(self._grown) >= _STORED_TOGETHER:
            self._store_in = 0
        self._step_blocks = scheduler_output.total_num_scheduled_tokens // self._block_size
        if self._events is not None:  # vLLM's events of these blocks may come before the next step
            for id_ in changed:
                if id_ in self._requests:
                    self._hash(self._requests[id_])
        return orders

    def _store_passing(self, changed: list[str], scheduler_output: Any) -> None:
        """Store where vLLM gives up blocks, of groups that need only the last ones, before a request ends."""
        offers = compat.state_offers(scheduler_output)
        ids = list(dict.fromkeys([*changed, *offers]))
        passing = {
            id_: Passing(
                self._requests[id_].num_computed_tokens,
                [
                    (group, tokens // self._block_size - 1, block)
                    for group, block, tokens in offers.get(id_, ())
                    if tokens % self._block_size == 0
                ],
            )
            for id_ in ids
            if id_ in self._requests
        }
        if self.leader is not None and passing:
            computed = self._computed(list(passing), scheduler_output.num_scheduled_tokens)
            self._hold(self.leader.store(computed, passing))

    def _computed(self, request_ids: Sequence[str], num_scheduled: dict[str, int]) -> list[tuple[str, int]]:
        """Blocks of each request that are full, known and computed at the end of this step."""
        computed = []
        for id_ in request_ids:
            request = self._requests.get(id_)
            if request is not None:
                self._hash(request)
                computed.append((id_, self._full(request, num_scheduled.get(id_, 0))))
        return computed

    def _due(self, leader: Leader, grown: Sequence[str]) -> list[tuple[str, int]]:
        """The same before this step, but only as much as can be named while the last one is computed.

        The engine looks for the last step's tokens when it has planned this one. The next takes the rest.
        """
        room = max(_NAMES_A_STEP, self._step_blocks)
        due = []
        for id_ in grown:
            request = self._requests.get(id_)
            if request is None or id_ in self._loading:  # vLLM counts what is being loaded as computed
                continue
            named = len(leader.hasher(id_) or ())
            full = self._full(request)
            end = min(full, named + room)
            self._hash(request, end)
            room -= max(0, end - named)
            due.append((id_, end))
            if end < full:
                self._grown.append(id_)
        return due

    def _full(self, request: Any, scheduled: int = 0) -> int:
        """Blocks full of tokens that are known, and computed together with those scheduled now."""
        # Tokens that are only proposed (speculative, or in flight) are not among num_tokens.
        return min(request.num_tokens, request.num_computed_tokens + scheduled) // self._block_size

    def update(self, finished_recving: Sequence[str] | set[str], reports: Sequence[WorkerReport]) -> None:
        """What the ranks reported with the last step."""
        self._loading.difference_update(finished_recving)
        if self.leader is not None:
            for outcome in self.leader.receive(reports):
                self._apply(outcome)

    # ---- ends ----

    def finish(self, request: Any, block_ids: Sequence[Sequence[int]]) -> None:
        """The request has ended and vLLM is about to free its blocks; we keep those that copies read."""
        id_ = request.request_id
        for step in self._running:
            step.discard(id_)
        if self.leader is None or id_ not in self._requests:
            if self.leader is not None and id_ in self._refused:
                self.leader.ended(id_)
            self._refused.discard(id_)
            return
        tokens = min(request.num_tokens, request.num_computed_tokens)
        if id_ in self._loading:  # counted as computed by vLLM, but not there yet
            tokens = 0
        self._hash(request)
        hasher = self.leader.hasher(id_)
        outcome = self.leader.finish(id_, tokens // self._block_size, *self._tables(block_ids))
        self.leader.ended(id_, hasher, request.num_tokens - request.num_prompt_tokens)
        self._hold(outcome)
        self._loading.discard(id_)
        for table in (self._requests, self._extra_keys, self._offered):
            table.pop(id_, None)

    def reset(self) -> bool:
        return self.leader is None or self.leader.reset()

    @property
    def has_work(self) -> bool:
        """Whether an engine without requests must step on."""
        if self._events is not None and self._events.pending:
            return True
        return self.leader is not None and self.leader.has_work

    def close(self) -> None:
        """The engine ends."""
        if self.server is not None:
            self.server.close()
        if self.observer is not None:
            self.observer.close()

    # ---- device blocks ----

    def _hold(self, outcome: Outcome) -> None:
        """Keep what offloads read: they give it back."""
        for held in outcome.hold:
            self._held.update(held.tolist())
        self._apply(outcome)

    def _apply(self, outcome: Outcome) -> None:
        for blocks in outcome.hold:
            compat.hold_blocks(self._block_pool, blocks.tolist())
        for blocks in outcome.release:
            self._held.subtract(blocks.tolist())
        for blocks in (*outcome.release, *outcome.release_loaded):
            compat.release_blocks(self._block_pool, blocks.tolist())

    def _release_held(self) -> None:
        """Give back what offloads of finished requests still read: they are lost, the blocks are free.

        Blocks held for loads that timed out stay out of use: a stuck copy may still write to them.
        """
        if self.leader is not None:
            self.leader.abandon()
        compat.release_blocks(self._block_pool, list((+self._held).elements()))
        self._held.clear()


def make_scheduler_side(vllm_config: Any, kv_cache_config: Any, config: Config) -> SchedulerSide:
    """For this engine; where nothing can be cached, the log says why."""
    if not config.enabled:
        return SchedulerSide(None, 0)
    shape = geometry(vllm_config, kv_cache_config)
    if isinstance(shape, str):
        logger.warning("KVBM: caching is off: %s", shape)
        return SchedulerSide(None, 0)
    observer = Observer(
        config.observe,
        shape.block_size,
        engine=vllm_config.instance_id,
        block_bytes=shape.host_bytes(1),
    )
    leader = Leader(
        config,
        namespace=engine_namespace(vllm_config, kv_cache_config, shape),
        block_size=shape.block_size,
        num_slots=slots_of(shape, config),
        ranks=shape.ranks,
        shared=shape.shared,
        groups=shape.groups,
        disk_slots=disk_slots_of(shape, config),
        disk_record_bytes=disk_record_bytes(shape.records),
        observer=observer,
    )
    events_mode = config.observe.events_mode if config.observe.events and shape.groups.single else None
    side = SchedulerSide(
        leader, shape.block_size, events_mode, shape.groups, steps_in_flight=max(1, len(shape.stages))
    )
    block_bytes, disk_block_bytes = shape.host_bytes(1), disk_record_bytes(shape.records)
    side.stats = StatsSource(leader, observer.log, block_bytes, disk_block_bytes)
    side.observer = observer
    if config.observe.metrics:
        admin = Admin(leader, observer, block_bytes=block_bytes, disk_block_bytes=disk_block_bytes)
        side.server = Server(admin, config.observe)
    return side


def slots_of(shape: Geometry, config: Config) -> int:
    """Blocks of the host tier; CapacityError if the configured size holds none."""
    return require_host_slots(config, shape.records)


def disk_slots_of(shape: Geometry, config: Config) -> int:
    """Blocks of the disk tier, 0 without one; CapacityError if the configured size holds none."""
    return require_disk_slots(config, shape.records)
