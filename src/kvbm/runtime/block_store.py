"""Blocks of one rank by sequence hash, in host memory and on disk, where nobody decides for several ranks."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbm.config import Config
from kvbm.logic.disk import DiskStats
from kvbm.logic.hashing import Hashes
from kvbm.logic.index import Slots
from kvbm.logic.policies import load_policy
from kvbm.logic.pool import BlockEvent, BlockPool, BlockState, subscribe_to_all
from kvbm.runtime.disk import require_host_slots
from kvbm.runtime.store_disk import StoreDisk
from kvbm.transfer.arena import HostArena, ensure_fits, slot_bytes
from kvbm.transfer.copy import CopyEngine
from kvbm.transfer.records import HostRecords

logger = logging.getLogger(__name__)

_COMPLETE, _REGISTERED = np.uint8(BlockState.COMPLETE), np.uint8(BlockState.REGISTERED)


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counts of blocks, at one moment and since the start."""

    capacity: int
    registered: int
    free: int
    offloaded: int
    onboarded: int
    evicted: int
    corrupt: int
    disk: DiskStats | None = None

    @property
    def summary(self) -> str:
        text = (
            f"host {self.registered} of {self.capacity} blocks; stored {self.offloaded}, served "
            f"{self.onboarded}, evicted {self.evicted}, damaged {self.corrupt}"
        )
        if self.disk is not None:
            failed = sum(self.disk.failures.values())
            text += (
                f"; disk: written {self.disk.written_blocks}, read {self.disk.read_blocks}, failed {failed}"
            )
        return text


