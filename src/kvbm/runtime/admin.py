"""What people and programs may ask of a running leader, from any thread: its state, and changes to it.

Everything happens at once under the leader's lock. Orders that follow travel with the engine's next step; an
idle engine makes none, so a prefetch then begins with the next request.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from kvbm.errors import StateError, UsageError
from kvbm.logic.edges import Edge
from kvbm.logic.hashing import Hashes
from kvbm.logic.operations import Direction
from kvbm.logic.pool import BlockPool
from kvbm.observe.explain import describe, explain
from kvbm.observe.measurements import EdgeState, Measurements, TierState
from kvbm.observe.requests import Explanation, RequestRecord
from kvbm.runtime.leader import Leader
from kvbm.runtime.observer import Observer
from kvbm.runtime.upkeep import Upkeep

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Admin:
    """Raises UsageError, with what to do, for what can't be done: StateError for what can't be done now."""

    def __init__(
        self, leader: Leader, observer: Observer, *, block_bytes: int, disk_block_bytes: int
    ) -> None:
        self._leader = leader
        self._observer = observer
        self._block_bytes = block_bytes
        self._disk_block_bytes = disk_block_bytes
        self._names = itertools.count(1)

    # ---- state ----

    def measure(self) -> Measurements:
        leader = self._leader
        with leader.lock:
            log, stats, disk = self._observer.log, leader.stats, leader.disk
            tiers = [_tier(leader.pool, self._block_bytes)]
            offloads, loads = leader.queued
            edges = [
                _edge(
                    "offload", stats.offload, self._block_bytes, offloads, stats.failures, Direction.OFFLOAD
                ),
                _edge("onboard", stats.onboard, self._block_bytes, loads, stats.failures, Direction.ONBOARD),
            ]
            result = Measurements(
                engine=self._observer.engine,
                block_size=log.block_size,
                ready=leader.ready,
                off_reason=leader.off_reason,
                disk_off_reason=disk.off_reason if disk is not None else None,
                tiers=tiers,
                edges=edges,
                totals=replace(log.totals),
                host_rate=replace(log.host_rate),
                disk_rate=replace(log.disk_rate),
                requests_not_cached=dict(leader.not_cached),
                not_stored=stats.deferred_blocks,
                pinned=leader.upkeep.pinned_blocks,
            )
            if disk is not None:
                own, size = disk.stats, self._disk_block_bytes
                tiers.append(_tier(disk.pool, size))
                writes, reads = disk.queued
                edges.append(_edge("write", own.write, size, writes, own.failures, Direction.WRITE))
                edges.append(_edge("read", own.read, size, reads, own.failures, Direction.READ))
                result.not_admitted = own.not_admitted_blocks
                result.not_written = own.dropped_blocks
                result.declined = own.declined_blocks
                result.recovered = own.recovered_blocks
            return result

    def requests(self, limit: int) -> list[dict[str, Any]]:
        """The last requests, the newest first, explained."""
        records = self._records()
        return [describe(record, self._explain(record, records)) for record in records[:limit]]

    def request(self, request_id: str) -> dict[str, Any] | None:
        """One request by its id, or by how its id begins; None if it is not known, or no longer."""
        with self._leader.lock:
            record = self._observer.log.find(request_id)
        return describe(record, self._explain(record, self._records())) if record is not None else None

    def misses(self) -> dict[str, int]:
        """How many of the last finished requests missed for which reason."""
        counts: dict[str, int] = {}
        records = self._records()
        alike: dict[int, list[RequestRecord]] = {}  # all that an explanation looks at: this is asked often
        for record in records:
            alike.setdefault(record.identity.first_block, []).append(record)
        for record in (record for record in records if record.finished):
            miss = self._explain(record, alike[record.identity.first_block]).miss
            if miss is not None:
                counts[miss] = counts.get(miss, 0) + 1
        return counts

    # ---- changes ----

    def clear(self, tier: str | None = None, salt: str | None = None) -> int:
        """Forget all blocks, those of one tier, or those of one salt in every tier; returns how many.

        With those of a salt go blocks of an earlier run whose salt is not known.
        """
        self._known_tier(tier)
        if tier is not None and salt is not None:
            raise UsageError("A salt is cleared in all tiers: give either tier or salt.")
        blocks = self._do(lambda upkeep, now: upkeep.clear(tier, salt))
        what = "of one salt" if salt is not None else f"of the {tier} tier" if tier else "of all tiers"
        logger.info("KVBM: cleared on request: %d blocks %s", blocks, what)
        return blocks

    def new_weights(self, version: str | None = None) -> str:
        """The model's weights have changed; returns the name of the new ones. See `Leader.new_weights`."""
        named = self._leader.new_weights(version)
        if named is None:
            raise StateError(f"Caching is off: {self._leader.off_reason}.")
        logger.info("KVBM: new weights on request: %s", named)
        return named

    def resize(self, tier: str, blocks: int) -> int:
        """Use at most so many blocks of what the tier was started with; returns how many those are."""
        self._known_tier(tier)
        disk = self._leader.disk
        capacity = (disk.pool if tier == "disk" and disk is not None else self._leader.pool).capacity
        if not 1 <= blocks <= capacity:
            raise UsageError(f"The {tier} tier was started with {capacity} blocks: give from 1 to that many.")
        self._do(lambda upkeep, now: (upkeep.resize(tier, blocks), True))
        logger.info("KVBM: resized on request: the %s tier uses %d of %d blocks", tier, blocks, capacity)
        return blocks

    def pin(self, tokens: Sequence[int], ttl_s: float, salt: str | None = None) -> tuple[str, int]:
        """Keep what the host tier holds of this prefix for so long; returns (name for `unpin`, blocks)."""
        name, hashes = f"pin-{next(self._names)}", self._hashes(tokens, salt)
        blocks = self._do(lambda upkeep, now: upkeep.pin(name, hashes, now + ttl_s))
        if not blocks:
            raise StateError(
                "The host tier holds nothing of this prefix, or half of the tier is pinned already: send the "
                "prompt or prefetch it first, or unpin something."
            )
        logger.info("KVBM: pinned on request: %s, %d blocks for %g s", name, blocks, ttl_s)
        return name, blocks

    def unpin(self, name: str) -> int:
        """Returns how many blocks are let go."""
        blocks = self._do(lambda upkeep, now: upkeep.unpin(name))
        if not blocks:
            raise StateError(f"There is no pin {name!r}, or it has expired.")
        logger.info("KVBM: unpinned on request: %s, %d blocks", name, blocks)
        return blocks

    def prefetch(self, tokens: Sequence[int], salt: str | None = None) -> tuple[int, int]:
        """Read what lies on disk of this prefix into the host tier.

        Returns how many blocks the host tier has of it, and how many more lie on disk: they are read from the
        engine's next step on, unless computing them is faster.
        """
        if self._leader.disk is None:
            raise StateError("There is no disk tier to prefetch from: set DYN_KVBM_DISK_CACHE_GB.")
        name, hashes = f"kvbm-prefetch-{next(self._names)}", self._hashes(tokens, salt)
        found = self._do(lambda upkeep, now: (upkeep.prefetch(name, hashes),))[0]
        if found is None:
            raise StateError("Too many prefetches wait for the engine's next steps: try again later.")
        logger.info("KVBM: prefetch on request: %d blocks in the host tier, %d on disk", *found)
        return found

    # ---- inside ----

    def _records(self) -> list[RequestRecord]:
        with self._leader.lock:
            return self._observer.log.newest()

    def _explain(self, record: RequestRecord, records: list[RequestRecord]) -> Explanation:
        """Without the lock, since the engine waits for that and the search of the history takes 0.2 ms.

        Once for a request that is over: what explains it is older, and is forgotten in time.
        """
        if record.explanation is not None:
            return record.explanation
        observer = self._observer
        explanation = explain(
            record,
            records,
            observer.history,
            foreign_records=observer.foreign_records,
            weights_changed=observer.weights_changed,
        )
        if record.finished:
            record.explanation = explanation
        return explanation

    def _known_tier(self, tier: str | None) -> None:
        known = ["host"] + (["disk"] if self._leader.disk is not None else [])
        if tier is not None and tier not in known:
            raise UsageError(f"There is no tier {tier!r} here: give one of {', '.join(known)}.")

    def _do(self, action: Callable[[Upkeep, float], _T]) -> _T:
        result = self._leader.administer(action)
        if result is None:
            raise StateError(f"Caching is off: {self._leader.off_reason}.")
        return result

    def _hashes(self, tokens: Sequence[int], salt: str | None) -> Hashes:
        try:
            hashes = self._leader.hashes_of(tokens, salt)
        except (OverflowError, TypeError) as error:
            raise UsageError("Tokens are numbers from 0 to 4294967295.") from error
        if not len(hashes):
            raise UsageError(
                f"A prefix needs a whole block, {self._observer.log.block_size} tokens, at least."
            )
        return hashes


def _tier(pool: BlockPool, block_bytes: int) -> TierState:
    return TierState(
        pool.tier, pool.capacity, pool.usable, pool.num_registered, pool.num_free, pool.evictions, block_bytes
    )


def _edge(name: str, done: Edge, size: int, queued: int, failures: Any, direction: Direction) -> EdgeState:
    reasons = {
        reason.name.lower(): count for (kind, reason), count in dict(failures).items() if kind == direction
    }
    return EdgeState(name, replace(done, buckets=done.buckets[:]), size, queued, reasons)
