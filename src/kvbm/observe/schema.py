"""What the HTTP routes take and answer: pydantic models of the JSON, its limits, and words for OpenAPI."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from kvbm.observe.measurements import Measurements

MAX_TOKENS = 1_000_000
MAX_TTL_S = 86400.0

# ---- what is sent

Tier = Literal["host", "disk"]
Salt = Annotated[
    str | None, Field(max_length=4096, description="`cache_salt` of the requests; null: without")
]
Tokens = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**32)]],
    FailFast(),
    Field(min_length=1, max_length=MAX_TOKENS, description="token ids of the prefix; whole blocks count"),
]


class Order(BaseModel):
    """Strict: text is no number, and unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ClearOrder(Order):
    tier: Tier | None = Field(None, description="null: all tiers")
    salt: Salt = None


class WeightsOrder(Order):
    version: str | None = Field(
        None, max_length=1000, description="names the new weights in all runs; null: they have no name"
    )


class ResizeOrder(Order):
    tier: Tier
    blocks: int = Field(ge=1, description="to be used, of those that the tier was started with")


class PinOrder(Order):
    tokens: Tokens
    ttl_s: float = Field(gt=0, le=MAX_TTL_S, description="seconds until it is let go")
    salt: Salt = None


class PrefetchOrder(Order):
    tokens: Tokens
    salt: Salt = None


class ListQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")  # not strict: what is in an address is text

    limit: int = Field(50, ge=1, le=1000)


# ---- what is answered


class TierStatus(BaseModel):
    """In blocks."""

    tier: str
    blocks: int = Field(description="that it was started with")
    usable: int = Field(description="that have memory and may be used")
    registered: int = Field(description="that can be matched")
    free: int
    evicted: int = Field(description="since the start")
    bytes: int = Field(description="that `blocks` take")
    used_bytes: int = Field(description="that `registered` take")


class EdgeStatus(BaseModel):
    """What moved between two tiers since the start."""

    edge: str = Field(description="offload, onboard, write (host to disk) or read (disk to host)")
    operations: int
    blocks: int
    failed: int = Field(description="blocks")
    bytes: int
    seconds: float = Field(description="sum over the operations")
    queued: int = Field(description="blocks that are ordered and not done")
    failures: dict[str, int] = Field(description="blocks, by reason")


class HitRates(BaseModel):
    """From 0 to 1, in blocks, over the last finished requests."""

    host: float
    disk: float


class TotalsStatus(BaseModel):
    """Since the start."""

    requests: int
    prompt_tokens: int
    device_tokens: int
    host_tokens: int
    disk_tokens: int
    saved_tokens: int = Field(description="that were loaded and so not computed")
    saved_seconds: float = Field(description="of prefill, as estimated")


class Status(BaseModel):
    engine: str
    ready: bool
    off_reason: str | None = Field(description="why nothing is cached, if so")
    disk_off_reason: str | None
    block_size: int = Field(description="tokens")
    tiers: list[TierStatus]
    edges: list[EdgeStatus]
    hit_rates: HitRates
    totals: TotalsStatus
    requests_not_cached: dict[str, int] = Field(description="requests, by reason")
    misses: dict[str, int] = Field(description="of the last requests, by reason of their first miss")
    not_stored: int
    not_admitted: int
    not_written: int
    declined: int
    recovered: int
    pinned: int


class RequestStatus(BaseModel):
    id: str
    at: float = Field(description="arrival, seconds since 1970")
    finished: bool
    prompt_tokens: int
    device_tokens: int
    host_tokens: int
    disk_tokens: int
    failed_tokens: int
    computed_tokens: int
    saved_seconds: float
    missed_block: int | None
    reason: str | None
    explanation: str


class Requests(BaseModel):
    requests: list[RequestStatus] = Field(description="the newest first")


class Cleared(BaseModel):
    cleared_blocks: int


class Weights(BaseModel):
    version: str


class Resized(BaseModel):
    blocks: int


class Pinned(BaseModel):
    pin: str = Field(description="its name, by which it can be released")
    blocks: int


class Released(BaseModel):
    released_blocks: int


class Prefetching(BaseModel):
    host_blocks: int = Field(description="of the prefix that the host tier has")
    reading_blocks: int = Field(description="that are on their way from disk")


class Refusal(BaseModel):
    detail: str = Field(description="a sentence that says what to do")


class FieldRefusal(BaseModel):
    field: str
    message: str


class Invalid(Refusal):
    fields: list[FieldRefusal]


def status_of(now: Measurements, misses: dict[str, int]) -> Status:
    totals = now.totals
    return Status(
        engine=now.engine,
        ready=now.ready,
        off_reason=now.off_reason,
        disk_off_reason=now.disk_off_reason,
        block_size=now.block_size,
        tiers=[
            TierStatus(
                tier=tier.tier,
                blocks=tier.capacity,
                usable=tier.usable,
                registered=tier.registered,
                free=tier.free,
                evicted=tier.evicted,
                bytes=tier.capacity * tier.block_bytes,
                used_bytes=tier.registered * tier.block_bytes,
            )
            for tier in now.tiers
        ],
        edges=[
            EdgeStatus(
                edge=edge.edge,
                operations=edge.done.operations,
                blocks=edge.done.blocks,
                failed=edge.done.failed,
                bytes=edge.done.blocks * edge.block_bytes,
                seconds=round(edge.done.seconds, 6),
                queued=edge.queued,
                failures=dict(edge.failures),
            )
            for edge in now.edges
        ],
        hit_rates=HitRates(host=now.host_rate.value, disk=now.disk_rate.value),
        totals=TotalsStatus(
            requests=totals.requests,
            prompt_tokens=totals.prompt_tokens,
            device_tokens=totals.device_tokens,
            host_tokens=totals.host_tokens,
            disk_tokens=totals.disk_tokens,
            saved_tokens=totals.saved_tokens,
            saved_seconds=round(totals.saved_s, 6),
        ),
        requests_not_cached=dict(now.requests_not_cached),
        misses=misses,
        not_stored=now.not_stored,
        not_admitted=now.not_admitted,
        not_written=now.not_written,
        declined=now.declined,
        recovered=now.recovered,
        pinned=now.pinned,
    )
