"""What a leader tells observers: requests and their misses, the fate of blocks; trace and hit-rate log."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvbm.errors import KvbmError
from kvbm.logic.disk import DiskTier
from kvbm.logic.fetch import FetchEnd
from kvbm.logic.hashing import Hashes
from kvbm.logic.history import BlockHistory, Fate
from kvbm.logic.operations import Failure
from kvbm.logic.outcome import Loaded
from kvbm.logic.planner import Planner
from kvbm.logic.pool import BlockEvent, BlockState, EventKind
from kvbm.observe.requests import FirstMiss, Identity, Miss, RequestLog
from kvbm.observe.trace import TraceWriter
from kvbm.settings import ObserveConfig

logger = logging.getLogger(__name__)

_OF_FETCH = {
    FetchEnd.SLOWER: Miss.DECLINED,
    FetchEnd.NO_ROOM: Miss.TIER_FULL,
    FetchEnd.PAUSED: Miss.COPY_FAILED,
    FetchEnd.LATE: Miss.COPY_FAILED,
}


@dataclass(slots=True)
class _Load:
    request_id: str
    first: int  # block
    from_disk: NDArray[np.bool_]  # which of its blocks
    again: bool  # the request had run before


class Observer:
    """Called by the leader, on its thread and under its lock. detailed: the fate of blocks is remembered.

    block_bytes: of a block in the host tier, on all ranks together, for the trace.
    """

    def __init__(
        self,
        config: ObserveConfig,
        block_size: int,
        *,
        engine: str = "",
        block_bytes: int = 0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.log = RequestLog(config.max_requests, block_size)
        self.detailed = config.metrics
        self.history = BlockHistory(config.history_blocks if self.detailed else 1)
        self.foreign_records = False
        self.weights_changed: float | None = None  # when, by the leader's clock
        self.engine = engine
        self._wall = wall
        self._loads: dict[int, _Load] = {}
        self._interval_s = config.log_interval_s
        self._next_log = 0.0
        self._logged = 0  # requests that had ended
        self._trace = _open_trace(config, block_size, block_bytes) if config.record else None

    # ---- blocks ----

    def block_event(self, event: BlockEvent, now: float) -> None:
        if event.kind == EventKind.REMOVED and event.fate is not None and self.detailed:
            self.history.add(event.hashes, event.tier, event.fate, now, event.wanted)

    def new_weights(self, now: float) -> None:
        self.weights_changed = now

    def not_taken(self, tier: str, hashes: Hashes, fate: Fate, now: float) -> None:
        if self.detailed:
            self.history.add(hashes, tier, fate, now)

    # ---- requests ----

    def arrived(self, request_id: str, prompt_tokens: int, identity: Identity) -> None:
        self.log.arrived(request_id, self._wall(), prompt_tokens, identity)

    def refused(self, request_id: str, prompt_tokens: int, reason: str) -> None:
        self.log.refused(request_id, self._wall(), prompt_tokens, reason)

    def answered(self, request_id: str, first: int, wanted: int, miss: FirstMiss | None, now: float) -> None:
        self.log.answered(request_id, now, first, wanted, miss)

    def load_ordered(
        self, operation_id: int, request_id: str, first: int, from_disk: NDArray[np.bool_]
    ) -> None:
        again = self.log.runs_again(request_id)
        self._loads[operation_id] = _Load(request_id, first, from_disk, again)

    def loaded(self, done: Loaded, tokens_per_s: float | None) -> None:
        load = self._loads.pop(done.operation_id, None)
        if load is None:
            return
        disk = int(np.count_nonzero(load.from_disk[: done.usable]))
        saved_s = done.usable * self.log.block_size / tokens_per_s if tokens_per_s else 0.0
        self.log.loaded(
            load.request_id,
            done.usable - disk,
            disk,
            done.failed,
            saved_s,
            again=load.again,
            miss=_of_load(load, done) if done.failed else None,
        )

    def finished(self, request_id: str, hashes: Hashes | None, output_tokens: int) -> None:
        record = self.log.finished(request_id)
        if self._trace is not None and hashes is not None and record is not None:
            self._trace.request(record.at, record.prompt_tokens, output_tokens, hashes)

    # ---- time ----

    def tick(self, now: float) -> None:
        """One line with the hit rates at an interval, when there is something new."""
        if now < self._next_log:
            return
        self._next_log = now + self._interval_s
        host, disk = self.log.host_rate, self.log.disk_rate
        if self.log.num_finished != self._logged and host.wanted:
            self._logged = self.log.num_finished
            logger.info(
                "KVBM [%s] Cache Hit Rates - Host: %.1f%% (%d/%d), Disk: %.1f%% (%d/%d)",
                self.engine,
                100 * host.value,
                host.hits,
                host.wanted,
                100 * disk.value,
                disk.hits,
                disk.wanted,
            )

    def close(self) -> None:
        if self._trace is not None:
            self._trace.close()


def _open_trace(config: ObserveConfig, block_size: int, block_bytes: int) -> TraceWriter | None:
    limit = int(config.record_max_mb * 1e6)
    try:
        return TraceWriter(Path(config.record_file), block_size, limit, block_bytes=block_bytes or None)
    except (KvbmError, OSError) as error:
        logger.warning("KVBM: requests are not recorded: %s", error)
        return None


def _of_load(load: _Load, done: Loaded) -> FirstMiss:
    block = load.first + done.usable
    if done.reason == Failure.CORRUPT:
        return FirstMiss(block, reason=Miss.FAILED_CHECK, detail="its record failed its check in the load")
    detail = f"its load failed or was given up ({done.reason.name.lower()})"
    return FirstMiss(block, reason=Miss.COPY_FAILED, detail=detail)


def _missing_key(planner: Planner, hashes: Hashes, block: int) -> Hashes:
    """Key of what the host lacks to go on behind this block: of it, or of one before it in some group."""
    if not planner.groups.single:
        for group, first in enumerate(planner.groups.needed(block + 1)):
            keys = planner.groups.keys(hashes[first : block + 1], group)
            lost = np.flatnonzero(planner.pool.registered(keys) < 0)
            if len(lost):
                return keys[lost[-1] :][:1]
    return hashes[block : block + 1]


def first_miss(request_id: str, block: int, planner: Planner, disk: DiskTier | None) -> FirstMiss:
    """The block of the request that no tier gave it, and why, as far as that shows now."""
    hasher = planner.hasher(request_id)
    if hasher is None or block >= len(hasher):
        return FirstMiss(block)
    if not planner.may_load(request_id):
        return FirstMiss(block, reason=Miss.COPY_FAILED, detail="a load for this request had failed")
    key = _missing_key(planner, hasher.hashes, block)
    miss = FirstMiss(block, int(key[0, 0]))
    end = disk.fetched(request_id)[1] if disk is not None else None
    if planner.pool.find(key)[0] >= 0:
        miss.reason = Miss.BEING_WRITTEN if end is None else Miss.COPY_FAILED
        miss.detail = "its bytes were still on their way to the host tier"
    elif disk is not None and (slots := disk.pool.find(key))[0] >= 0:
        if end is not None:
            miss.reason, miss.detail = _OF_FETCH[end], f"it was on disk but not read: {end.value}"
        elif disk.pool.states(slots)[0] != BlockState.REGISTERED:
            miss.reason, miss.detail = Miss.BEING_WRITTEN, "it was still being written to disk"
    if miss.reason is None and disk is not None and not disk.ready:
        if disk.off_reason is None:
            miss.reason, miss.detail = Miss.NOT_READY, "what lies on disk was not known yet"
        elif disk.pool.find(key)[0] >= 0:
            miss.reason, miss.detail = Miss.COPY_FAILED, f"it is on disk, but that is off: {disk.off_reason}"
    return miss
