"""What an engine's metrics say, seen from outside. What has `llm` as first argument runs in its process."""

import urllib.request
from collections.abc import Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.engine import scenarios
from tests.engine.disk_tools import wait_ready
from tests.engine.harness import Engine
from tests.engine.scenarios import Ask, Ran

Values = dict[str, float]
"""By name, and label values in the order of their names: `kvbm_saved_tokens_total host`."""


def port(llm: Any) -> int:
    return scenarios.side(llm).server.port


def scrape(engine: Engine) -> Values:
    """What GET /metrics answers."""
    url = f"http://127.0.0.1:{engine.call(port)}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    return {
        " ".join([sample.name, *(sample.labels[name] for name in sorted(sample.labels))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def vllm_values(llm: Any) -> Values:
    """KVBM's in vLLM's own registry, by name and our label."""
    from prometheus_client import REGISTRY

    values = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith("vllm:kvbm") and not sample.name.endswith("_created"):
                own = [value for name, value in sample.labels.items() if name not in ("engine", "model_name")]
                values[" ".join([sample.name, *own])] = sample.value
    return values


def run(llm: Any, asks: Sequence[Ask]) -> Ran:
    wait_ready(llm)
    return scenarios.run(llm, asks)


def clear_host(llm: Any) -> None:
    scenarios.drain(llm)
    scenarios.leader(llm)._planner.clear()


def log_now(llm: Any) -> None:
    """What vLLM's server does every ten seconds."""
    llm.llm_engine.do_log_stats()
