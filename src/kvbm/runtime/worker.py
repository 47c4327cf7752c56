"""The worker: executes operations on one rank's shard, on threads of its own, and reports what happened.

`submit`, `cancel` and `poll` are called from the engine's forward thread and never wait for a copy.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np

from kvbm.logic.operations import BlockIds, Completion, Direction, Failure, Operation
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

    threads: how many operations run at once. clock: seconds, monotonic.
    """

    def __init__(
        self, records: HostRecords, *, threads: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._records = records
        self._clock = clock
        # Loads first: a request waits for them. The counter keeps the order and the tasks uncompared.
        self._queue: queue.PriorityQueue[tuple[int, int, _Task | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._tasks: dict[int, _Task] = {}
        self._completions: list[Completion] = []
        self._threads = [
            threading.Thread(target=self._run, name=f"kvbm-copy-{i}", daemon=True) for i in range(threads)
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
            self._queue.put((-operation.direction, next(self._order), task))

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
        return completions

    @property
    def idle(self) -> bool:
        """Whether nothing is queued, running or waiting to be polled."""
        with self._lock:
            return not self._tasks and not self._completions

    def close(self) -> None:
        """Stop the threads; what is still queued is not executed."""
        for _ in self._threads:
            self._queue.put((-len(Direction), next(self._order), None))
        for thread in self._threads:
            thread.join(timeout=1.0)

    # ---- the copy threads ----

    def _run(self) -> None:
        while True:
            _, _, task = self._queue.get()
            if task is None:
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
