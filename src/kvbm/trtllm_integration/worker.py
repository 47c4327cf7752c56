"""The connector on a rank of TensorRT-LLM: orders to the copy engines, completions to engine and leader."""

import contextlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from kvbm.config import Config
from kvbm.errors import LostLoadError
from kvbm.logic.hashing import namespace_digest
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.runtime.channel import Hello, ReportSender
from kvbm.runtime.disk import require_disk_slots, require_host_slots, start_storage
from kvbm.runtime.fingerprint import device_fingerprint, fingerprint
from kvbm.runtime.messages import WorkerReport
from kvbm.runtime.rank import FoundRecords, make_worker, worker_or_reason
from kvbm.runtime.worker import Worker
from kvbm.storage.client import StorageClient
from kvbm.transfer.arena import HostArena, ensure_fits, slot_bytes
from kvbm.trtllm_integration.identity import Geometry, engine_namespace, geometry
from kvbm.trtllm_integration.scheduler import Metadata

logger = logging.getLogger(__name__)

_FOREVER = float("inf")


class WorkerSide:
    """Every method is called by TensorRT-LLM's executor, on one thread, and returns at once."""

    def __init__(self, llm_args: Any, config: Config, rank: int) -> None:
        self._llm_args = llm_args
        self._config = config
        self._rank = rank
        self._shape = geometry(llm_args) if config.enabled else "KVBM is not configured"
        self._refused: str | None = None
        self._record_bytes = 0
        self._num_slots = 0
        self._worker: Worker | None = None
        self._sender: ReportSender | None = None
        self._unreachable = False
        self._offloads: list[Operation] = []  # that wait for the step's forward pass
        self._under_way: dict[int, Operation] = {}  # copies that use device blocks
        self._ordered: set[str] = set()  # requests whose loads have all been ordered
        self._loads: Counter[str] = Counter()  # those under way
        self._started: dict[str, int] = {}  # requests that the engine has parked for their loads
        self._saving: dict[int, set[int]] = {}  # ended requests: copies that may use their device blocks
        self._completions: list[Completion] = []  # for the leader
        self._given_up: list[Completion] = []
        self._found = FoundRecords()
        self._announced: tuple[object, ...] = ()
        self._computes = False

    # ---- start ----

    def register(self, kv_caches: Mapping[str, Any], num_blocks: int, block_size: int) -> None:
        """Take the engine's KV tensors, blocks first, and memory for this rank's share of the host tier."""
        shape = self._shape
        if isinstance(shape, str):
            self._refused = shape
            return
        if block_size != shape.block_size:
            self._refused = f"the KV cache has blocks of {block_size} tokens, not {shape.block_size}"
            return
        self._record_bytes = sum(tensor.nbytes for tensor in kv_caches.values()) // num_blocks
        self._num_slots = require_host_slots(self._config, [self._record_bytes] * shape.ranks)
        ensure_fits(self._num_slots * slot_bytes(self._record_bytes) * shape.ranks)
        worker = worker_or_reason(
            lambda: make_worker(
                self._config,
                kv_caches,
                num_blocks,
                self._record_bytes,
                num_slots=self._num_slots,
                start_disk=lambda arena: self._start_disk(arena, shape, kv_caches),
            )
        )
        if isinstance(worker, str):
            self._refused = worker
        else:
            self._worker = worker

    def turn_off(self, reason: str) -> None:
        """The leader hears of it and promises nothing any more."""
        self._refused = reason

    def _start_disk(self, arena: HostArena, shape: Geometry, kv_caches: Mapping[str, Any]) -> StorageClient:
        slots = require_disk_slots(self._config, [self._record_bytes] * shape.ranks)
        # A disk outlives the engine: whatever may change the bytes counts.
        namespace = namespace_digest(
            {
                "namespace": engine_namespace(self._llm_args, self._record_bytes).hex(),
                "weights": fingerprint(str(self._llm_args.model), getattr(self._llm_args, "revision", None)),
                "device": device_fingerprint(next(iter(kv_caches.values())).device),
                "tensors": [
                    [name, str(tensor.dtype), list(tensor.shape[1:])] for name, tensor in kv_caches.items()
                ],
            }
        )
        return start_storage(
            self._config, arena, num_slots=slots, namespace=namespace, rank=self._rank, ranks=shape.ranks
        )

    # ---- a step ----

    def begin(self, metadata: Metadata, stream: Any) -> None:
        """Before the step's forward pass: give up what would read too late, and start loads."""
        # The forward pass that was to compute these blocks did not take place.
        self._completions += [
            Completion(operation.id, operation.positions, Failure.CANCELLED) for operation in self._offloads
        ]
        self._offloads = []
        self._connect(metadata.address)
        orders = metadata.orders
        loads = [operation for operation in orders.operations if operation.direction == Direction.ONBOARD]
        self._loads.update(operation.request_id for operation in loads)
        if self._worker is None:
            return
        self._worker.cancel(orders.cancel)
        if orders.forget or orders.forget_all:
            self._worker.forget_on_disk(np.array(orders.forget, np.int32), orders.forget_all)
        below = [
            operation
            for operation in orders.operations
            if operation.direction in (Direction.READ, Direction.WRITE)
        ]
        self._offloads = [
            operation for operation in orders.operations if operation.direction == Direction.OFFLOAD
        ]
        # The engine counts on a load, however long it takes: there is no deadline after which it has failed.
        self._submit([replace(load, timeout_s=_FOREVER) for load in loads], stream)
        self._ordered.update(metadata.loading)
        self._worker.submit(below)

    def start_offloads(self, stream: Any) -> None:
        """After the forward pass that computes the blocks was given to the device."""
        operations, self._offloads = self._offloads, []
        self._computes = True
        self._submit(operations, stream)

    def finished(self, saving: Sequence[int], loading: Sequence[int]) -> tuple[list[int], list[int]]:
        """Takes the ids of ended requests, and of those parked for a load; returns those that are done.

        LostLoadError where a parked request can't get its blocks.
        """
        for id_ in loading:
            self._started[str(id_)] = id_
        self._saving.update((id_, set(self._under_way)) for id_ in saving)
        for request_id in self._started:
            if request_id not in self._ordered:
                raise LostLoadError(f"KVBM: request {request_id} waits for a load that was never ordered.")
        self._poll()
        saved = [id_ for id_, operations in self._saving.items() if not operations]
        loaded = [request_id for request_id in self._started if not self._loads[request_id]]
        for id_ in saved:
            del self._saving[id_]
        ids = [self._started.pop(request_id) for request_id in loaded]
        self._ordered.difference_update(loaded)
        self._loads = +self._loads
        with contextlib.suppress(OSError):
            self._report()
        return saved, ids

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
        if self._worker is not None:
            self._worker.close()

    # ---- copies ----

    def _submit(self, operations: list[Operation], stream: Any) -> None:
        if not operations or self._worker is None:
            return
        self._under_way.update((operation.id, operation) for operation in operations)
        try:
            with _on(stream):
                self._worker.submit(operations)
        except Exception:  # a fence of a broken device
            logger.exception("KVBM: %d operations could not be started", len(operations))
            self._given_up += [
                Completion(operation.id, operation.positions, Failure.ERROR) for operation in operations
            ]

    def _poll(self) -> None:
        if self._worker is None:
            return
        if not self._computes:
            self._worker.let_others_run()
        self._computes = False
        completions, self._given_up = self._given_up + self._worker.poll(), []
        if self._worker.disk_ready:
            self._found.add(self._worker.take_found())
        self._completions += completions
        for completion in completions:
            if not completion.quiesced:
                continue
            operation = self._under_way.pop(completion.operation_id, None)
            for operations in self._saving.values():
                operations.discard(completion.operation_id)
            if operation is None or operation.direction != Direction.ONBOARD:
                continue
            if len(completion.failed):
                # The engine can't be told to compute them again, and would go on with what is there.
                raise LostLoadError(
                    f"KVBM: {len(completion.failed)} of {len(operation.host_slots)} blocks that request "
                    f"{operation.request_id} counts on can't be loaded ({completion.reason.name.lower()})."
                )
            self._loads[operation.request_id] -= 1

    # ---- to the leader ----

    def _connect(self, address: str) -> None:
        if self._sender is not None or self._unreachable or not address:
            return
        try:
            self._sender = ReportSender(address)
            if self._refused is None and isinstance(self._shape, Geometry):
                self._sender.send(Hello(self._rank, self._record_bytes, self._shape.block_size))
            self._report()
        except OSError as error:
            self._unreachable = True
            logger.error(
                "KVBM: rank %d can't reach the leader, so that nothing is cached: %s. All ranks must run on "
                "one machine, in one network namespace and as one user.",
                self._rank,
                error,
            )

    def _report(self) -> None:
        if self._sender is None or self._unreachable:
            return
        worker = self._worker
        state = (
            worker.ready_slots if worker is not None else 0,
            worker.disk_refused if worker is not None else None,
            self._refused,
        )
        try:
            if state == self._announced and not self._completions and not self._found.wants_report:
                self._sender.flush()
                return
            self._announced = state
            completions, self._completions = self._completions, []
            found, found_all = self._found.next_piece()
            self._sender.send(
                WorkerReport(
                    self._rank,
                    self._num_slots,
                    state[0],
                    refused=self._refused,
                    completions=completions,
                    found=found,
                    found_all=found_all,
                    foreign_records=self._found.foreign,
                    disk_refused=state[1],
                )
            )
        except OSError:
            self._unreachable = True
            self._sender.close()  # the leader takes this rank for lost
            raise


def _on(stream: Any) -> AbstractContextManager[Any]:
    """Our copies are ordered behind what the engine has given to `stream`."""
    if type(stream).__module__.partition(".")[0] != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.cuda.stream(stream)
