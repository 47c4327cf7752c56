"""The connector on a vLLM worker: orders to the copy threads, their completions back to vLLM."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvbm.config import Config
from kvbm.errors import LostLoadError
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.runtime.disk import start_storage
from kvbm.runtime.exchange import Exchange
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.runtime.rank import FoundRecords, make_worker, worker_or_reason
from kvbm.runtime.worker import Worker
from kvbm.storage.client import StorageClient
from kvbm.transfer.arena import ArenaHandle, HostArena, ensure_fits
from kvbm.transfer.copy import InStepLoad
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.exchange import find_exchange
from kvbm.vllm_integration.identity import Geometry, check_tensors, geometry
from kvbm.vllm_integration.scheduler import disk_slots_of, slots_of
from kvbm.vllm_integration.split import find_split
from kvbm.vllm_integration.weights import HeadSplit, record_namespace

logger = logging.getLogger(__name__)

# In a step that computes nothing, maybe the first after a request: the thread that sends its last token needs
# the GIL, which ordering the offload of what it computed would keep from it.
_LET_TOKEN_GO_S = 1e-4


@dataclass(slots=True)
class Snapshot:
    """What vLLM is told at the end of a step, taken at one moment."""

    finished_recving: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)
    # Loads whose copy may still be running: all their blocks are lost to the request.
    failed_recving: set[str] = field(default_factory=set)
    hung_blocks: set[int] = field(default_factory=set)


class WorkerSide:
    """Every method is called by vLLM's model runner, on its thread, and returns at once."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: Config) -> None:
        self._config = config
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._rank: int = vllm_config.parallel_config.rank
        self._shape = geometry(vllm_config, kv_cache_config) if config.enabled else "KVBM is not configured"
        # vLLM can't tell a block of one group from one of another: failed loads are told by request.
        self._by_block = not isinstance(self._shape, str) and self._shape.groups.single
        self._worker: Worker | None = None
        self._refused: str | None = None
        self._announced_slots = -1
        self._orders = StepOrders()
        self._loads: dict[int, Operation] = {}  # of requests that wait for them
        self._in_step: list[InStepLoad] = []  # that the forward pass under way reads
        self._early: dict[int, InStepLoad] = {}  # that the next one reads, by operation
        self._caller: object = None  # of the last step
        # vLLM may zero blocks that it has given out, when it prepares the step.
        self._blocks_are_kept = not getattr(kv_cache_config, "needs_kv_cache_zeroing", True)
        self._unannounced: set[str] = set()  # layers whose forward pass has not called `before_layer` yet
        self._completions: list[Completion] = []
        self._lost: list[Completion] = []
        self._num_slots = 0
        self._timed = False
        self._computes = True
        self._found = FoundRecords()
        self._announced_refusal: str | None = None

    def register(self, kv_caches: Mapping[str, Any]) -> None:
        """Take the engine's KV tensors and the memory of this rank's share of the host tier."""
        if isinstance(self._shape, str):
            self._refused = self._shape
            return
        if not self._shape.shared:
            self._register(kv_caches, self._shape, None)
            return
        shared: ArenaHandle | None = None
        if self._rank == 0:
            try:
                shared = self._register(kv_caches, self._shape, None)
            finally:
                compat.from_first_rank(shared)  # the others wait for it, whatever happens here
        elif (shared := compat.from_first_rank(None)) is not None:
            self._register(kv_caches, self._shape, shared)
        else:
            self._refused = "rank 0, whose host memory this rank should use, has none"

    def _register(
        self, kv_caches: Mapping[str, Any], shape: Geometry, shared: ArenaHandle | None
    ) -> ArenaHandle | None:
        """shared: the host tier of the rank that made it. Returns this rank's, or None if it has none."""
        slots = slots_of(shape, self._config)
        if shared is None:
            ensure_fits(shape.host_bytes(slots))
        worker = worker_or_reason(lambda: self._make_worker(kv_caches, shape, slots, shared))
        if isinstance(worker, str):
            self._refused = worker
            return None
        self._worker = worker
        self._num_slots = slots
        self._unannounced = set(kv_caches)
        return worker.arena.handle

    # ---- a step ----

    def start_early(self, operation: Operation) -> None:
        """Start a load inside the step that is being planned, where that is done here, too.

        From there to `start_loads` vLLM takes 5 to 7 ms to prepare the step of a prompt of 4k to 32k tokens
        (H100). Where that can't be, or fails, the step starts it.
        """
        worker = self._worker
        if worker is not None and self._blocks_are_kept and worker.caller() == self._caller:
            with contextlib.suppress(LostLoadError):
                [self._early[operation.id]] = worker.start_in_step([operation])

    def begin(self, orders: StepOrders) -> None:
        """Before the step's blocks are overwritten: store what earlier steps computed.

        The copies come behind all that the device was given so far, also the copy of the sampled tokens: that
        would wait for them, and a request for its token. What the step overwrites is given up.
        """
        # A step that failed half-way may have left some behind: the leader waits for their completion.
        early, self._early = self._early, {}
        self.start_loads()
        self.end_loads()
        if early:
            planned = {operation.id for operation in orders.operations}
            self._early = {id_: early.pop(id_) for id_ in planned & early.keys()}
            for load in early.values():  # of a step that never came
                load.before_all()
        self._caller = self._worker.caller() if self._worker is not None else None
        self._orders = orders
        self._computes = orders.tokens > 0
        self._timed = orders.timed and self._rank == 0
        if not self._computes and any(op.direction == Direction.OFFLOAD for op in orders.operations):
            time.sleep(_LET_TOKEN_GO_S)
        self._submit(Direction.OFFLOAD)
        if self._worker is not None:
            if orders.cancel:  # may name what was ordered and given up in one step
                self._worker.cancel(orders.cancel)
            if orders.forget or orders.forget_all:
                self._worker.forget_on_disk(np.array(orders.forget, np.int32), orders.forget_all)

    @property
    def has_orders(self) -> bool:
        """Whether `start_loads` has anything to do."""
        return bool(self._orders.operations)

    def start_loads(self, *, by_layer: bool = False) -> None:
        """by_layer: the forward pass that follows calls `before_layer`."""
        if not self.has_orders:
            return
        in_step = self._take(lambda operation: operation.in_step)
        if in_step:
            self._start_in_step(in_step, by_layer)
        for direction in (Direction.ONBOARD, Direction.READ, Direction.WRITE):
            self._submit(direction)

    def before_layer(self, name: str) -> None:
        if self._unannounced:
            self._unannounced.discard(name)
        for load in self._in_step:
            load.before_layer(name)

    def end_loads(self) -> None:
        """After the forward pass: whatever comes next may write to the blocks that it read."""
        for load in self._in_step:
            load.before_all()
        self._in_step.clear()

    def _take(self, wanted: Callable[[Operation], bool]) -> list[Operation]:
        operations = self._orders.operations
        if not operations:
            return []
        taken = [operation for operation in operations if wanted(operation)]
        self._orders.operations = [operation for operation in operations if not wanted(operation)]
        return taken

    def _start_in_step(self, operations: list[Operation], by_layer: bool) -> None:
        if self._worker is None:
            raise LostLoadError("KVBM: a load inside a step was ordered where nothing is cached.")
        late = [operation for operation in operations if operation.id not in self._early]
        self._in_step = [*self._early.values(), *self._worker.start_in_step(late)]
        self._early.clear()
        if not by_layer or self._unannounced:  # some attention layers don't tell the connector
            for load in self._in_step:
                load.before_all()

    def _submit(self, direction: Direction) -> None:
        chosen = self._take(lambda operation: operation.direction == direction)
        if not chosen:
            return
        if direction == Direction.ONBOARD:
            self._loads.update((operation.id, operation) for operation in chosen)
        if self._worker is None:
            return
        try:
            self._worker.submit(chosen)
        except Exception:  # a fence of a broken device: the engine must hear of loads that will not happen
            logger.exception("KVBM: %d operations could not be started", len(chosen))
            self._lost += [
                Completion(operation.id, operation.positions, Failure.ERROR) for operation in chosen
            ]

    def snapshot(self) -> Snapshot:
        """Finished and failed loads since the last call: each load is finished exactly once."""
        snapshot = Snapshot()
        if self._worker is None:
            return snapshot
        if not self._computes:
            self._worker.let_others_run()
        completions, self._lost = self._lost + self._worker.poll(), []
        if self._worker.disk_ready:
            self._found.add(self._worker.take_found())
        for completion in completions:
            self._completions.append(completion)
            load = self._loads.pop(completion.operation_id, None)
            if load is None:
                continue
            snapshot.finished_recving.add(load.request_id)
            if not self._by_block:
                if len(completion.failed):
                    snapshot.failed_recving.add(load.request_id)
            elif completion.quiesced:
                snapshot.failed_blocks.update(load.device_blocks[completion.failed].tolist())
            else:
                snapshot.failed_recving.add(load.request_id)
                snapshot.hung_blocks.update(load.device_blocks.tolist())
        return snapshot

    def report(self) -> WorkerReport | None:
        """Completions for the leader, once the `snapshot` of this step was taken."""
        worker = self._worker
        ready = worker.ready_slots if worker is not None else 0
        disk_refused = worker.disk_refused if worker is not None else None
        if (
            ready == self._announced_slots
            and not self._completions
            and not self._timed
            and not self._found.wants_report
            and disk_refused == self._announced_refusal
        ):
            return None
        self._announced_slots, self._announced_refusal = ready, disk_refused
        completions, self._completions = self._completions, []
        found, found_all = self._found.next_piece()
        return WorkerReport(
            self._rank,
            self._num_slots,
            ready,
            loads_in_step=worker is not None and worker.loads_in_step,
            refused=self._refused,
            completions=completions,
            timed=self._timed,
            found=found,
            found_all=found_all,
            foreign_records=self._found.foreign,
            disk_refused=disk_refused,
        )

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()

    def _make_worker(
        self, kv_caches: Mapping[str, Any], shape: Geometry, slots: int, shared: ArenaHandle | None
    ) -> Worker:
        config = self._config
        check_tensors(self._kv_cache_config, kv_caches)

        heads: HeadSplit | None = None
        exchange: Exchange | None = None
        if config.has_disk and config.disk.exchange:
            found = find_exchange(self._vllm_config, self._kv_cache_config, kv_caches, shape, self._rank)
            if isinstance(found, str):
                logger.warning("KVBM: records on disk are not exchanged with other engines: %s", found)
            else:
                exchange = found

        own = (self._vllm_config, self._kv_cache_config, shape, kv_caches)
        if config.has_disk and exchange is None:
            split = find_split(*own)
            if isinstance(split, str):
                logger.info("KVBM: what other numbers of ranks store on disk is not taken over: %s", split)
            else:
                heads = split

        def start_disk(arena: HostArena) -> StorageClient:
            return start_storage(
                config,
                arena,
                num_slots=disk_slots_of(shape, config),
                namespace=exchange.namespace if exchange else record_namespace(*own, heads),
                rank=self._rank,
                ranks=len(shape.records),
                replica=compat.replica_of(self._vllm_config.parallel_config),
                split=heads.split if heads else None,
            )

        return make_worker(
            config,
            kv_caches,
            shape.num_device_blocks,
            shape.record_bytes,
            num_slots=slots,
            start_disk=start_disk,
            views=exchange.views if exchange else None,
            shared=shared,
        )
