"""Prometheus metrics: their names and meanings, and their values in the measurements of one engine.

Imported by what serves them only: engines run without prometheus_client.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvbm import __version__
from kvbm.logic.edges import BOUNDS, Edge
from kvbm.logic.operations import Failure
from kvbm.observe.measurements import EdgeState, Measurements, TierState
from kvbm.observe.requests import Miss

Labels = tuple[str, ...]
Sample = tuple[Labels, float]


class View(NamedTuple):
    """What there is to show. misses: requests by reason."""

    of: Measurements
    misses: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Definition:
    """kind: counter, gauge, histogram, info; untyped: a counter of NVIDIA's, whose name lacks the ending."""

    name: str
    kind: str
    help: str
    samples: Callable[[View], Iterable[Sample]]
    labels: Labels = ()


def _one(value: Callable[[Measurements], float]) -> Callable[[View], Iterable[Sample]]:
    return lambda view: [((), value(view.of))]


def _tiers(value: Callable[[TierState], float]) -> Callable[[View], Iterable[Sample]]:
    return lambda view: [((tier.tier,), value(tier)) for tier in view.of.tiers]


def _edges(value: Callable[[EdgeState], float]) -> Callable[[View], Iterable[Sample]]:
    return lambda view: [((edge.edge,), value(edge)) for edge in view.of.edges]


def _blocks(edge: str) -> Callable[[View], Iterable[Sample]]:
    return _one(lambda m: sum(state.done.blocks for state in m.edges if state.edge == edge))


def _ready(view: View) -> Iterator[Sample]:
    for tier in view.of.tiers:
        off = tier.tier == "disk" and view.of.disk_off_reason is not None
        yield (tier.tier,), float(view.of.ready and not off)


def _saved(view: View) -> Iterator[Sample]:
    yield ("host",), view.of.totals.host_tokens
    yield ("disk",), view.of.totals.disk_tokens


def _refused(view: View) -> Iterator[Sample]:
    yield ("host", "no room"), view.of.not_stored
    yield ("disk", "seen too seldom"), view.of.not_admitted
    yield ("disk", "no room, queue or budget full"), view.of.not_written


# A series that begins with its first event shows no increase, so all known reasons are there from the start.


def _failures(view: View) -> Iterator[Sample]:
    for edge in view.of.edges:
        for failure in Failure:
            if failure != Failure.NONE:
                reason = failure.name.lower()
                yield (edge.edge, reason), edge.failures.get(reason, 0)


def _misses(view: View) -> Iterator[Sample]:
    for miss in Miss:
        yield (miss,), view.misses.get(miss, 0)


def _not_cached(view: View) -> Iterator[Sample]:
    for reason, count in sorted(view.of.requests_not_cached.items()):
        yield (reason,), count


