"""One engine's cache at a moment, in numbers: what metrics, page, status and logs are made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvbm.logic.edges import Edge
from kvbm.observe.requests import HitRate, Totals


@dataclass(slots=True)
class TierState:
    """In blocks. usable: what has memory and may be used, of `capacity`."""

    tier: str
    capacity: int
    usable: int
    registered: int
    free: int
    evicted: int  # since the start
    block_bytes: int  # on all ranks together


@dataclass(slots=True)
class EdgeState:
    """edge: offload (device to host), onboard (host to device), write (host to disk), read (disk to host)."""

    edge: str
    done: Edge
    block_bytes: int
    queued: int  # blocks that are ordered and not done
    failures: Mapping[str, int]  # in blocks, by reason


@dataclass(slots=True)
class Measurements:
    """off_reason: why nothing is cached. Counts are since the start, in blocks where nothing else is said."""

    engine: str
    block_size: int  # tokens
    ready: bool
    off_reason: str | None
    disk_off_reason: str | None
    tiers: list[TierState]
    edges: list[EdgeState]
    totals: Totals
    host_rate: HitRate
    disk_rate: HitRate
    requests_not_cached: Mapping[str, int] = field(default_factory=dict)  # by reason
    not_stored: int = 0  # by the host tier, for want of room
    not_admitted: int = 0  # to disk, by the filter
    not_written: int = 0  # to disk: queue or budget full, no room
    declined: int = 0  # on disk, but sooner computed
    recovered: int = 0  # found on disk at start
    pinned: int = 0  # by users
