"""The worker: executes operations on one rank's shard and reports what happened.

Where the device copies by itself (CUDA), the engine's forward thread orders the copies: a thread of ours
would have to take the GIL from it a dozen times for each. Elsewhere threads of ours copy, and check what they
load. Disks are read and written by a process of their own.

`submit`, `start_in_step`, `cancel` and `poll` are called from the forward thread and never wait for a copy.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np

from kvbm.errors import LostLoadError
from kvbm.logic.operations import BlockIds, Completion, Direction, Failure, Operation
from kvbm.storage.client import StorageClient
from kvbm.storage.messages import Batch, Status
from kvbm.storage.store import Found
from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CopyEngine, InStepLoad, Transfer
from kvbm.transfer.records import HostRecords

logger = logging.getLogger(__name__)

_IDLE_STEP_S = 2e-4
_NONE_FAILED = np.empty(0, np.int32)
_FAILURES = {
    Status.DONE: Failure.NONE,
    Status.TIMEOUT: Failure.TIMEOUT,
    Status.UNAVAILABLE: Failure.UNAVAILABLE,
    Status.ERROR: Failure.ERROR,
    Status.DAMAGED: Failure.CORRUPT,
}


class _CertainLoad(InStepLoad):
    """A load that the engine computes on already, so that it can't become a miss any more.

    vLLM's asynchronous scheduler has planned the next step by the time it would hear of a failure, and would
    give out its token. So whatever goes wrong, the bytes are copied before the forward pass goes on, with the
    engine waiting; LostLoadError where even that is impossible, as after the loss of the device.
    """

    def __init__(self, engine: CopyEngine, operation: Operation) -> None:
        self._engine = engine
        self._operation = operation
        self._load: InStepLoad | None = None
        if (operation.host_slots < 0).any():
            raise LostLoadError("KVBM: a block that the engine was promised is not in the host tier.")
        try:
            self._load = engine.start_in_step(operation.device_blocks, operation.host_slots)
        except Exception:
            self._copy_now()

    def before_layer(self, name: str) -> None:
        if self._load is not None:
            try:
                self._load.before_layer(name)
            except Exception:
                self._copy_now()

    def before_all(self) -> None:
        if self._load is not None:
            try:
                self._load.before_all()
            except Exception:
                self._copy_now()

    @property
    def is_over(self) -> bool:
        return self._load is None or self._load.is_over

    def _copy_now(self) -> None:
        logger.exception("KVBM: a load inside a step failed and is made again; the engine waits for it")
        self._load = None
        operation, engine = self._operation, self._engine
        try:
            engine.onboard(operation.device_blocks, operation.host_slots, engine.fence())
        except Exception as error:
            raise LostLoadError(f"KVBM: a load that the engine counts on can't be made: {error}") from error


class _Task:
    __slots__ = ("after", "deadline", "failed", "operation", "reason", "running", "timed_out", "transfer")

    def __init__(self, operation: Operation, after: object, deadline: float) -> None:
        self.operation = operation
        self.after = after
        self.deadline = deadline
        self.running = False
        self.reason = Failure.NONE  # set from outside: cancelled or timed out
        self.timed_out = False  # reported as still running
        self.transfer: Transfer | None = None  # by the device itself
        self.failed: BlockIds = _NONE_FAILED  # of it, already known


class Worker:
    """Copies between the engine's blocks and `records`, which are checked when they are loaded.

    threads: how many operations run at once in each direction, where threads copy: a load, which a request
    waits for, never queues behind offloads; 0 where no such operation will be asked for. disk: the I/O
    process for what lies on disk, if anything does. stores: False where another rank shares its records with
    this one, and writes them, and those on disk, for both. clock: seconds, monotonic.
    """

    def __init__(
        self,
        records: HostRecords,
        *,
        threads: int = 1,
        disk: StorageClient | None = None,
        stores: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._records = records
        self._disk = disk
        self._stores = stores
        self._found: list[Found] = []
        self._clock = clock
        self._queues: dict[Direction, queue.SimpleQueue[_Task | None]] = {
            direction: queue.SimpleQueue() for direction in (Direction.OFFLOAD, Direction.ONBOARD)
        }
        self._device_engine = records.device_engine
        self._transfers: list[_Task] = []  # under way on the device; of the forward thread alone
        self._lock = threading.Lock()
        self._tasks: dict[int, _Task] = {}
        self._completions: list[Completion] = []
        self._closed = False
        self._threads = [
            threading.Thread(
                target=self._run, args=(tasks,), name=f"kvbm-{direction.name.lower()}-{i}", daemon=True
            )
            for direction, tasks in self._queues.items()
            for i in range(threads if self._device_engine is None else 0)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, operations: Iterable[Operation]) -> None:
        """Start operations, behind all that the calling thread has given the device to do.

        The leader bounds how many are under way.
        """
        copies = []
        for operation in operations:
            if not self._stores and operation.direction != Direction.ONBOARD:
                # Not registered before the rank that stores has reported it, too.
                with self._lock:
                    self._completions.append(Completion(operation.id, _NONE_FAILED))
            elif operation.direction in self._queues:
                copies.append(operation)
            else:  # between tiers below the device, which has no part in it
                self._start_disk(self._add(operation, None))
        after = self._records.fence() if copies else None
        for operation in copies:
            task = self._add(operation, after)
            if self._device_engine is None:
                self._queues[operation.direction].put(task)
                continue
            try:
                self._start(task, self._device_engine)
            except Exception:
                logger.exception("KVBM: a copy could not be started")
                with self._lock:
                    self._finish(task, operation.positions, Failure.ERROR)

    def start_in_step(self, operations: Iterable[Operation]) -> list[InStepLoad]:
        """Start loads that the forward pass about to be launched is ordered behind.

        The one place where an engine may have to wait, or to be stopped by LostLoadError: see _CertainLoad.
        """
        if self._device_engine is None:
            raise LostLoadError("KVBM: this worker has no loads inside a step.")
        loads: list[InStepLoad] = []
        for operation in operations:
            load = _CertainLoad(self._device_engine, operation)
            task = self._add(operation, None)
            task.transfer, task.running = load, True
            self._transfers.append(task)
            loads.append(load)
        return loads

    def caller(self) -> object:
        """See `CopyEngine.caller`; None without loads inside a step."""
        return self._device_engine.caller() if self._device_engine is not None else None

    @property
    def arena(self) -> HostArena:
        return self._records.arena

    @property
    def loads_in_step(self) -> bool:
        """Whether `start_in_step` works."""
        return self._device_engine is not None

    @property
    def ready_slots(self) -> int:
        return self._records.ready_slots

    def forget_on_disk(self, slots: BlockIds, everything: bool = False) -> None:
        """The records in these disk slots, or all, must not be found again, also after a restart."""
        if self._disk is not None and everything:
            self._disk.clear()
        if self._disk is not None and len(slots):
            self._disk.discard(slots)

    def take_found(self) -> list[Found]:
        """What an earlier run left on disk: all of it, once, when `disk_ready`."""
        found, self._found = self._found, []
        return found

    @property
    def disk_ready(self) -> bool:
        return self._disk is not None and self._disk.ready

    @property
    def disk_refused(self) -> str | None:
        """Why the disk tier can't be used."""
        return self._disk.refused if self._disk is not None else None

    def cancel(self, operation_ids: Iterable[int]) -> None:
        """The device blocks of these are about to be overwritten: what isn't copied by now has failed."""
        with self._lock:
            for id_ in operation_ids:
                task = self._tasks.get(id_)
                if task is not None:
                    task.reason = max(task.reason, Failure.CANCELLED)

    def let_others_run(self) -> None:
        """For a step that computes nothing, of which an engine makes thousands while it waits for a load.

        They would keep the GIL from our threads, which need it for every block, and the core from the I/O
        process: two requests were answered in 4.7 s instead of 0.8.
        """
        if self._tasks and len(self._tasks) > len(self._transfers):
            time.sleep(_IDLE_STEP_S)

    def poll(self) -> list[Completion]:
        """Completions since the last call, each operation's final one exactly once."""
        if self._disk is not None:
            self._poll_disk(self._disk)
        elif self.idle:  # as in most steps
            return []
        now = self._clock()
        over = [task for task in self._transfers if self._is_over(task)]
        if over:
            self._transfers = [task for task in self._transfers if task not in over]
        with self._lock:
            for task in over:
                self._finish_running(task, task.failed, Failure.ERROR if len(task.failed) else Failure.NONE)
            for task in self._tasks.values():
                if task.deadline <= now and not task.timed_out:
                    self._time_out(task)
            completions, self._completions = self._completions, []
        return completions

    @property
    def idle(self) -> bool:
        """Whether nothing is queued, running or waiting to be polled."""
        with self._lock:
            return not self._tasks and not self._completions

    def close(self) -> bool:
        """Stop the threads; what is still queued is not executed. Waits for what is under way, but not long.

        False where that goes on: its memory is left as it is.
        """
        self._closed = True
        if self._disk is not None:
            self._disk.close()
        for tasks in self._queues.values():
            for _ in self._threads:
                tasks.put(None)
        for thread in self._threads:
            thread.join(timeout=1.0)
        end = time.monotonic() + 1.0
        while (busy := not all(map(self._is_over, self._transfers))) and time.monotonic() < end:
            time.sleep(0.001)
        if busy or any(thread.is_alive() for thread in self._threads):
            return False
        self._records.close()
        return True

    # ---- copies by the device ----

    def _add(self, operation: Operation, after: object) -> _Task:
        task = _Task(operation, after, self._clock() + operation.timeout_s)
        with self._lock:
            self._tasks[operation.id] = task
        return task

    def _start(self, task: _Task, engine: CopyEngine) -> None:
        blocks, slots = task.operation.device_blocks, task.operation.host_slots
        if task.operation.direction == Direction.OFFLOAD:
            task.transfer = engine.start_offload(blocks, slots, task.after)
        else:
            there = slots >= 0
            task.failed = np.flatnonzero(~there).astype(np.int32)
            if there.any():
                task.transfer = engine.start_onboard(blocks[there], slots[there], task.after)
        task.running = True
        self._transfers.append(task)

    @staticmethod
    def _is_over(task: _Task) -> bool:
        try:
            return task.transfer is None or task.transfer.is_over
        except Exception:  # the device is lost
            logger.exception("KVBM: a copy has failed")
            task.reason = Failure.ERROR
            return True

    # ---- disks, by the I/O process ----

    def _start_disk(self, task: _Task) -> None:
        operation = task.operation
        task.running = True
        if self._disk is None:
            with self._lock:
                self._finish(task, operation.positions, Failure.UNAVAILABLE)
            return
        write = operation.direction == Direction.WRITE
        checksums = self._records.checksums(operation.host_slots) if write else None
        self._disk.submit(
            Batch(
                operation.id,
                write,
                operation.host_slots.tobytes(),
                operation.disk_slots.tobytes(),
                operation.hashes.tobytes(),
                bytes(len(operation.host_slots)),
                checksums.tobytes() if checksums is not None else b"",
                operation.timeout_s,
            )
        )

    def _poll_disk(self, disk: StorageClient) -> None:
        replies = disk.poll()
        self._found += replies.found
        for result in replies.results:
            task = self._tasks[result.id]
            if task.operation.direction == Direction.READ:
                self._records.adopt(task.operation.host_slots, result.checksums)
            with self._lock:
                self._finish_running(task, result.failed, _FAILURES[result.status], result.seconds)

    # ---- copies by threads ----

    def _run(self, tasks: "queue.SimpleQueue[_Task | None]") -> None:
        while True:
            task = tasks.get()
            if task is None or self._closed:
                return
            with self._lock:
                if task.reason:
                    self._finish(task, task.operation.positions, task.reason)
                    continue
                task.running = True
            try:
                failed, reason = self._execute(task.operation, task.after)
            except Exception:
                failed, reason = task.operation.positions, Failure.ERROR
            with self._lock:
                self._finish_running(task, failed, reason)

    def _execute(self, operation: Operation, after: object) -> tuple[BlockIds, Failure]:
        blocks, slots = operation.device_blocks, operation.host_slots
        if operation.direction == Direction.OFFLOAD:
            self._records.offload(blocks, slots, after)
            return _NONE_FAILED, Failure.NONE
        arrived = slots >= 0
        reason = Failure.NONE if arrived.all() else Failure.ERROR
        intact = self._records.onboard(blocks[arrived], slots[arrived], after)
        if not intact.all():
            reason = Failure.CORRUPT
        arrived[arrived] = intact
        return np.flatnonzero(~arrived).astype(np.int32), reason

    # ---- under the lock ----

    def _finish_running(self, task: _Task, failed: BlockIds, reason: Failure, seconds: float = 0.0) -> None:
        if task.reason:
            failed = task.operation.positions
        self._finish(task, failed, max(reason, task.reason), seconds)

    def _finish(self, task: _Task, failed: BlockIds, reason: Failure, seconds: float = 0.0) -> None:
        del self._tasks[task.operation.id]
        self._completions.append(Completion(task.operation.id, failed, reason, seconds))

    def _time_out(self, task: _Task) -> None:
        task.reason = max(task.reason, Failure.TIMEOUT)
        task.timed_out = True
        if task.running or task.operation.direction == Direction.ONBOARD:
            failed = task.operation.positions
            self._completions.append(Completion(task.operation.id, failed, Failure.TIMEOUT, quiesced=False))
