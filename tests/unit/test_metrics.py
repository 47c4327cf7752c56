"""The metrics of an engine: every name, type and value, in both formats, and the table in the docs."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvbm import __version__
from kvbm.logic.edges import BOUNDS
from kvbm.observe import metrics
from kvbm.observe.measurements import Measurements
from kvbm.observe.requests import Miss
from tests.unit.made_up import measurements

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
ROOT = Path(__file__).parents[2]
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]

MISSES: dict[str, int] = {Miss.EVICTED: 3, Miss.NEVER_SEEN: 1}


def series(samples: dict[str, float]) -> Series:
    """Of `name label=value label=value`."""
    result: Series = {}
    for key, value in samples.items():
        name, *labels = key.split("|")
        pairs = (label.split("=") for label in labels)
        result[name, tuple(sorted((k, v) for k, v in pairs))] = value
    return result


NVIDIA = {
    "kvbm_matched_tokens": 640,
    "kvbm_offload_blocks_d2h": 15,
    "kvbm_offload_blocks_h2d": 30,
    "kvbm_offload_blocks_d2d": 0,
    "kvbm_onboard_blocks_h2d": 32,
    "kvbm_onboard_blocks_d2d": 14,
    "kvbm_host_cache_hit_rate": 0.75,
    "kvbm_disk_cache_hit_rate": 0.2,
}
OURS = {
    f"kvbm_info|engine=engine-1|version={__version__}": 1,
    "kvbm_requests_total": 31,
    "kvbm_prompt_tokens_total": 4000,
    "kvbm_device_tokens_total": 320,
    "kvbm_saved_tokens_total|tier=host": 480,
    "kvbm_saved_tokens_total|tier=disk": 160,
    "kvbm_saved_prefill_seconds_total": 2.5,
    "kvbm_requests_not_cached_total|reason=pooling request": 2,
    'kvbm_requests_not_cached_total|reason=a "quoted"\nreason \\': 1,
    **{f"kvbm_missed_requests|reason={miss}": MISSES.get(miss, 0) for miss in Miss},
    "kvbm_tier_ready|tier=host": 1,
    "kvbm_tier_ready|tier=disk": 1,
    "kvbm_tier_capacity_bytes|tier=host": 100_000,
    "kvbm_tier_capacity_bytes|tier=disk": 409_600,
    "kvbm_tier_usable_bytes|tier=host": 80_000,
    "kvbm_tier_usable_bytes|tier=disk": 409_600,
    "kvbm_tier_used_bytes|tier=host": 50_000,
    "kvbm_tier_used_bytes|tier=disk": 307_200,
    "kvbm_tier_used_blocks|tier=host": 50,
    "kvbm_tier_used_blocks|tier=disk": 300,
    "kvbm_pinned_blocks": 46,
    "kvbm_evicted_blocks_total|tier=host": 21,
    "kvbm_evicted_blocks_total|tier=disk": 22,
    "kvbm_refused_blocks_total|tier=host|reason=no room": 41,
    "kvbm_refused_blocks_total|tier=disk|reason=seen too seldom": 42,
    "kvbm_refused_blocks_total|tier=disk|reason=no room, queue or budget full": 43,
    "kvbm_declined_blocks_total": 44,
    "kvbm_recovered_blocks_total": 45,
    "kvbm_moved_blocks_total|edge=offload": 15,
    "kvbm_moved_blocks_total|edge=onboard": 11,
    "kvbm_moved_blocks_total|edge=write": 30,
    "kvbm_moved_blocks_total|edge=read": 19,
    "kvbm_moved_bytes_total|edge=offload": 15_000,
    "kvbm_moved_bytes_total|edge=onboard": 11_000,
    "kvbm_moved_bytes_total|edge=write": 30 * 1024,
    "kvbm_moved_bytes_total|edge=read": 19 * 1024,
    "kvbm_queued_blocks|edge=offload": 4,
    "kvbm_queued_blocks|edge=onboard": 6,
    "kvbm_queued_blocks|edge=write": 8,
    "kvbm_queued_blocks|edge=read": 9,
    **{
        f"kvbm_failed_blocks_total|edge={edge}|reason={reason}": 0
        for edge in ("offload", "onboard", "write", "read")
        for reason in ("cancelled", "timeout", "unavailable", "error", "corrupt")
    },
    "kvbm_failed_blocks_total|edge=offload|reason=cancelled": 1,
    "kvbm_failed_blocks_total|edge=onboard|reason=corrupt": 2,
    "kvbm_failed_blocks_total|edge=write|reason=timeout": 2,
    "kvbm_failed_blocks_total|edge=write|reason=error": 1,
}
COUNTS = {"offload": 3, "onboard": 1, "write": 2, "read": 1}
SECONDS = {"offload": 20.021, "onboard": 0.3, "write": 0.704, "read": 1.5}
# Of the bucket up to so many seconds: what took exactly that long is in it.
OFFLOADS_UP_TO = {0.001: 1, 0.01: 1, 0.025: 2, 10.0: 2, float("inf"): 3}


def scrape(of: Measurements, accept: str = "") -> tuple[Series, dict[str, str]]:
    """All samples, and the type of every family."""
    body, content_type = metrics.render(of, MISSES, accept)
    is_openmetrics = "openmetrics" in accept
    assert content_type.startswith("application/openmetrics-text" if is_openmetrics else "text/plain")
    families = list((parse_openmetrics if is_openmetrics else parse_text)(body.decode()))
    samples = [
        ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
        for family in families
        for sample in family.samples
    ]
    assert len(dict(samples)) == len(samples)
    return dict(samples), {family.name: family.type for family in families}


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain;version=0.0.4", OPENMETRICS])
def test_every_value(accept: str) -> None:
    got, _ = scrape(measurements(), accept)
    want = series({**NVIDIA, **OURS})
    histogram = {key: value for key, value in got.items() if key[0].startswith("kvbm_transfer_seconds")}
    assert {key: value for key, value in got.items() if key not in histogram} == want

    for edge, count in COUNTS.items():
        label = (("edge", edge),)
        assert histogram["kvbm_transfer_seconds_count", label] == count
        assert histogram["kvbm_transfer_seconds_sum", label] == pytest.approx(SECONDS[edge])
        buckets = {
            float(dict(labels)["le"]): value
            for (name, labels), value in histogram.items()
            if name.endswith("_bucket") and ("edge", edge) in labels
        }
        assert list(buckets) == [*BOUNDS, float("inf")]
        assert all(a <= b for a, b in itertools.pairwise(buckets.values()))
        assert buckets[float("inf")] == count
        if edge == "offload":
            assert {bound: buckets[bound] for bound in OFFLOADS_UP_TO} == OFFLOADS_UP_TO
    assert len(histogram) == len(COUNTS) * (len(BOUNDS) + 3)


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_every_type(accept: str) -> None:
    _, types = scrape(measurements(), accept)
    want = {}
    for definition in metrics.ALL:
        # The parsers take the endings off, that of an info metric in OpenMetrics only.
        name = definition.name.removesuffix("_total")
        want[name] = {"untyped": "unknown"}.get(definition.kind, definition.kind)
    info = "kvbm" if accept else "kvbm_info"
    want.pop("kvbm_info")
    assert types == {**want, info: "info" if accept else "gauge"}


def test_names_keep_to_the_conventions() -> None:
    names = [definition.name for definition in metrics.ALL]
    assert len(set(names)) == len(names)
    for definition in metrics.ALL:
        assert definition.name.startswith("kvbm_")
        assert definition.help.endswith(".")
        assert "|" not in definition.help
        assert definition.name.endswith("_total") == (definition.kind == "counter")
    assert {d.name for d in metrics.ALL if d.kind == "untyped"} == {n for n in NVIDIA if "rate" not in n}


def test_without_disk() -> None:
    got, _ = scrape(measurements(disk=False))
    assert {name: got[name, ()] for name in NVIDIA} == {
        **NVIDIA,
        "kvbm_offload_blocks_h2d": 0,
    }
    assert ("kvbm_tier_ready", (("tier", "disk"),)) not in got
    assert ("kvbm_moved_bytes_total", (("edge", "write"),)) not in got


@pytest.mark.parametrize(
    ("changes", "host", "disk"),
    [
        ({}, 1, 1),
        ({"ready": False, "off_reason": "internal error in match"}, 0, 0),
        ({"disk_off_reason": "the drive is gone"}, 1, 0),
    ],
)
def test_tiers_that_are_off(changes: dict[str, Any], host: int, disk: int) -> None:
    got, _ = scrape(measurements(**changes))
    ready = {labels[0][1]: value for (name, labels), value in got.items() if name == "kvbm_tier_ready"}
    assert ready == {"host": host, "disk": disk}


def test_nothing_has_happened_yet() -> None:
    """Rates need a first value to rise from."""
    body, _ = metrics.render(measurements(), {}, "")
    assert body.decode().count("kvbm_missed_requests{") == len(Miss)


def test_engines_import_no_metrics() -> None:
    """They run without prometheus_client, as long as nobody asks for metrics."""
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "import kvbm.runtime.admin, kvbm.runtime.observer, kvbm.observe.explain, kvbm.runtime.manager\n"
        "assert 'kvbm.observe.metrics' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_table_in_the_docs() -> None:
    """`python scripts/metrics_table.py` prints it."""
    assert metrics.table() in (ROOT / "docs" / "observe.md").read_text()
