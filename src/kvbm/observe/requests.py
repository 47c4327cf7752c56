"""The last requests: what each found in which tier, and what is known of the first block that it missed.

Written by the scheduler's thread, a few assignments a request; read by others under the leader's lock.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum


class Miss(StrEnum):
    """Why a request did not get a block from KVBM."""

    NEVER_SEEN = "never seen"
    EVICTED = "evicted"
    NOT_ADMITTED = "not admitted to disk"
    OTHER_IDENTITY = "other salt or adapter"
    OTHER_NAMESPACE = "other namespace"
    FAILED_CHECK = "failed check"
    DECLINED = "load declined as slower"
    TIER_FULL = "tier full"
    UNSUPPORTED = "feature not supported"
    BEING_WRITTEN = "still being written"
    COPY_FAILED = "copy failed"
    CLEARED = "cleared"
    NOT_READY = "cache not ready"


@dataclass(slots=True)
class Identity:
    """What sets requests with equal tokens apart. first_block: digest of the first block's tokens alone."""

    salt: int = 0  # digest; 0 without
    adapter: str | None = None
    first_block: int = 0


@dataclass(slots=True)
class FirstMiss:
    """The first block of a request that no tier had. word: first of its hash; 0 where it was never hashed.

    reason, detail: where that was plain at once; otherwise the history of blocks knows.
    """

    block: int
    word: int = 0
    reason: Miss | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Explanation:
    """miss: None where nothing was missed that could have been of use."""

    miss: Miss | None
    text: str


@dataclass(slots=True)
class RequestRecord:
    """at: seconds since 1970; clock: the leader's at the time of the answer. Counts are in tokens."""

    id: str
    at: float
    prompt_tokens: int
    identity: Identity = field(default_factory=Identity)
    clock: float = 0.0
    wanted_tokens: int = 0  # beyond the device's hit
    device_tokens: int = 0
    host_tokens: int = 0  # loaded, that came from there
    disk_tokens: int = 0
    failed_tokens: int = 0
    saved_s: float = 0.0  # of prefill
    miss: FirstMiss | None = None
    answered: bool = False
    runs_again: bool = False  # after a preemption: what it finds then was its own, and is not counted here
    finished: bool = False
    explanation: Explanation | None = None  # found when it is first asked for

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.device_tokens - self.host_tokens - self.disk_tokens


@dataclass(slots=True)
class Totals:
    """Since the start."""

    requests: int = 0
    prompt_tokens: int = 0
    device_tokens: int = 0
    host_tokens: int = 0
    disk_tokens: int = 0
    saved_s: float = 0.0
    host_blocks: int = 0  # loaded that had been in the host tier
    disk_blocks: int = 0  # loaded that came from disk

    @property
    def saved_tokens(self) -> int:
        return self.host_tokens + self.disk_tokens


@dataclass(slots=True)
class HitRate:
    """In blocks, over the last finished requests."""

    hits: int = 0
    wanted: int = 0

    @property
    def value(self) -> float:
        return self.hits / self.wanted if self.wanted else 0.0


class RequestLog:
    """The running requests, and the last `max_requests` that have finished."""

    def __init__(self, max_requests: int, block_size: int) -> None:
        self.totals = Totals()
        self.host_rate = HitRate()
        self.disk_rate = HitRate()
        self.num_finished = 0
        self.block_size = block_size
        self._max = max_requests
        self._running: dict[str, RequestRecord] = {}
        self._finished: deque[RequestRecord] = deque()

    def find(self, request_id: str) -> RequestRecord | None:
        """By its id, or by the beginning of it: engines add to the ids that clients see."""
        records = self.newest()
        exact = (record for record in records if record.id == request_id)
        return next(exact, None) or next((r for r in records if r.id.startswith(request_id)), None)

    def newest(self) -> list[RequestRecord]:
        """Running and finished, the newest first."""
        return [*reversed(self._running.values()), *reversed(self._finished)]

    def runs_again(self, request_id: str) -> bool:
        record = self._running.get(request_id)
        return record is not None and record.runs_again

    # ---- as it happens ----

    def arrived(self, request_id: str, at: float, prompt_tokens: int, identity: Identity) -> None:
        self._running[request_id] = RequestRecord(request_id, at, prompt_tokens, identity)
        self.totals.requests += 1
        self.totals.prompt_tokens += prompt_tokens

    def refused(self, request_id: str, at: float, prompt_tokens: int, reason: str) -> None:
        """It is not cached at all."""
        self.arrived(request_id, at, prompt_tokens, Identity())
        record = self._running[request_id]
        record.miss = FirstMiss(0, reason=Miss.UNSUPPORTED, detail=reason)
        record.answered = True

    def answered(
        self, request_id: str, clock: float, first: int, wanted: int, miss: FirstMiss | None
    ) -> None:
        """vLLM starts on it: the device had its first `first` blocks, `wanted` more could be of use."""
        record = self._running.get(request_id)
        if record is None:
            return
        if record.answered:  # the first answer counts
            record.runs_again = True
            return
        record.answered = True
        record.clock = clock
        record.device_tokens = first * self.block_size
        record.wanted_tokens = wanted * self.block_size
        record.miss = miss
        self.totals.device_tokens += record.device_tokens

    def loaded(
        self,
        request_id: str,
        host_blocks: int,
        disk_blocks: int,
        failed: int,
        saved_s: float,
        *,
        again: bool = False,
        miss: FirstMiss | None = None,
    ) -> None:
        """A load for it is over. again: it is not its first. miss: the first block that failed."""
        totals, size = self.totals, self.block_size
        totals.host_blocks += host_blocks
        totals.disk_blocks += disk_blocks
        totals.host_tokens += host_blocks * size
        totals.disk_tokens += disk_blocks * size
        totals.saved_s += saved_s
        record = self._running.get(request_id)
        if record is not None and not again:
            record.host_tokens += host_blocks * size
            record.disk_tokens += disk_blocks * size
            record.failed_tokens += failed * size
            record.saved_s += saved_s
            record.miss = miss or record.miss  # it comes before the block that no tier had

    def finished(self, request_id: str) -> RequestRecord | None:
        record = self._running.pop(request_id, None)
        if record is None:
            return None
        record.finished = True
        self.num_finished += 1
        self._finished.append(record)
        self._count(record, 1)
        if len(self._finished) > self._max:
            self._count(self._finished.popleft(), -1)
        return record

    def _count(self, record: RequestRecord, sign: int) -> None:
        size = self.block_size
        wanted, host = record.wanted_tokens // size, record.host_tokens // size
        self.host_rate.hits += sign * host
        self.host_rate.wanted += sign * wanted
        self.disk_rate.hits += sign * (record.disk_tokens // size)
        self.disk_rate.wanted += sign * max(0, wanted - host)
