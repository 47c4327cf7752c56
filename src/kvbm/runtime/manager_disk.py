"""The disk tier of a KvBlockManager: leader's and worker's half in one, worked on whenever it is called."""

import itertools
import time
from collections.abc import Callable

import numpy as np

from kvbm.config import Config
from kvbm.errors import CapacityError
from kvbm.logic.disk import DiskStats
from kvbm.logic.hashing import Hashes
from kvbm.logic.index import Slots
from kvbm.logic.pool import BlockPool
from kvbm.runtime.disk import disk_record_bytes, make_disk_tier, num_disk_slots, start_storage
from kvbm.runtime.worker import Worker
from kvbm.transfer.arena import HostArena
from kvbm.transfer.records import HostRecords

_POLL_S = 2e-4


class ManagerDisk:
    """Calls come one after another, under the manager's lock."""

    def __init__(
        self, config: Config, host: BlockPool, records: HostRecords, arena: HostArena, namespace: bytes
    ) -> None:
        capacity = num_disk_slots(config, arena.record_bytes, ranks=1)
        if capacity < 1:
            raise CapacityError(
                f"The disk cache is smaller than one block of {disk_record_bytes(arena.record_bytes, 1)} "
                f"bytes: raise disk.cache_gb."
            )
        self.tier = make_disk_tier(
            config,
            host,
            capacity=capacity,
            record_bytes=disk_record_bytes(arena.record_bytes, 1),
            ranks=1,
            ids=itertools.count(),
            drop=host.withdraw,
            estimate=None,
        )
        self._requests = itertools.count()
        storage = start_storage(config, arena, num_slots=capacity, namespace=namespace, rank=0, ranks=1)
        self._worker = Worker(records, threads=0, disk=storage)
        self._work()
        self._wait(lambda: not self.tier.restoring)

    def seen(self, host_slots: Slots) -> None:
        """These registered host blocks are new, or used again."""
        self._work()
        self.tier.seen(host_slots)
        self._work()

    def fetch(self, hashes: Hashes) -> None:
        """Bring to the host tier what the disk has of these, as far as the host has room; waits for it."""
        request = str(next(self._requests))
        self._work()
        self._wait(lambda: self.tier.fetch(request, hashes))
        self.tier.finish(request)

    def stats(self) -> DiskStats:
        self._work()
        return self.tier.stats

    def clear(self) -> None:
        self.tier.clear()
        self._worker.forget_on_disk(np.empty(0, np.int32), everything=True)
        self._work()

    def flush(self, timeout_s: float) -> bool:
        return self._wait(lambda: not self.tier.has_work, timeout_s)

    def close(self) -> None:
        self.flush(timeout_s=10.0)
        self._worker.close()

    def _wait(self, done: Callable[[], bool], timeout_s: float = float("inf")) -> bool:
        end = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_S)
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
        operations, forget = self.tier.take_orders()
        if forget:
            self._worker.forget_on_disk(np.array(forget, np.int32))
        self._worker.submit(operations)
