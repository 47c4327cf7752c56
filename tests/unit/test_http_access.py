"""Who may ask the HTTP server: this machine, and who has the token."""

import pytest

from tests.unit.http_tools import ORDERS, TOKEN, From

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")


@pytest.mark.parametrize(
    "peer", ["10.0.0.7", "192.168.1.2", "2001:db8::1", "::ffff:10.0.0.7", "not an address", None]
)
def test_another_machine_sees_the_metrics_only(peer: str | None) -> None:
    client = From(peer)
    assert client.ask("GET", "/metrics")[0] == 200
    for path in (
        "/",
        "/api/status",
        "/api/requests",
        "/openapi.json",
        "/nothing",
        "/metrics/",
        "/API/status",
    ):
        code, answer = client.ask("GET", path)
        assert code == 403, path
        assert "KVBM_ADMIN_TOKEN" in answer["detail"]
    for path, body in ORDERS.items():
        assert client.ask("POST", f"/api/{path}", body)[0] == 403
    assert client.ask("DELETE", "/api/pins/x")[0] == 403


def test_another_machine_with_the_token() -> None:
    client = From("10.0.0.7", host="gpu-7.example.com")
    assert client.ask("GET", "/api/status", authorization=f"bearer  {TOKEN} ")[0] == 200
    assert client.ask("POST", "/api/clear", {}, authorization=f"Bearer {TOKEN}")[0] == 200
    for wrong in (TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer "):
        assert client.ask("GET", "/api/status", authorization=wrong)[0] == 403


@pytest.mark.parametrize("token", [None, ""])
def test_without_a_token_nothing_lets_in(token: str | None) -> None:
    client = From("10.0.0.7", token=token)
    for sent in ("Bearer ", "Bearer", "Bearer None", ""):
        assert client.ask("GET", "/api/status", authorization=sent)[0] == 403
    assert From("127.0.0.1", token=token).ask("GET", "/api/status")[0] == 200


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:6880", "LOCALHOST", "[::1]:6880", "10.0.0.5:6880"])
def test_this_machine_needs_no_token(peer: str, host: str) -> None:
    client = From(peer, host=host)
    assert client.ask("GET", "/api/status")[0] == 200
    assert client.ask("POST", "/api/clear", {})[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", "", "[::1"]
)
def test_a_name_that_was_made_to_point_here(host: str) -> None:
    """DNS rebinding: a browser on this machine, a page of somebody else, our address under its name."""
    client = From("127.0.0.1", host=host)
    if host != "[::1":  # broken, but an address
        code, answer = client.ask("GET", "/api/status")
        assert code == 403
        assert repr(host) in answer["detail"]
        assert client.ask("POST", "/api/clear", {})[0] == 403
    assert client.ask("GET", "/metrics")[0] == 200
    assert client.ask("POST", "/api/clear", {}, authorization=f"Bearer {TOKEN}")[0] == 200


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded"])
def test_a_proxy_on_this_machine_lets_nobody_in(header: str) -> None:
    client = From("127.0.0.1", **{header: "127.0.0.1"})
    assert client.ask("GET", "/api/status")[0] == 403
    assert client.ask("GET", "/api/status", authorization=f"Bearer {TOKEN}")[0] == 200


def test_a_browser_without_access_gets_the_page_but_no_number() -> None:
    client = From("10.0.0.7")
    code, page = client.ask("GET", "/", accept="text/html,application/xhtml+xml")
    assert code == 403
    assert page.startswith("<!doctype html>")
    assert "content-security-policy" in client.headers
    assert client.ask("GET", "/api/status", accept="text/html")[0] == 403
