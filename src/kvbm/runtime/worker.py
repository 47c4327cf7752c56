"""The worker: executes operations on one rank's shard, on threads of its own, and reports what happened.

`submit`, `cancel` and `poll` are called from the engine's forward thread and never wait for a copy.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np

from kvbm.logic.operations import BlockIds, Completion, Direction, Failure, Operation
from kvbm.transfer.copy import InStepLoad
from kvbm.transfer.records import HostRecords

_NONE_FAILED = np.empty(0, np.int32)


class _Task:
    __slots__ = ("after", "deadline", "operation", "reason", "running", "timed_out")

    def __init__(self, operation: Operation, after: object, deadline: float) -> None:
        self.operation = operation
        self.after = after
        self.deadline = deadline
        self.running = False
        self.reason = Failure.NONE  # set from outside: cancelled or timed out
        self.timed_out = False  # reported as still running


class Worker:
    """Copies between the engine's blocks and `records`, which are checked when they are loaded.

    threads: how many operations run at once in each direction: a load, which a request waits for, never
    queues behind offloads. clock: seconds, monotonic.
    """

    def __init__(
        self, records: HostRecords, *, threads: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._records = records
        self._clock = clock
        self._queues: dict[Direction, queue.SimpleQueue[_Task | None]] = {
            direction: queue.SimpleQueue() for direction in Direction
        }
        self._in_step: list[tuple[Operation, InStepLoad]] = []
        self._lock = threading.Lock()
        self._tasks: dict[int, _Task] = {}
        self._completions: list[Completion] = []
        self._closed = False
        self._threads = [
            threading.Thread(
                target=self._run, args=(tasks,), name=f"kvbm-{direction.name.lower()}-{i}", daemon=True
            )
            for direction, tasks in self._queues.items()
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, operations: Iterable[Operation]) -> None:
        """Start operations, behind all that the calling thread has given the device to do.

        The leader bounds how many are under way.
        """
        now = self._clock()
        after = self._records.fence()
        for operation in operations:
            task = _Task(operation, after, now + operation.timeout_s)
            with self._lock:
                self._tasks[operation.id] = task
            self._queues[operation.direction].put(task)

    def start_in_step(self, operations: Iterable[Operation]) -> list[InStepLoad]:
        """Start loads that the forward pass about to be launched is ordered behind.

        May raise when the device does, or when a record is missing: then the operation counts as failed.
        """
        loads = []
        for operation in operations:
            try:
                if (operation.host_slots < 0).any():
                    raise LookupError("a block of a load inside a step is not in the host tier")
                load = self._records.start_in_step(operation.device_blocks, operation.host_slots)
            except Exception:
                with self._lock:
                    self._completions.append(Completion(operation.id, operation.positions, Failure.ERROR))
                raise
            self._in_step.append((operation, load))
            loads.append(load)
        return loads

    @property
    def loads_in_step(self) -> bool:
        return self._records.loads_in_step

    @property
    def ready_slots(self) -> int:
        return self._records.ready_slots

    def cancel(self, operation_ids: Iterable[int]) -> None:
        """The device blocks of these are about to be overwritten: what isn't copied by now has failed."""
        with self._lock:
            for id_ in operation_ids:
                task = self._tasks.get(id_)
                if task is not None:
                    task.reason = max(task.reason, Failure.CANCELLED)

    def poll(self) -> list[Completion]:
        """Completions since the last call, each operation's final one exactly once."""
        now = self._clock()
        with self._lock:
            for task in self._tasks.values():
                if task.deadline <= now and not task.timed_out:
                    self._time_out(task)
            completions, self._completions = self._completions, []
        if self._in_step:
            over = [load.is_over for _, load in self._in_step]
            completions += [
                Completion(operation.id, _NONE_FAILED)
                for (operation, _), done in zip(self._in_step, over, strict=True)
                if done
            ]
            self._in_step = [each for each, done in zip(self._in_step, over, strict=True) if not done]
        return completions

    @property
    def idle(self) -> bool:
        """Whether nothing is queued, running or waiting to be polled."""
        with self._lock:
            return not self._tasks and not self._completions and not self._in_step

    def close(self) -> None:
        """Stop the threads; what is still queued is not executed."""
        self._closed = True
        for tasks in self._queues.values():
            for _ in self._threads:
                tasks.put(None)
        for thread in self._threads:
            thread.join(timeout=1.0)
        if not any(thread.is_alive() for thread in self._threads):
            self._records.close()

    # ---- the copy threads ----

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
                if task.reason:
                    failed = task.operation.positions
                self._finish(task, failed, max(reason, task.reason))

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

    def _finish(self, task: _Task, failed: BlockIds, reason: Failure) -> None:
        del self._tasks[task.operation.id]
        self._completions.append(Completion(task.operation.id, failed, reason))

    def _time_out(self, task: _Task) -> None:
        task.reason = max(task.reason, Failure.TIMEOUT)
        task.timed_out = True
        if task.running or task.operation.direction == Direction.ONBOARD:
            failed = task.operation.positions
            self._completions.append(Completion(task.operation.id, failed, Failure.TIMEOUT, quiesced=False))