DEFINITIONS = (
    # ---- NVIDIA's
    Definition(
        "kvbm_matched_tokens",
        "untyped",
        "Tokens loaded from KVBM, beyond those that the device's own cache had.",
        _one(lambda m: m.totals.saved_tokens),
    ),
    Definition(
        "kvbm_offload_blocks_d2h",
        "untyped",
        "Blocks copied from device to host memory.",
        _blocks("offload"),
    ),
    Definition(
        "kvbm_offload_blocks_h2d", "untyped", "Blocks written from host memory to disk.", _blocks("write")
    ),
    Definition(
        "kvbm_offload_blocks_d2d",
        "untyped",
        "Blocks written from the device directly to disk. Always 0 here: all pass through host memory.",
        _one(lambda m: 0),
    ),
    Definition(
        "kvbm_onboard_blocks_h2d",
        "untyped",
        "Blocks loaded into the device that host memory had.",
        _one(lambda m: m.totals.host_blocks),
    ),
    Definition(
        "kvbm_onboard_blocks_d2d",
        "untyped",
        "Blocks loaded into the device that came from disk, through host memory.",
        _one(lambda m: m.totals.disk_blocks),
    ),
    Definition(
        "kvbm_host_cache_hit_rate",
        "gauge",
        "Of the blocks that the last finished requests missed on the device, the part that the host had.",
        _one(lambda m: m.host_rate.value),
    ),
    Definition(
        "kvbm_disk_cache_hit_rate",
        "gauge",
        "Of the blocks that they missed in host memory as well, the part that came from disk.",
        _one(lambda m: m.disk_rate.value),
    ),
    # ---- requests
    Definition("kvbm_requests_total", "counter", "Requests that arrived.", _one(lambda m: m.totals.requests)),
    Definition(
        "kvbm_prompt_tokens_total",
        "counter",
        "Tokens in their prompts.",
        _one(lambda m: m.totals.prompt_tokens),
    ),
    Definition(
        "kvbm_device_tokens_total",
        "counter",
        "Tokens that the engine had in device memory when it started on a request.",
        _one(lambda m: m.totals.device_tokens),
    ),
    Definition(
        "kvbm_saved_tokens_total",
        "counter",
        "Tokens that were loaded from a tier and not computed.",
        _saved,
        ("tier",),
    ),
    Definition(
        "kvbm_saved_prefill_seconds_total",
        "counter",
        "Seconds that the engine would have computed on these tokens, by the speed it was measured at.",
        _one(lambda m: m.totals.saved_s),
    ),
    Definition(
        "kvbm_requests_not_cached_total",
        "counter",
        "Requests that KVBM doesn't cache, by the feature that it lacks.",
        _not_cached,
        ("reason",),
    ),
    Definition(
        "kvbm_missed_requests",
        "gauge",
        "Of the last finished requests, those that missed a block that could have been of use, by what "
        "became of the first such block.",
        _misses,
        ("reason",),
    ),
    # ---- tiers
    Definition(
        "kvbm_tier_ready", "gauge", "1 while the tier is in use, 0 before and when off.", _ready, ("tier",)
    ),
    Definition(
        "kvbm_tier_capacity_bytes",
        "gauge",
        "What the tier was started with, on all ranks together.",
        _tiers(lambda tier: tier.capacity * tier.block_bytes),
        ("tier",),
    ),
    Definition(
        "kvbm_tier_usable_bytes",
        "gauge",
        "What of that has memory and may be used.",
        _tiers(lambda tier: tier.usable * tier.block_bytes),
        ("tier",),
    ),
    Definition(
        "kvbm_tier_used_bytes",
        "gauge",
        "What of that is taken by blocks that can be loaded.",
        _tiers(lambda tier: tier.registered * tier.block_bytes),
        ("tier",),
    ),
    Definition(
        "kvbm_tier_used_blocks", "gauge", "The same in blocks.", _tiers(lambda t: t.registered), ("tier",)
    ),
    Definition(
        "kvbm_pinned_blocks",
        "gauge",
        "Blocks of the host tier that users have pinned.",
        _one(lambda m: m.pinned),
    ),
    Definition(
        "kvbm_evicted_blocks_total",
        "counter",
        "Blocks that left the tier because others needed room.",
        _tiers(lambda tier: tier.evicted),
        ("tier",),
    ),
    Definition(
        "kvbm_refused_blocks_total",
        "counter",
        "Blocks that were not taken into the tier, counted each time they could have been.",
        _refused,
        ("tier", "reason"),
    ),
    Definition(
        "kvbm_declined_blocks_total",
        "counter",
        "Blocks that were on disk and not read, because they are sooner computed.",
        _one(lambda m: m.declined),
    ),
    Definition(
        "kvbm_recovered_blocks_total",
        "counter",
        "Blocks of an earlier run that were found on disk at the start.",
        _one(lambda m: m.recovered),
    ),
    # ---- transfers
    Definition(
        "kvbm_moved_blocks_total",
        "counter",
        "Blocks that arrived. Edges: offload (device to host), onboard (host to device), write (host to "
        "disk) and read (disk to host).",
        _edges(lambda edge: edge.done.blocks),
        ("edge",),
    ),
    Definition(
        "kvbm_moved_bytes_total",
        "counter",
        "The same in bytes, of all ranks together.",
        _edges(lambda edge: edge.done.blocks * edge.block_bytes),
        ("edge",),
    ),
    Definition(
        "kvbm_queued_blocks",
        "gauge",
        "Blocks whose transfer is ordered and not over.",
        _edges(lambda edge: edge.queued),
        ("edge",),
    ),
    Definition(
        "kvbm_failed_blocks_total",
        "counter",
        "Blocks whose transfer failed; they count as misses.",
        _failures,
        ("edge", "reason"),
    ),
)

TRANSFER_SECONDS = Definition(
    "kvbm_transfer_seconds",
    "histogram",
    "Seconds from the order of a transfer to the last rank's report.",
    lambda view: (),
    ("edge",),
)
INFO = Definition(
    "kvbm_info", "info", "1: names engine and version of KVBM.", lambda view: (), ("engine", "version")
)
ALL = (*DEFINITIONS, TRANSFER_SECONDS, INFO)


def render(measurements: Measurements, misses: Mapping[str, int], accept: str) -> tuple[bytes, str]:
    """What a server answers, and its content type. accept: the request's header, which chooses the format."""
    encode, content_type = choose_encoder(accept)
    return encode(_Now(View(measurements, misses))), content_type


def table() -> str:
    """The table in docs/observe.md."""
    head = ["| Name | Type | Labels | Meaning |", "|---|---|---|---|"]
    rows = [
        f"| `{d.name}` | {d.kind} | {', '.join(f'`{label}`' for label in d.labels)} | {d.help} |" for d in ALL
    ]
    return "\n".join([*head, *rows])


class _Now(Collector):
    """Of one moment only: nothing is kept between two requests."""

    def __init__(self, view: View) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        for definition in DEFINITIONS:
            yield _family(definition, definition.samples(self._view))
        yield _histogram(TRANSFER_SECONDS, self._view.of.edges)
        info = InfoMetricFamily(INFO.name.removesuffix("_info"), INFO.help)
        info.add_metric([], {"engine": self._view.of.engine, "version": __version__})
        yield info


def _family(definition: Definition, samples: Iterable[Sample]) -> Metric:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "untyped": UnknownMetricFamily}
    family = kinds[definition.kind](definition.name, definition.help, labels=definition.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _histogram(definition: Definition, edges: Iterable[EdgeState]) -> Metric:
    family = HistogramMetricFamily(definition.name, definition.help, labels=definition.labels)
    for edge in edges:
        family.add_metric((edge.edge,), list(_buckets(edge.done)), edge.done.seconds)
    return family


def _buckets(edge: Edge) -> Iterator[tuple[str, float]]:
    """Upper bound, and how many were at most that."""
    yield from zip(map(floatToGoString, [*BOUNDS, float("inf")]), accumulate(edge.buckets), strict=True)
