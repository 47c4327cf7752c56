"""What the HTTP server answers, and what it refuses in which words."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from kvbm.observe.server import Server
from tests.unit.http_tools import (
    BLOCK,
    DISK,
    HOST,
    HOST_BYTES,
    ORDERS,
    PREFIX,
    TOKEN,
    Engine,
    From,
    ask,
    observe_config,
)

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

from kvbm.observe.api import MAX_BODY_BYTES  # noqa: E402
from kvbm.observe.schema import MAX_TOKENS  # noqa: E402


@pytest.fixture
def engine() -> Engine:
    engine = Engine()
    assert engine.run("first", PREFIX) == 0
    assert engine.run("second/one", [*PREFIX, *range(BLOCK)]) == 5
    return engine


@pytest.fixture
def server(engine: Engine) -> Iterator[Server]:
    server = Server(engine.admin, observe_config(admin_token=TOKEN))
    yield server
    server.close()


# ---- what is answered


def test_status(server: Server, engine: Engine) -> None:
    code, status = ask(server.port, "/api/status")
    assert code == 200
    assert (status["engine"], status["ready"], status["off_reason"]) == ("engine-1", True, None)
    assert status["block_size"] == BLOCK
    assert status["tiers"][0] == {
        "tier": "host",
        "blocks": HOST,
        "usable": HOST,
        "registered": 6,
        "free": HOST - 6,
        "evicted": 0,
        "bytes": HOST * HOST_BYTES,
        "used_bytes": 6 * HOST_BYTES,
    }
    assert [(tier["tier"], tier["blocks"]) for tier in status["tiers"]] == [("host", HOST), ("disk", DISK)]
    edges = {edge["edge"]: edge for edge in status["edges"]}
    assert list(edges) == ["offload", "onboard", "write", "read"]
    assert edges["onboard"]["blocks"] == 5
    assert edges["onboard"]["bytes"] == 5 * HOST_BYTES
    assert status["hit_rates"] == {"host": 5 / 11, "disk": 0.0}
    assert status["totals"]["saved_tokens"] == 5 * BLOCK
    assert status["misses"] == {"never seen": 2}
    engine.leader.off_reason = "rank 0 is ill"
    _, status = ask(server.port, "/api/status")
    assert (status["ready"], status["off_reason"]) == (False, "rank 0 is ill")


def test_requests(server: Server) -> None:
    code, answer = ask(server.port, "/api/requests")
    assert code == 200
    assert [request["id"] for request in answer["requests"]] == ["second/one", "first"]
    assert answer["requests"][0]["host_tokens"] == 5 * BLOCK
    _, one = ask(server.port, "/api/requests?limit=1")
    assert one["requests"] == answer["requests"][:1]
    for path in ("second/one", "second%2Fone", "sec"):
        assert ask(server.port, f"/api/requests/{path}") == (200, answer["requests"][0])


@pytest.mark.parametrize("path", ["third", "", "%00", "first/x"])
def test_a_request_that_nobody_knows(server: Server, path: str) -> None:
    code, answer = ask(server.port, f"/api/requests/{path}")
    assert code == 404
    assert "No request" in answer["detail"]


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "1.5", "9" * 5000])
def test_limits_of_the_list(server: Server, limit: str) -> None:
    code, answer = ask(server.port, f"/api/requests?limit={limit}")
    assert code == 422
    assert answer["detail"].startswith("limit: ")
    assert answer["fields"][0]["field"] == "limit"


def test_the_cache_in_the_hands_of_an_operator(server: Server, engine: Engine) -> None:
    port = server.port
    assert ask(port, "/api/pin", {"tokens": PREFIX, "ttl_s": 60}) == (200, {"pin": "pin-1", "blocks": 5})
    assert ask(port, "/api/status")[1]["pinned"] == 5
    assert ask(port, "/api/pins/pin-1", method="DELETE") == (200, {"released_blocks": 5})
    assert ask(port, "/api/clear", {"tier": "host"}) == (200, {"cleared_blocks": 6})
    code, answer = ask(port, "/api/prefetch", {"tokens": PREFIX})
    assert (code, answer["reading_blocks"]) == (200, 5)
    while engine.step():
        pass
    assert ask(port, "/api/status")[1]["tiers"][0]["registered"] == 5
    assert ask(port, "/api/resize", {"tier": "host", "blocks": 4}) == (200, {"blocks": 4})
    host = ask(port, "/api/status")[1]["tiers"][0]
    assert (host["usable"], host["blocks"]) == (4, HOST)
    assert ask(port, "/api/clear", {}) == (200, {"cleared_blocks": host["registered"] + 6})
    assert engine.leader.off_reason is None


def test_a_salt_is_cleared_alone(server: Server, engine: Engine) -> None:
    engine.run("third", PREFIX, salt="blue")
    code, answer = ask(server.port, "/api/clear", {"salt": "blue"})
    assert (code, answer["cleared_blocks"]) == (200, 2 * 5)
    assert engine.run("fourth", PREFIX) == 5


def test_a_pin_ends_with_its_time(server: Server, engine: Engine) -> None:
    ask(server.port, "/api/pin", {"tokens": PREFIX, "ttl_s": 60})
    engine.step(seconds=61)
    code, answer = ask(server.port, "/api/pins/pin-1", method="DELETE")
    assert code == 404
    assert "pin-1" in answer["detail"]


def test_metrics(server: Server) -> None:
    code, text = ask(server.port, "/metrics")
    assert code == 200
    assert "# TYPE kvbm_matched_tokens" in text
    assert ask(server.port, "/metrics", headers={"Accept": "application/openmetrics-text"})[1].endswith(
        "# EOF\n"
    )


def test_the_page_and_what_it_may_do() -> None:
    client = From()
    code, page = client.ask("GET", "/")
    assert code == 200
    assert page.startswith("<!doctype html>")
    policy = client.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "innerHTML" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


# ---- what is refused


@pytest.mark.parametrize(
    ("path", "body", "code", "words"),
    [
        ("clear", {"tier": "tape"}, 422, "tier: "),
        ("clear", {"tiers": "host"}, 422, "tiers: "),
        ("clear", {"tier": "host", "salt": "a"}, 400, "either tier or salt"),
        ("clear", {"salt": 5}, 422, "salt: "),
        ("clear", {"salt": "x" * 5000}, 422, "salt: "),
        ("clear", [], 422, "body: "),
        ("clear", b"", 422, "body: "),
        ("clear", b"{", 422, "JSON"),
        ("clear", b'{"salt": "\\ud800"}', 422, "body: "),
        ("clear", b"\xff\xfe", 422, "body: "),
        ("clear", b"[" * 100_000, 422, "body: "),
        ("resize", {"tier": "host", "blocks": HOST + 1}, 400, f"{HOST} blocks"),
        ("resize", {"tier": "host", "blocks": 0}, 422, "blocks: "),
        ("resize", {"tier": "host", "blocks": 1.5}, 422, "blocks: "),
        ("resize", {"tier": "host", "blocks": 10**400}, 400, f"{HOST} blocks"),
        ("resize", {"tier": "host"}, 422, "blocks: "),
        ("pin", {"tokens": PREFIX, "ttl_s": 0}, 422, "ttl_s: "),
        ("pin", {"tokens": PREFIX, "ttl_s": 86401}, 422, "ttl_s: "),
        ("pin", b'{"tokens": [1, 2, 3, 4], "ttl_s": NaN}', 422, "ttl_s: "),
        ("pin", b'{"tokens": [1, 2, 3, 4], "ttl_s": 1e999}', 422, "ttl_s: "),
        ("pin", {"tokens": PREFIX[:3], "ttl_s": 1}, 400, "whole block"),
        ("pin", {"tokens": [7] * 8, "ttl_s": 1}, 409, "holds nothing"),
        ("pin", {"tokens": [], "ttl_s": 1}, 422, "tokens: "),
        ("pin", {"tokens": [1, 2**32], "ttl_s": 1}, 422, "tokens[1]: "),
        ("pin", {"tokens": [-1], "ttl_s": 1}, 422, "tokens[0]: "),
        ("pin", {"tokens": ["1"], "ttl_s": 1}, 422, "tokens[0]: "),
        ("pin", {"tokens": [True], "ttl_s": 1}, 422, "tokens[0]: "),
        ("pin", {"tokens": "1234", "ttl_s": 1}, 422, "tokens: "),
        ("prefetch", {"tokens": [1] * (MAX_TOKENS + 1)}, 422, "tokens: "),
        ("prefetch", {"tokens": ["x"] * 100_000}, 422, "tokens[0]: "),
    ],
)
def test_bad_bodies(server: Server, engine: Engine, path: str, body: Any, code: int, words: str) -> None:
    before = ask(server.port, "/api/status")
    status, answer = ask(server.port, f"/api/{path}", body)
    assert status == code
    assert words in answer["detail"]
    assert answer["detail"].endswith(".")
    assert ("fields" in answer) == (code == 422)
    assert len(json.dumps(answer)) < 5000
    assert ask(server.port, "/api/status") == before


def test_without_a_disk_tier() -> None:
    client = From(admin=Engine(disk=0).admin)
    assert client.ask("POST", "/api/prefetch", {"tokens": PREFIX})[0] == 409
    code, answer = client.ask("POST", "/api/clear", {"tier": "disk"})
    assert code == 400
    assert "There is no tier 'disk' here" in answer["detail"]


def test_when_caching_is_off(engine: Engine) -> None:
    engine.leader.off_reason = "rank 0 is ill"
    client = From(admin=engine.admin)
    for path, body in ORDERS.items():
        code, answer = client.ask("POST", f"/api/{path}", body)
        assert code == 409
        assert "rank 0 is ill" in answer["detail"]


def test_unknown_routes_and_methods(server: Server) -> None:
    for path in ("/nothing", "/api", "/api/status/", "/docs", "/redoc", "//", "/api/pins/"):
        code, answer = ask(server.port, path)
        assert code == 404, path
        assert "/openapi.json" in answer["detail"]
    for path, method in (("/api/status", "POST"), ("/", "PUT"), ("/api/pin", "GET"), ("/metrics", "DELETE")):
        code, answer = ask(server.port, path, {} if method == "POST" else None, method=method)
        assert code == 405, path
        assert method in answer["detail"]


def test_a_body_must_be_called_json(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        code, answer = ask(server.port, "/api/clear", {}, {"Content-Type": kind})
        assert code == 415
        assert "application/json" in answer["detail"]
    assert ask(server.port, "/api/clear", {}, {"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


def test_a_body_that_is_too_large(server: Server) -> None:
    code, answer = ask(server.port, "/api/prefetch", b" " * (MAX_BODY_BYTES + 1))
    assert code == 413
    assert "16,000,000" in answer["detail"]
    chunks = (b"x" * 1_000_000 for _ in range(20))
    answer = httpx.post(
        f"http://127.0.0.1:{server.port}/api/clear",
        content=chunks,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413
    assert ask(server.port, "/api/prefetch", {"tokens": [2**32 - 1] * MAX_TOKENS})[0] == 200


def test_what_is_no_http(server: Server) -> None:
    for garbage in (
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET \xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port or 0)) as client:
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(1000)
            assert not answer.startswith(b"HTTP/1.1 5")
    assert ask(server.port, "/api/status")[0] == 200
