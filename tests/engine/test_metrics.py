"""Metrics of a real vLLM run: they equal what the engine's outputs and vLLM's own counters say."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from kvbm.vllm_integration import stats
from kvbm.vllm_integration.connector import DynamoConnector
from kvbm.vllm_integration.stats import KvbmPromMetrics, KvbmStats, StatsSource
from tests.engine import metrics_tools, scenarios
from tests.engine.conftest import TINY
from tests.engine.disk_tools import SMALL, settings
from tests.engine.harness import BLOCK_SIZE, Engine
from tests.engine.metrics_tools import Values, scrape
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask, Ran

HOST = 64
# K and V of a block, float32: what a record holds besides its header.
PAYLOAD = 2 * TINY["num_hidden_layers"] * TINY["num_key_value_heads"] * TINY["head_dim"] * 4 * BLOCK_SIZE


@pytest.fixture(scope="module")
def engine(keen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    env = settings(
        tmp_path_factory.mktemp("metrics"),
        host=HOST,
        disk=256,
        more={"DYN_KVBM_METRICS": "1", "DYN_KVBM_METRICS_PORT": "0", "KVBM_METRICS_HOST": "127.0.0.1"},
    )
    with Engine(keen, kvbm={}, env=env, **SMALL) as started:
        yield started


class Counted:
    """What the engine's outputs and vLLM's counters say of all runs so far."""

    def __init__(self) -> None:
        self.requests = self.prompt = self.device = self.external = 0

    def add(self, asks: Sequence[Ask], ran: Ran) -> int:
        """Tokens that came from KVBM in this run."""
        self.requests += len(asks)
        self.prompt += sum(len(ask.prompt) for ask in asks)
        self.device += ran.device_hits
        external = sum(ran.cached) - ran.device_hits
        assert external == ran.external_hits
        self.external += external
        return external


def blocks_computed(asks: Sequence[Ask]) -> int:
    """Full blocks of prompts and replies; the last token of a reply is never computed."""
    return sum((len(ask.prompt) + ask.max_tokens - 1) // BLOCK_SIZE for ask in asks)


def test_metrics_equal_what_the_run_did(engine: Engine, prompts: Prompts) -> None:
    counted = Counted()
    asks = [Ask(prompt) for prompt in prompts.batch(900, [200, 150, 90, 333])]
    want = sum((len(ask.prompt) - 1) // BLOCK_SIZE for ask in asks) * BLOCK_SIZE
    stored = blocks_computed(asks)
    assert stored < HOST // 2  # as many may wait to be written

    # Nobody has these tokens.
    before = scrape(engine)
    assert before["kvbm_requests_total"] == before["kvbm_matched_tokens"] == 0
    assert counted.add(asks, engine.call(metrics_tools.run, asks)) == 0
    cold = scrape(engine)
    assert cold["kvbm_offload_blocks_d2h"] == cold["kvbm_moved_blocks_total offload"] == stored
    assert cold["kvbm_offload_blocks_h2d"] == cold["kvbm_moved_blocks_total write"] == stored
    assert cold["kvbm_missed_requests never seen"] == len(asks)
    assert cold["kvbm_tier_used_blocks host"] == cold["kvbm_tier_used_blocks disk"] == stored
    for edge, count in (("offload", stored), ("write", stored)):
        payload = cold[f"kvbm_moved_bytes_total {edge}"] / count
        assert PAYLOAD <= payload < PAYLOAD + 2 * 4096
        assert 0 < cold[f"kvbm_transfer_seconds_sum {edge}"] < 60
        assert 0 < cold[f"kvbm_transfer_seconds_count {edge}"] <= count
        assert (
            cold[f"kvbm_transfer_seconds_bucket {edge} +Inf"] == cold[f"kvbm_transfer_seconds_count {edge}"]
        )

    # The device has them.
    assert counted.add(asks, engine.call(metrics_tools.run, asks)) == 0
    warm = scrape(engine)
    assert warm["kvbm_device_tokens_total"] == counted.device == want
    assert warm["kvbm_matched_tokens"] == 0

    # Host memory has them.
    from_host = counted.add(asks, engine.call(scenarios.run_again, asks))
    assert from_host == want
    host = scrape(engine)
    assert host["kvbm_saved_tokens_total host"] == host["kvbm_matched_tokens"] == from_host
    assert (
        host["kvbm_onboard_blocks_h2d"] == host["kvbm_moved_blocks_total onboard"] == from_host / BLOCK_SIZE
    )
    assert host["kvbm_saved_tokens_total disk"] == host["kvbm_onboard_blocks_d2d"] == 0
    assert host["kvbm_moved_blocks_total read"] == 0
    # Of three rounds the device had one; of the other two the host had one.
    assert host["kvbm_host_cache_hit_rate"] == pytest.approx(0.5)

    # Only the disk has them.
    engine.call(metrics_tools.clear_host)
    from_disk = counted.add(asks, engine.call(scenarios.run_again, asks))
    assert from_disk == want
    disk = scrape(engine)
    assert disk["kvbm_saved_tokens_total disk"] == from_disk
    assert disk["kvbm_onboard_blocks_d2d"] == disk["kvbm_moved_blocks_total read"] == from_disk / BLOCK_SIZE
    assert disk["kvbm_saved_tokens_total host"] == from_host
    assert disk["kvbm_evicted_blocks_total host"] == 0

    # All of it together, and three more prompts, for which the host tier has to make room.
    more = [Ask(prompt, 4) for prompt in prompts.batch(910, [600, 500, 400])]
    counted.add(more, engine.call(metrics_tools.run, more))
    end = scrape(engine)
    assert end["kvbm_requests_total"] == counted.requests
    assert end["kvbm_prompt_tokens_total"] == counted.prompt
    assert end["kvbm_device_tokens_total"] == counted.device
    assert end["kvbm_matched_tokens"] == counted.external
    assert end["kvbm_tier_used_blocks host"] == HOST
    assert end["kvbm_evicted_blocks_total host"] > 0
    assert end["kvbm_offload_blocks_d2d"] == 0
    failed = [value for name, value in end.items() if name.startswith("kvbm_failed_blocks_total")]
    assert (len(failed), sum(failed)) == (4 * 5, 0)
    assert all(end[f"kvbm_queued_blocks {edge}"] == 0 for edge in ("offload", "onboard", "write", "read"))
    assert end["kvbm_saved_prefill_seconds_total"] > 0

    # vLLM's own metrics say the same.
    own: Values = engine.call(metrics_tools.vllm_values)
    assert own == {
        "vllm:kvbm_saved_tokens_total host": end["kvbm_saved_tokens_total host"],
        "vllm:kvbm_saved_tokens_total disk": end["kvbm_saved_tokens_total disk"],
        "vllm:kvbm_saved_prefill_seconds_total": pytest.approx(end["kvbm_saved_prefill_seconds_total"]),
        **{
            f"vllm:kvbm_{theirs}_total {edge}": pytest.approx(end[f"{ours} {edge}"])
            for edge in ("offload", "onboard", "write", "read")
            for theirs, ours in (
                ("moved_bytes", "kvbm_moved_bytes_total"),
                ("transfer_seconds", "kvbm_transfer_seconds_sum"),
                ("transfers", "kvbm_transfer_seconds_count"),
            )
        },
        "vllm:kvbm_evicted_blocks_total host": end["kvbm_evicted_blocks_total host"],
        "vllm:kvbm_hit_rate host": pytest.approx(end["kvbm_host_cache_hit_rate"]),
        "vllm:kvbm_hit_rate disk": pytest.approx(end["kvbm_disk_cache_hit_rate"]),
        "vllm:kvbm_usage host": 1.0,
        "vllm:kvbm_usage disk": end["kvbm_tier_used_blocks disk"] / 256,
    }
    engine.call(metrics_tools.log_now)
    line = f"KVBM tokens from host={from_host}, from disk={from_disk}, GB offloaded="
    assert f"KV Transfer metrics: {line}" in engine.log()


def test_failed_loads_are_counted_by_reason(engine: Engine, prompts: Prompts) -> None:
    ask = Ask(prompts.make(920, 100))
    engine.call(metrics_tools.run, [ask])
    before = scrape(engine)
    engine.call(scenarios.corrupt, ask.prompt, 2)
    ran: Ran = engine.call(scenarios.run_again, [ask])
    after = scrape(engine)

    def rise(name: str) -> float:
        return after[name] - before[name]

    assert rise("kvbm_failed_blocks_total onboard corrupt") == 1
    assert rise("kvbm_saved_tokens_total host") == 2 * BLOCK_SIZE
    assert len(ran.tokens[0]) == ask.max_tokens
    own = engine.call(metrics_tools.vllm_values)
    assert own["vllm:kvbm_failed_blocks_total onboard"] == 1


# ---- what vLLM is handed, without an engine


class FakeMetric:
    """As prometheus_client's and Ray's are used."""

    made: list["FakeMetric"]

    def __init__(self, name: str, documentation: str, labelnames: list[str], **options: Any) -> None:
        self.name, self.labelnames, self.options = name, labelnames, options
        self.values: dict[tuple[Any, ...], float] = {}
        self.made.append(self)

    def labels(self, *values: Any) -> Any:
        assert len(values) == len(self.labelnames)
        metric = self

        class Child:
            def inc(self, value: float) -> None:
                metric.values[values] = metric.values.get(values, 0) + value

            def set(self, value: float) -> None:
                metric.values[values] = value

        return Child()


@pytest.fixture
def prom() -> tuple[KvbmPromMetrics, dict[str, FakeMetric]]:
    from types import SimpleNamespace

    from prometheus_client import Counter, Gauge, Histogram

    FakeMetric.made = []
    types: dict[Any, Any] = dict.fromkeys((Counter, Gauge, Histogram), FakeMetric)
    config = SimpleNamespace(kv_transfer_config=None)
    engines: dict[int, list[object]] = {0: ["model", "0"], 1: ["model", "1"]}
    made = DynamoConnector.build_prom_metrics(config, types, ["model_name", "engine"], engines)
    return made, {metric.name: metric for metric in FakeMetric.made}


def test_engines_are_told_apart(prom: tuple[KvbmPromMetrics, dict[str, FakeMetric]]) -> None:
    made, metrics = prom
    made.observe({"saved_tokens:host": 64, "saved_prefill_seconds": 0.5, "usage:host": 0.25}, 0)
    made.observe({"saved_tokens:host": 32, "usage:host": 0.5}, 1)
    made.observe({"saved_tokens:host": 32, "usage:host": 0.75, "unknown:x": 1}, 1)
    assert metrics["vllm:kvbm_saved_tokens_total"].values == {
        ("model", "0", "host"): 64,
        ("model", "1", "host"): 64,
    }
    assert metrics["vllm:kvbm_saved_prefill_seconds_total"].values == {("model", "0"): 0.5}
    assert metrics["vllm:kvbm_usage"].values == {("model", "0", "host"): 0.25, ("model", "1", "host"): 0.75}
    assert all(name.startswith("vllm:kvbm_") for name in metrics)
    assert len(metrics) == len(stats.COUNTERS) + len(stats.GAUGES)


def test_an_error_of_metrics_does_not_reach_vllm(prom: tuple[KvbmPromMetrics, dict[str, FakeMetric]]) -> None:
    made, metrics = prom
    made.observe({"saved_tokens:host": 1}, engine_idx=7)
    made.observe({"saved_tokens:host": 1})
    assert metrics["vllm:kvbm_saved_tokens_total"].values == {}

    class Broken:
        @property
        def stats(self) -> Any:
            raise RuntimeError("injected")

        disk = None
        not_cached: dict[str, int] = {}  # noqa: RUF012

    broken: Any = Broken()
    source = StatsSource(broken, broken, 1, 1)
    assert source.take() is source.take() is None


def test_stats_add_up() -> None:
    total = DynamoConnector.build_kv_connector_stats()
    assert total.is_empty()
    total.aggregate(KvbmStats({"saved_tokens:host": 64, "hit_rate:host": 0.5, "moved_bytes:offload": 3e9}))
    total.aggregate(
        DynamoConnector.build_kv_connector_stats({"saved_tokens:host": 32, "hit_rate:host": 0.75})
    )
    assert total.data == {"saved_tokens:host": 96, "hit_rate:host": 0.75, "moved_bytes:offload": 3e9}
    line = total.reduce()
    assert line["KVBM tokens from host"] == 96
    assert line["GB offloaded"] == 3.0
    assert line["host hit rate"] == 0.75
    assert "failed blocks" not in line
    total.aggregate(KvbmStats({"failed_blocks:read": 2, "failed_blocks:write": 1}))
    assert total.reduce()["failed blocks"] == 3
    total.reset()
    assert total.is_empty()


@pytest.mark.parametrize("name", ["DynamoConnector", "KvbmConnector"])
def test_inside_a_multi_connector(name: str) -> None:
    """There vLLM finds a connector by its name alone, when it logs what came from another process."""
    assert KVConnectorFactory.get_connector_class_by_name(name).__name__ == name

    def received(data: Values) -> Any:
        # Before 0.30 the whole object is sent, not its data.
        sent = data if hasattr(KVConnectorStats, "to_dict") else {"data": data}
        return MultiConnector.build_kv_connector_stats({name: sent})

    joined = received({"saved_tokens:host": 64}).aggregate(received({"saved_tokens:host": 32}))
    assert joined.data[name].data == {"saved_tokens:host": 96}
