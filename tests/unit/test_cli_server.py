"""The clients of the command line against the engine's own server, over an admin that is made up."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kvbm.cli import main
from kvbm.config import load_config
from kvbm.logic.edges import Edge
from kvbm.observe.measurements import EdgeState, Measurements, TierState
from kvbm.observe.requests import HitRate, Totals

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

REQUEST = {
    "id": "chat/1-0",
    "at": 1_700_000_000.0,
    "finished": True,
    "prompt_tokens": 4096,
    "device_tokens": 1024,
    "host_tokens": 2048,
    "disk_tokens": 0,
    "failed_tokens": 16,
    "computed_tokens": 1024,
    "saved_seconds": 0.25,
    "missed_block": 192,
    "reason": "evicted",
    "explanation": "Block 192 was missed: it was evicted from the host tier 2.0 s before.",
}


class Admin:
    def __init__(self) -> None:
        self.url = ""
        self.cleared: list[tuple[str | None, str | None]] = []

    def measure(self) -> Measurements:
        return Measurements(
            engine="vllm 0.32.0",
            block_size=16,
            ready=True,
            off_reason=None,
            disk_off_reason=None,
            tiers=[TierState("host", 1000, 900, 500, 400, 12345, 2 << 20)],
            edges=[EdgeState("offload", Edge(), 2 << 20, 3, {})],
            totals=Totals(requests=7, prompt_tokens=8192),
            host_rate=HitRate(1, 2),
            disk_rate=HitRate(),
            pinned=5,
        )

    def requests(self, limit: int) -> list[dict[str, Any]]:
        return [REQUEST] * min(limit, 3)

    def request(self, request_id: str) -> dict[str, Any] | None:
        return REQUEST if str(REQUEST["id"]).startswith(request_id) else None

    def misses(self) -> dict[str, int]:
        return {"evicted": 2}

    def clear(self, tier: str | None = None, salt: str | None = None) -> int:
        self.cleared.append((tier, salt))
        return 1


@pytest.fixture(scope="module")
def admin() -> Iterator[Admin]:
    from kvbm.observe.server import Server

    admin: Any = Admin()  # without what the command line has no commands for
    observe = load_config(environ={}, observe={"port": 0, "host": "127.0.0.1"}).observe
    server = Server(admin, observe)
    admin.url = f"http://127.0.0.1:{server.port}"
    yield admin
    server.close()


def run(capsys: pytest.CaptureFixture[str], admin: Admin, *argv: str) -> tuple[int, str]:
    code = main.main([*argv, "--url", admin.url])
    out, err = capsys.readouterr()
    return code, out or err


def test_status(capsys: pytest.CaptureFixture[str], admin: Admin) -> None:
    code, out = run(capsys, admin, "status")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "vllm 0.32.0: caching"
    assert lines[2].split()[:4] == ["tier", "blocks", "usable", "registered"]
    assert lines[3].split()[:4] == ["host", "1,000", "900", "500"]
    assert "2.1 GB" in lines[3]
    assert "hit rates: host 50.0 %, disk 0.0 %" in out
    assert "misses: evicted 2" in out
    assert "pinned: 5" in out
    assert "declined" not in out
    code, out = run(capsys, admin, "status", "--json")
    assert json.loads(out)["tiers"][0]["usable"] == 900


def test_explain(capsys: pytest.CaptureFixture[str], admin: Admin) -> None:
    code, out = run(capsys, admin, "explain", "chat/1")
    assert code == 0
    assert out.startswith("request chat/1-0, 2023-11-1")
    assert "that failed to load" in out
    assert out.endswith(f"\n{REQUEST['explanation']}\n")
    assert json.loads(run(capsys, admin, "explain", "chat/1", "--json")[1]) == REQUEST
    assert len(run(capsys, admin, "explain", "--limit", "2")[1].splitlines()) == 3
    code, out = run(capsys, admin, "explain", "nobody")
    assert code == 1
    assert out.startswith("kvbm: No request 'nobody' is known, or no longer; `kvbm explain` without")


def test_clear(capsys: pytest.CaptureFixture[str], admin: Admin) -> None:
    assert run(capsys, admin, "clear", "--tier", "host") == (0, "Dropped 1 block from host memory.\n")
    assert run(capsys, admin, "clear", "--salt", "me")[0] == 0
    assert run(capsys, admin, "clear")[0] == 0
    assert admin.cleared == [("host", None), (None, "me"), (None, None)]


def test_server_refuses_what_it_does_not_take(capsys: pytest.CaptureFixture[str], admin: Admin) -> None:
    code, out = run(capsys, admin, "clear", "--salt", "x" * 5000)
    assert code == 1
    assert out.startswith(f"kvbm: {admin.url} answered 422: salt:")