class StatsLog:
    """A line in the log when something has changed, at most every so many seconds."""

    def __init__(self, store: "BlockStore", interval_s: float) -> None:
        self._store = store
        self._interval_s = interval_s
        self._next = 0.0
        self._last = ""

    def tick(self) -> None:
        """Called now and then, from any thread."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._interval_s
        line = self._store.stats().summary
        if line != self._last:
            self._last = line
            logger.info("KVBM: %s", line)


class BlockStore:
    """Host and disk tier of one rank.

    record_bytes: of a block. make_engine: copies between the device's blocks and the arena, where there are
    any. namespace: digest, 16 bytes, of all that the bytes of a record depend on: it keeps records on disk
    apart. ranks: how many share the configured sizes; replica: see `start_storage`.

    Thread-safe: copies, and waiting for the disk, hold up no other call. Slots that a call returns are pinned
    until `release`. CapacityError and ConfigError where the settings ask for what this machine does not have.
    """

    def __init__(
        self,
        config: Config,
        record_bytes: int,
        make_engine: Callable[[HostArena], CopyEngine] | None = None,
        *,
        namespace: bytes,
        checksum: bool = True,
        rank: int = 0,
        ranks: int = 1,
        replica: int = 0,
    ) -> None:
        num_slots = require_host_slots(config, [record_bytes] * ranks)
        ensure_fits(num_slots * slot_bytes(record_bytes) * ranks)
        arena = HostArena(num_slots, record_bytes)
        self.records = HostRecords(arena, make_engine(arena) if make_engine else None, checksum=checksum)
        self.pool = BlockPool(num_slots, load_policy(config.host.policy), usable=self.records.ready_slots)
        self._offloaded = self._onboarded = self._corrupt = 0
        self._lock = threading.Lock()
        self._disk: StoreDisk | None = None
        if config.has_disk:
            self._disk = StoreDisk(
                config,
                self.pool,
                self.records,
                self._lock,
                namespace=namespace,
                rank=rank,
                ranks=ranks,
                replica=replica,
            )

    # ---- blocks one by one ----

    def allocate(self, count: int) -> Slots:
        """Up to `count` slots to be filled; fewer where the others are in use."""
        with self._lock:
            self.pool.grow(self.records.ready_slots)
            return self.pool.allocate(count)

    def claim(self, hashes: Hashes) -> tuple[Slots, NDArray[np.bool_]]:
        """A slot of each hash, and which are new and to be filled; -1 where there is no room."""
        with self._lock:
            self.pool.grow(self.records.ready_slots)
            return self.pool.claim(hashes, max_new=self.pool.capacity)

    def name(self, slots: Slots, hashes: Hashes) -> Slots:
        """Register allocated slots that are filled and sealed; returns the owner of each hash."""
        with self._lock:
            owners = self.pool.complete(slots, hashes)
            self._register(owners[owners == slots])
            return owners

    def register(self, slots: Slots) -> None:
        """Claimed slots are filled and sealed. One that isn't registered before its release is gone."""
        with self._lock:
            self._register(slots)

    def release(self, slots: Slots) -> None:
        with self._lock:
            self.pool.release(slots)

    def loaded(self, slots: Slots) -> int:
        """Release slots whose bytes have reached where they were wanted; returns how many."""
        with self._lock:
            self.pool.release(slots)
            self._onboarded += len(slots)
        return len(slots)

    # ---- sequences ----

    def count(self, hashes: Hashes) -> int:
        """How many leading blocks the tiers hold, as far as is known without reading them."""
        with self._lock:
            held = self.pool.registered(hashes) >= 0
            if self._disk is not None:
                held |= self._disk.tier.pool.registered(hashes) >= 0
        return _leading(held)

    def match(self, hashes: Hashes, *, wait: bool = True) -> Slots:
        """The leading blocks that are intact in host memory; with `wait` those on disk are fetched first.

        Without, what the disk has of them is on its way there afterwards.
        """
        slots = self._hold(hashes, wait)
        return self._keep_intact(slots, self.records.intact(slots))

    def store(self, hashes: Hashes, device_blocks: NDArray[np.integer]) -> int:
        """Copy what the tiers lack from the device; returns how many leading blocks they hold now."""
        return self._store(hashes, lambda new, slots: self.records.offload(device_blocks[new], slots))

    def put(self, hashes: Hashes, blocks: Sequence[NDArray[np.uint8]]) -> int:
        """The same from arrays of `record_bytes` bytes."""

        def fill(new: NDArray[np.intp], slots: Slots) -> None:
            records = self.records.arena.records()
            for i, slot in zip(new.tolist(), slots.tolist(), strict=True):
                records[slot] = blocks[i]
            self.records.seal(slots)

        return self._store(hashes, fill)

    def load(self, hashes: Hashes, device_blocks: NDArray[np.integer]) -> int:
        """Copy the leading blocks that the tiers hold to the device; returns how many."""

        slots = self._hold(hashes, wait=True)
        slots = self._keep_intact(slots, self.records.onboard(device_blocks[: len(slots)], slots))
        return self.loaded(slots)

    def get(self, hashes: Hashes, into: Sequence[NDArray[np.uint8]]) -> int:
        """The same into arrays of `record_bytes` bytes."""
        slots = self.match(hashes)
        records = self.records.arena.records()
        for slot, target in zip(slots.tolist(), into, strict=False):
            target[:] = records[slot]
        return self.loaded(slots)

    # ---- the tiers ----

    def subscribe(self, subscriber: Callable[[BlockEvent], None]) -> Callable[[], None]:
        """Call with every stored and removed event, from the thread that caused it; returns what ends it."""
        below = [self._disk.tier.pool] if self._disk is not None else []
        return subscribe_to_all([self.pool, *below], subscriber)

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                capacity=self.pool.capacity,
                registered=self.pool.num_registered,
                free=self.pool.num_free,
                offloaded=self._offloaded,
                onboarded=self._onboarded,
                evicted=self.pool.evictions,
                corrupt=self._corrupt,
                disk=self._disk.stats() if self._disk is not None else None,
            )

    def clear(self) -> None:
        """Forget all blocks, also those on disk; what is being stored is not registered any more."""
        with self._lock:
            self.pool.clear()
            if self._disk is not None:
                self._disk.clear()

    def wait_found(self, timeout_s: float = float("inf")) -> bool:
        """Wait until what an earlier run left on disk is known; False if that takes longer."""
        with self._lock:
            return self._disk is None or self._disk.wait_found(timeout_s)

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until what is being written to disk is there; False if that takes longer."""
        with self._lock:
            return self._disk is None or self._disk.flush(timeout_s)

    def close(self, *, give_back: bool = True) -> None:
        """Finish writing and give the memory back. Nothing else may be called afterwards.

        give_back: False where a copy may still use the memory, which is better leaked.
        """
        with self._lock:
            if self._disk is not None:
                self._disk.close()
        if give_back:
            self.records.close()
            self.records.arena.close()

    # ---- inside ----

    def _store(self, hashes: Hashes, fill: Callable[[NDArray[np.intp], Slots], Any]) -> int:
        slots, is_new = self.claim(hashes)
        new = np.flatnonzero(is_new)
        try:
            fill(new, slots[new])
            self.register(slots[new])
        finally:  # after an error the new blocks are unregistered, and released they are gone
            self.release(slots[slots >= 0])
        return _leading(slots >= 0)

    def _hold(self, hashes: Hashes, wait: bool) -> Slots:
        """The leading blocks in host memory, pinned."""
        with self._lock:
            if self._disk is not None:
                (self._disk.fetch if wait else self._disk.prefetch)(hashes)
            slots = self.pool.match(hashes)
            self.pool.pin(slots)
            return slots

    def _keep_intact(self, slots: Slots, intact: NDArray[np.bool_]) -> Slots:
        """The pinned blocks before the first damaged one; damaged ones are dropped, the others released."""
        count = _leading(intact)
        with self._lock:
            lost = slots[~intact]
            lost = lost[self.pool.states(lost) == _REGISTERED]  # nobody was quicker
            self._corrupt += len(lost)
            self.pool.withdraw(lost)
            self.pool.release(slots[count:])
            self._seen(slots[:count])
        return slots[:count]

    def _register(self, slots: Slots) -> None:
        slots = slots[self.pool.states(slots) == _COMPLETE]  # not withdrawn by a `clear` meanwhile
        self.pool.register(slots)
        self._offloaded += len(slots)
        self._seen(slots)

    def _seen(self, slots: Slots) -> None:
        if self._disk is not None and len(slots):
            self._disk.seen(slots)


def _leading(held: NDArray[np.bool_]) -> int:
    """How many are true before the first that is not."""
    missing = np.flatnonzero(~held)
    return int(missing[0]) if len(missing) else len(held)
