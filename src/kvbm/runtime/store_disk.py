"""The disk tier of a BlockStore: leader's and worker's half, worked on by a thread and by whoever waits."""

import itertools
import logging
import threading
import time
from collections.abc import Callable

import numpy as np

from kvbm.config import Config
from kvbm.logic.disk import DiskStats
from kvbm.logic.hashing import Hashes
from kvbm.logic.index import Slots
from kvbm.logic.pool import BlockPool
from kvbm.runtime.disk import disk_record_bytes, make_disk_tier, require_disk_slots, start_storage
from kvbm.runtime.worker import Worker
from kvbm.transfer.records import HostRecords

logger = logging.getLogger(__name__)

_POLL_S = 2e-4  # by a caller who waits for a block
_BUSY_S, _IDLE_S = 5e-3, 1.0  # by the thread
_MAX_PREFETCHES = 64


class StoreDisk:
    """All calls under `lock`, which is let go while one waits."""

    def __init__(
        self,
        config: Config,
        host: BlockPool,
        records: HostRecords,
        lock: threading.Lock,
        *,
        namespace: bytes,
        rank: int = 0,
        ranks: int = 1,
        replica: int = 0,
    ) -> None:
        arena = records.arena
        records_of_all = [arena.record_bytes] * ranks
        capacity = require_disk_slots(config, records_of_all)
        self.tier = make_disk_tier(
            config,
            host,
            capacity=capacity,
            record_bytes=disk_record_bytes(records_of_all),
            ranks=1,
            ids=itertools.count(),
            drop=host.withdraw,
            estimate=None,
        )
        self._lock = lock
        self._timeout_s = config.disk.timeout_s
        self._requests = itertools.count()
        self._prefetches: dict[str, Hashes] = {}
        storage = start_storage(
            config, arena, num_slots=capacity, namespace=namespace, rank=rank, ranks=ranks, replica=replica
        )
        # Its copy engine is not this worker's to close.
        self._worker = Worker(records.without_engine(), threads=0, disk=storage)
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvbm-disk", daemon=True)
        self._thread.start()

    def seen(self, host_slots: Slots) -> None:
        """These registered host blocks are new, or used again."""
        self.tier.seen(host_slots)
        self._work()
        self._wake.set()

    def fetch(self, hashes: Hashes) -> None:
        """Bring to the host tier what the disk has of these, as far as the host has room; waits for it."""
        request = str(next(self._requests))
        self._wait(lambda: self.tier.fetch(request, hashes), self._timeout_s)
        self.tier.finish(request)

    def prefetch(self, hashes: Hashes) -> None:
        """The same without waiting. One of too many at once is left out."""
        if len(self._prefetches) < _MAX_PREFETCHES and self.tier.lacking(hashes):
            self._prefetches[str(next(self._requests))] = hashes
            self._work()
            self._wake.set()

    def stats(self) -> DiskStats:
        self._work()
        return self.tier.stats

    def clear(self) -> None:
        self.tier.clear()
        self._worker.forget_on_disk(np.empty(0, np.int32), everything=True)
        self._work()

    def wait_found(self, timeout_s: float = float("inf")) -> bool:
        """Wait until what an earlier run left is known; False if that takes longer."""
        return self._wait(lambda: not self.tier.restoring, timeout_s)

    def flush(self, timeout_s: float) -> bool:
        return self._wait(lambda: not self.tier.has_work, timeout_s)

    def close(self) -> None:
        self.flush(timeout_s=10.0)
        self._closed = True
        self._wake.set()
        self._worker.close()

    def _run(self) -> None:
        while not self._closed:
            with self._lock:
                if self._closed:
                    return
                try:
                    self._work()
                except Exception:
                    logger.exception("KVBM: the disk tier is turned off")
                    self.tier.turn_off("its logic failed")
                busy = self.tier.restoring or self.tier.has_work
            self._wake.wait(_BUSY_S if busy else _IDLE_S)
            self._wake.clear()

    def _wait(self, done: Callable[[], bool], timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        self._work()
        while not done():
            if time.monotonic() > end or self._closed:
                return False
            self._lock.release()
            try:
                time.sleep(_POLL_S)
            finally:
                self._lock.acquire()
            self._work()
        return True

    def _work(self) -> None:
        """What an engine's step does."""
        for completion in self._worker.poll():
            self.tier.complete(0, completion)
        if self._worker.disk_refused is not None:
            self.tier.turn_off(self._worker.disk_refused)
        for found in self._worker.take_found():
            self.tier.found(0, found.slots, found.hashes, last=False)
        if self._worker.disk_ready:
            self.tier.found(0, np.empty(0, np.int32), np.empty((0, 2), np.uint64), last=True)
        self.tier.tick(time.monotonic())
        for request in [name for name, hashes in self._prefetches.items() if self.tier.fetch(name, hashes)]:
            self.tier.finish(request)
            del self._prefetches[request]
        operations, forget = self.tier.take_orders()
        if forget:
            self._worker.forget_on_disk(np.array(forget, np.int32))
        self._worker.submit(operations)
