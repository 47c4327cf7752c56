"""What is deployed to look at metrics: the files agree with each other, and with the metrics there are."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from kvbm.observe import metrics
from tests.unit.made_up import measurements

yaml = pytest.importorskip("yaml")

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "kvbm.json").read_text())
# What Grafana puts in their place.
VARIABLES = {"$engine": ".*", "$__rate_interval": "1m", "$__range": "30m", "${datasource}": "prometheus"}


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def as_sent(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query


def exposed() -> set[str]:
    """Names of all series that an engine with both tiers exposes."""
    body, _ = metrics.render(measurements(), {}, "")
    return {re.split(r"[{ ]", line)[0] for line in body.decode().splitlines() if not line.startswith("#")}


def used(query: str) -> set[str]:
    return set(re.findall(r"\bkvbm_\w+", query))


def test_every_metric_of_the_dashboard_exists() -> None:
    asked = set().union(*map(used, queries()))
    assert asked
    assert asked <= exposed()
    variables = {item["name"]: item for item in DASHBOARD["templating"]["list"]}
    assert used(variables["engine"]["query"]["query"]) <= exposed()


def test_every_metric_is_on_the_dashboard() -> None:
    """But those whose numbers others show as well: NVIDIA's counters are for NVIDIA's dashboards."""
    shown = set().union(*map(used, queries()))
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    theirs = {definition.name for definition in metrics.ALL if definition.kind == "untyped"}
    assert {definition.name for definition in metrics.ALL} - theirs <= names


def test_every_query_is_of_the_chosen_engines() -> None:
    for query in queries():
        assert query.count('{instance=~"$engine"}') == len(re.findall(r"\bkvbm_\w+", query))


def test_layout() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


def test_files_name_each_other() -> None:
    compose = load("docker-compose.yml")
    services = compose["services"]
    source = load("grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    chosen = DASHBOARD["templating"]["list"][0]
    assert (chosen["name"], chosen["query"], chosen["current"]["value"]) == (
        "datasource",
        source["type"],
        source["uid"],
    )
    address = urllib.parse.urlsplit(source["url"])
    assert address.hostname in services
    assert any(port.endswith(f":{address.port}") for port in services["prometheus"]["ports"])

    provider = load("grafana/provisioning/dashboards/kvbm.yml")["providers"][0]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    for service in services.values():
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"])
        for volume in service["volumes"]:
            path = volume.split(":")[0]
            assert (FOLDER / path).exists() if path.startswith(".") else path in compose["volumes"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/kvbm.json"


def test_prometheus_scrapes_the_default_port_of_this_machine() -> None:
    [job] = load("prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["host.docker.internal:6880"]}]
    assert load("docker-compose.yml")["services"]["prometheus"]["extra_hosts"] == [
        "host.docker.internal:host-gateway"
    ]


# ---- with Prometheus itself (Debian's package `prometheus`), where it is installed


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (apt-get install prometheus)")
    return found


def test_promtool_accepts_the_configuration() -> None:
    ran = subprocess.run(
        [tool("promtool"), "check", "config", str(FOLDER / "prometheus.yml")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_promtool_accepts_the_metrics() -> None:
    body, _ = metrics.render(measurements(), {}, "")
    ran = subprocess.run([tool("promtool"), "check", "metrics"], input=body, capture_output=True, timeout=60)
    assert ran.returncode == 0, ran.stderr.decode()


class _Engine(BaseHTTPRequestHandler):
    """Answers like an engine that works: the counters rise from scrape to scrape."""

    scrapes = 0

    def do_GET(self) -> None:
        type(self).scrapes += 1
        made_up = measurements()
        for edge in made_up.edges:
            for _ in range(self.scrapes):
                edge.done.done(100, 1, 0.03)
            edge.failures = {"error": self.scrapes}
        totals = made_up.totals
        for name in ("requests", "prompt_tokens", "device_tokens", "host_tokens", "disk_tokens", "saved_s"):
            setattr(totals, name, getattr(totals, name) + 1000 * self.scrapes)
        body, content_type = metrics.render(made_up, {"evicted": 3}, self.headers.get("Accept", ""))
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real one, with the configuration that is deployed but for the target's address and the interval."""
    program = tool("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Engine)
    Thread(target=server.serve_forever, daemon=True).start()
    config = load("prometheus.yml")
    config["global"]["scrape_interval"] = "200ms"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.server_port}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = _free_port()
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log,
        stderr=log,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while _Engine.scrapes < 6:
            if time.monotonic() > end or process.poll() is not None:
                pytest.fail(f"Prometheus does not scrape:\n{(folder / 'log').read_text()}")
            time.sleep(0.1)
        time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(20)
        server.shutdown()
        log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _get(url: str, **query: str) -> Any:
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=20) as answer:
        return json.load(answer)["data"]


def test_prometheus_takes_the_metrics(prometheus: str) -> None:
    [target] = _get(f"{prometheus}/api/v1/targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert exposed() <= set(_get(f"{prometheus}/api/v1/label/__name__/values"))
    kinds = _get(f"{prometheus}/api/v1/metadata")
    for definition in metrics.ALL:
        # OpenMetrics, which Prometheus asks for, names families without the ending.
        name = definition.name.removesuffix("_total").removesuffix("_info")
        [entry] = kinds[name]
        assert entry["type"] == {"untyped": "unknown"}.get(definition.kind, definition.kind)
        assert entry["help"] == definition.help


@pytest.mark.parametrize(
    ("title", "query"),
    [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]],
)
def test_every_panel_shows_something(prometheus: str, title: str, query: str) -> None:
    result = _get(f"{prometheus}/api/v1/query", query=as_sent(query))["result"]
    assert result, query
    assert all(series["value"][1] != "NaN" for series in result)


def test_the_engines_are_found(prometheus: str) -> None:
    """As Grafana's label_values does it."""
    found = _get(f"{prometheus}/api/v1/label/instance/values", **{"match[]": "kvbm_info"})
    assert len(found) == 1


# ---- with Grafana's own schema, where it is installed


def test_grafana_schema_keeps_every_key() -> None:
    """grafana-foundation-sdk drops what it doesn't know, and raises on what is of another type."""
    dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins.register_default_plugins()
    read = dashboard.Dashboard.from_json(DASHBOARD)
    again = json.loads(encoder.JSONEncoder().encode(read))
    assert _lost(DASHBOARD, again) == []


def _lost(before: Any, after: Any, path: str = "") -> list[str]:
    if isinstance(before, dict):
        return [
            entry
            for key, value in before.items()
            for entry in (_lost(value, after[key], f"{path}/{key}") if key in after else [f"{path}/{key}"])
        ]
    if isinstance(before, list):
        if len(before) != len(after):
            return [path]
        return [
            entry
            for i, (a, b) in enumerate(zip(before, after, strict=True))
            for entry in _lost(a, b, f"{path}/{i}")
        ]
    return [] if before == after else [path]
