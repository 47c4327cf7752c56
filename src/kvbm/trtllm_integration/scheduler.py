"""The connector's leader, on rank 0: TensorRT-LLM's requests and steps in the leader's words.

An answer can't be taken back here: the engine has no way to hear that a load failed. So only what lies in
every rank's host memory is promised. It is pinned, and the index is left alone until the load is ordered.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbm.config import Config
from kvbm.logic.index import Slots
from kvbm.observe.server import Server
from kvbm.runtime.admin import Admin
from kvbm.runtime.channel import Hello, Lost, ReportReceiver
from kvbm.runtime.disk import disk_record_bytes, host_record_bytes, num_disk_slots, num_host_slots
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.runtime.observer import Observer
from kvbm.trtllm_integration.identity import (
    Geometry,
    RequestIdentity,
    engine_namespace,
    geometry,
    identify,
)

logger = logging.getLogger(__name__)

NO_PAGE = -1
_DEFAULT_PRIORITY = 35  # TensorRT-LLM's, for blocks of requests that ask for none
_PARTIAL = "the device holds part of a block: set kv_cache_config.enable_partial_reuse to false"


@dataclass(slots=True)
class Metadata:
    """Leader to all ranks, with each step. address: where they report to."""

    address: str
    orders: StepOrders = field(default_factory=StepOrders)
    # Requests whose loads are ordered, all of them by now; there may be none to make.
    loading: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Promise:
    first: int  # block
    count: int
    slots: Slots  # pinned


@dataclass(slots=True)
class _Request:
    identity: RequestIdentity
    tokens: list[int]  # those known
    prompt_tokens: int
    table: list[int] = field(default_factory=list)  # device blocks; it ends before the first without a page
    whole: bool = True  # the table holds all blocks
    num_blocks: int = 0  # that the engine has named, with or without page
    reported: bool = False  # since it got these blocks
    followed: bool = False  # by the leader
    full: int = 0  # blocks computed by the end of the step
    stored: int = 0  # of these, what the leader was told
    wanted: int | None = None  # only so many blocks are to be offloaded
    promise: _Promise | None = None  # until it is allocated


class SchedulerSide:
    """Every method is called by TensorRT-LLM's executor, on one thread, and returns at once.

    shape: or the reason why nothing is cached. make_leader: given the bytes of a record, which only the ranks
    know, when they have told them; with the server of its metrics.
    """

    def __init__(
        self,
        config: Config,
        shape: Geometry | str,
        make_leader: Callable[[int], tuple[Leader, Server | None]],
    ) -> None:
        self.leader: Leader | None = None
        self.refused: str | None = None
        self._min_priority = config.host.offload_min_priority
        self._shape = shape
        self._make_leader = make_leader
        self._receiver: ReportReceiver | None = None
        if isinstance(shape, str):
            self.turn_off(shape)
        else:
            self._receiver = ReportReceiver()
        self._record_bytes = 0
        self.server: Server | None = None
        self._requests: dict[str, _Request] = {}
        self._uncached: set[str] = set()
        self._loads: Counter[str] = Counter()  # loads of a request that not all ranks have finished
        self._loading: list[str] = []  # requests whose loads the next metadata bring
        self._polled = False
        self._promised = 0  # promises that are not allocated yet
        self._locked: Leader | None = None

    # ---- a request arrives ----

    def match(self, request: Any, num_computed_tokens: int) -> int:
        """Tokens beyond `num_computed_tokens` that will be loaded; asked once for each allocation."""
        self._poll()
        if isinstance(self._shape, str) or self.refused is not None:
            return 0
        id_, size = str(request.request_id), self._shape.block_size
        if id_ in self._requests:  # its blocks were taken from it, and it begins again
            if self.leader is not None:
                self.leader.preempt(id_)
            self._forget(id_)
        tokens = list(request.get_tokens(0))
        identity, leader = identify(request), self.leader
        if isinstance(identity, str):
            self._uncached.add(id_)
            if leader is not None:
                leader.refuse(identity, id_, len(tokens))
            return 0
        state = self._requests[id_] = _Request(identity, tokens, len(tokens))
        if leader is None:
            return 0
        self._follow(id_, state, leader)
        first = num_computed_tokens // size
        useful = max(0, (len(tokens) - 1) // size - first)  # one token has to be computed
        if num_computed_tokens % size:
            leader.answered(id_, first, 0, useful, _PARTIAL)
            return 0
        self._lock(leader)
        # None where blocks are on their way from disk: the engine can't wait for an answer, so that they are
        # for whoever comes next.
        blocks = leader.match(id_, first, useful) or 0
        leader.answered(id_, first, blocks, useful)
        hasher = leader.hasher(id_)
        if not blocks or hasher is None:
            self._unlock_if_kept()
            return 0
        slots = leader.pool.match(hasher.hashes[first : first + blocks])
        leader.pool.pin(slots)
        state.promise = _Promise(first, len(slots), slots)
        self._promised += 1
        return len(slots) * size

    def allocated(self, request: Any, block_ids: Sequence[int]) -> None:
        """The request has these device blocks, from its head."""
        id_ = str(request.request_id)
        state, leader = self._requests.get(id_), self.leader
        if state is None:
            return
        if leader is not None and (promise := state.promise) is not None:
            self._loading.append(id_)
            for start, end in _runs(block_ids[: promise.first + promise.count], promise.first):
                self._loads[id_] += 1
                leader.load(id_, start, end - start, block_ids)
            self._release_promise(state)
        elif leader is not None and state.followed:
            leader.set_table(id_, block_ids)
        self._unlock_if_kept()

    # ---- a step ----

    def build(self, output: Any) -> Metadata:
        """Plan what this step's blocks need; the orders go to all ranks with the step."""
        self._unlock()
        self._poll()
        self._polled = False
        loading, self._loading = self._loading, []
        metadata = Metadata(self._receiver.address if self._receiver is not None else "", loading=loading)
        leader = self.leader
        steps = [(data, True) for data in output.new_requests] + [
            (data, False) for data in output.cached_requests
        ]
        for data, is_new in steps:
            self._update(data, is_new)
        if leader is None:
            return metadata
        leader.tick()
        here = {str(data.request_id) for data, _ in steps}
        computed: list[tuple[str, int]] = []
        for id_, state in self._requests.items():
            if id_ not in here:
                # It may have lost its blocks, which nobody tells us: what reads them now may be wrong.
                leader.preempt(id_)
                state.stored = 0
                continue
            if not state.followed:
                self._follow(id_, state, leader)
                leader.set_table(id_, state.table)
            blocks = state.full if state.wanted is None else min(state.full, state.wanted)
            if blocks > state.stored:
                state.stored = blocks
                self._hash(id_, state, leader)
                computed.append((id_, blocks))
        if computed:
            leader.store(computed)
        metadata.orders = leader.take_orders()
        return metadata

    def finish(self, request: Any) -> bool:
        """The request has ended. True: the ranks say when its blocks may be used again."""
        self._unlock()
        id_ = str(request.request_id)
        state, leader = self._requests.get(id_), self.leader
        if state is None:
            if leader is not None and id_ in self._uncached:
                leader.ended(id_)
            self._uncached.discard(id_)
            return False
        held = self._forget(id_)
        if leader is None:
            return False
        # An error leaves copies behind of which nothing is known any more.
        return held or leader.off_reason is not None

    def turn_off(self, reason: str) -> None:
        """Nothing is promised or ordered any more."""
        if self.refused is None:
            self.refused = reason
            logger.warning("KVBM: caching is off: %s", reason)
        if self.leader is not None and self.leader.off_reason is None:
            self.leader.off_reason = reason

    def close(self) -> None:
        self._unlock()
        if self._receiver is not None:
            self._receiver.close()
        if self.server is not None:
            self.server.close()

    # ---- inside ----

    def _follow(self, id_: str, state: _Request, leader: Leader) -> None:
        size = len(state.tokens)
        block_size = self._shape.block_size if isinstance(self._shape, Geometry) else size
        leader.start(
            id_,
            salt=state.identity.salt,
            adapter=state.identity.adapter,
            prompt_tokens=state.prompt_tokens,
            first_block=hash(tuple(state.tokens[:block_size])),
        )
        state.followed = True
        self._hash(id_, state, leader)

    @staticmethod
    def _hash(id_: str, state: _Request, leader: Leader) -> None:
        hasher = leader.hasher(id_)
        if hasher is not None and len(state.tokens) - hasher.num_tokens >= hasher.block_size:
            hasher.extend(state.tokens[hasher.num_tokens :])

    def _update(self, data: Any, is_new: bool) -> None:
        """What a step's data say of a request: its new tokens and blocks, and how far it will be computed."""
        id_, leader = str(data.request_id), self.leader
        state = self._requests.get(id_)
        if state is None or isinstance(self._shape, str):
            return
        if is_new:
            state.reported = True
            state.tokens, state.table = list(data.new_tokens), []
        elif not state.reported:
            # What is said to be new is counted from blocks that it had before it began again.
            state.wanted = 0
            return
        else:
            state.tokens += data.new_tokens
        priorities = getattr(data, "priorities", None)
        if priorities is not None or self._min_priority > _DEFAULT_PRIORITY:
            given = priorities or [_DEFAULT_PRIORITY] * len(data.new_block_ids)
            low = [i for i, priority in enumerate(given) if priority < self._min_priority]
            if low and state.wanted is None:
                state.wanted = state.num_blocks + low[0]
        new = list(data.new_block_ids)
        state.num_blocks += len(new)
        if state.whole and new:
            if NO_PAGE in new:
                state.whole = False
                del new[new.index(NO_PAGE) :]
            state.table += new
            if leader is not None and state.followed:
                (leader.set_table if is_new else leader.extend_table)(id_, state.table if is_new else new)
        # Draft tokens may be rejected: only tokens that are known count.
        end = min(data.computed_position + data.num_scheduled_tokens, len(state.tokens))
        state.full = max(state.full, end // self._shape.block_size)

    def _forget(self, id_: str) -> bool:
        """Whether copies may still use the request's device blocks."""
        state = self._requests.pop(id_)
        self._release_promise(state)
        loads = self._loads.pop(id_, 0)
        leader = self.leader
        if leader is None or not state.followed:
            return bool(loads)
        hasher = leader.hasher(id_)
        # Every block was offered in the step that filled it: nothing is ordered that would come too late.
        outcome = leader.finish(id_, 0, state.table)
        leader.ended(id_, hasher, len(state.tokens) - state.prompt_tokens)
        return bool(outcome.hold) or loads > 0

    def _release_promise(self, state: _Request) -> None:
        if state.promise is not None and self.leader is not None:
            with self.leader.lock:
                self.leader.pool.release(state.promise.slots)
            self._promised -= 1
        state.promise = None

    def _lock(self, leader: Leader) -> None:
        """No other thread (administration) changes the index while promises are open."""
        if self._locked is None:
            leader.lock.acquire()
            self._locked = leader

    def _unlock_if_kept(self) -> None:
        """All promises are orders: the engine may ask for several requests before it allocates the first."""
        if not self._promised:
            self._unlock()

    def _unlock(self) -> None:
        leader, self._locked = self._locked, None
        if leader is not None:
            leader.lock.release()

    # ---- the ranks ----

    def _poll(self) -> None:
        """Take in what the ranks have reported, once a step."""
        if self._polled or self._receiver is None:
            return
        self._polled = True
        reports: list[WorkerReport] = []
        for message in self._receiver.receive():
            if isinstance(message, Hello):
                self._greet(message)
            elif isinstance(message, Lost):
                if message.rank >= 0:
                    self.turn_off(f"rank {message.rank} is gone")
            elif message.refused is not None:
                self.turn_off(f"rank {message.rank}: {message.refused}")
            else:
                reports.append(message)
        if self.leader is not None:
            for outcome in self.leader.receive(reports):
                if (loaded := outcome.loaded) is not None and self._loads[loaded.request_id] > 0:
                    self._loads[loaded.request_id] -= 1
        self._loads = +self._loads

    def _greet(self, hello: Hello) -> None:
        shape = self._shape
        if isinstance(shape, str) or self.refused is not None:
            return
        if hello.block_size != shape.block_size:
            self.turn_off(
                f"rank {hello.rank} has blocks of {hello.block_size} tokens, not {shape.block_size}"
            )
        elif self.leader is None:
            self._record_bytes = hello.record_bytes
            self.leader, self.server = self._make_leader(hello.record_bytes)
        elif hello.record_bytes != self._record_bytes:
            self.turn_off(
                f"rank {hello.rank} has {hello.record_bytes} bytes a block, not {self._record_bytes}"
            )


def make_scheduler_side(llm_args: Any, config: Config) -> SchedulerSide:
    """For this engine; where nothing can be cached, the log says why."""
    shape = geometry(llm_args) if config.enabled else "no cache size is configured (DYN_KVBM_CPU_CACHE_GB)"

    def make_leader(record_bytes: int) -> tuple[Leader, Server | None]:
        assert isinstance(shape, Geometry)
        records = [record_bytes] * shape.ranks
        block_bytes, disk_block_bytes = host_record_bytes(records), disk_record_bytes(records)
        observer = Observer(config.observe, shape.block_size, engine="tensorrt-llm", block_bytes=block_bytes)
        leader = Leader(
            config,
            namespace=engine_namespace(llm_args, record_bytes),
            block_size=shape.block_size,
            num_slots=num_host_slots(config, records),
            ranks=shape.ranks,
            disk_slots=num_disk_slots(config, records),
            disk_record_bytes=disk_block_bytes,
            observer=observer,
        )
        if not config.observe.metrics:
            return leader, None
        admin = Admin(leader, observer, block_bytes=block_bytes, disk_block_bytes=disk_block_bytes)
        return leader, Server(admin, config.observe)

    return SchedulerSide(config, shape, make_leader)


def _runs(table: Sequence[int], first: int) -> Iterator[tuple[int, int]]:
    """Where from `first` on a table has pages: first block and the one after the last."""
    start = None
    for block in range(first, len(table)):
        if table[block] == NO_PAGE:
            if start is not None:
                yield start, block
            start = None
        elif start is None:
            start = block
    if start is not None:
        yield start, len(table)
