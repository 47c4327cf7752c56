"""The HTTP server's life: ports, packages, errors, its end. The engine never hears of any of it."""

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kvbm.observe import server as server_module
from kvbm.observe.server import PORTS, Server
from tests.unit.http_tools import Nothing, ask, observe_config

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")


def test_a_taken_port(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as other, caplog.at_level(logging.INFO):
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        first = Server(Nothing(), observe_config(port=taken))
        second = Server(Nothing(), observe_config(port=taken))
        assert first.port is not None
        assert second.port is not None
        assert taken < first.port < second.port < taken + PORTS
        assert ask(first.port, "/api/status")[0] == ask(second.port, "/api/status")[0] == 200
        first.close()
        second.close()
    assert f"http://127.0.0.1:{first.port}; port {taken} is taken" in caplog.text


def test_no_port_is_free(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(server_module, "PORTS", 1)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = Server(Nothing(), observe_config(port=other.getsockname()[1]))
    assert server.port is None
    assert "are taken" in caplog.text
    server.close()


def test_an_address_of_another_machine(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(Nothing(), observe_config(host="192.0.2.1"))
    assert server.port is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "KVBM_METRICS_HOST" in caplog.text
    server.close()


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(server_module, "_PACKAGES", ("fastapi", "no_such_package"))
    server = Server(Nothing(), observe_config())
    assert server.port is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pip install no-such-package" in caplog.text
    server.close()


def test_a_package_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "kvbm.observe.api", None)
    server = Server(Nothing(), observe_config())
    assert server.port is not None
    end = time.monotonic() + 10
    while any(thread.name == "kvbm-http" for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.01)
    server.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port))
    assert "the engine goes on" in caplog.text


def test_close_is_quick_and_frees_the_port() -> None:
    server = Server(Nothing(), observe_config())
    with httpx.Client() as client:  # its connection stays open
        assert client.get(f"http://127.0.0.1:{server.port}/api/status").status_code == 200
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < 2.0
    server.close()
    again = Server(Nothing(), observe_config(port=server.port))
    assert again.port == server.port
    again.close()


def test_close_before_it_serves() -> None:
    started = time.monotonic()
    server = Server(Nothing(), observe_config())
    server.close()
    assert time.monotonic() - started < 3.5
    assert not [thread for thread in threading.enumerate() if thread.name == "kvbm-http"]


def test_an_error_inside_is_no_end(caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("something private")

    server = Server(Nothing(requests=fail, clear=fail), observe_config())
    for path, body in (("/api/requests", None), ("/api/clear", {})):
        code, answer = ask(server.port, path, body)
        assert code == 500
        assert "private" not in answer["detail"]
    assert ask(server.port, "/api/status")[0] == 200
    assert "KVBM: internal error at /api/requests" in caplog.text
    server.close()


def test_slow_answers_keep_nobody_waiting() -> None:
    go_on = threading.Event()
    server = Server(Nothing(requests=lambda limit: go_on.wait(20) and []), observe_config())
    ask(server.port, "/api/status")
    waiting = [threading.Thread(target=ask, args=(server.port, "/api/requests")) for _ in range(3)]
    for thread in waiting:
        thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    assert ask(server.port, "/api/status")[0] == 200
    assert time.monotonic() - started < 2.0
    go_on.set()
    for thread in waiting:
        thread.join()
    server.close()


def test_close_does_not_wait_for_an_answer_that_never_comes() -> None:
    go_on = threading.Event()
    server = Server(Nothing(requests=lambda limit: go_on.wait(60) and []), observe_config())
    ask(server.port, "/api/status")

    def client() -> None:
        with contextlib.suppress(Exception):
            ask(server.port, "/api/requests")

    thread = threading.Thread(target=client)
    thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    server.close()
    assert time.monotonic() - started < 3.5
    go_on.set()
    thread.join()


SCRIPT = """
import os, signal, sys
from tests.unit.http_tools import Nothing, ask, observe_config
from kvbm.observe.server import Server
server = Server(Nothing(requests=lambda limit: __import__("time").sleep(60)), observe_config())
print(server.port, flush=True)
if sys.argv[1] == "exit":
    ask(server.port, "/api/status")
    sys.exit(0)
signal.pause()
"""


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_the_process_ends_when_it_wants_to(how: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    port = int(process.stdout.readline())
    if how == "kill":
        assert ask(port, "/api/status")[0] == 200
        process.terminate()
    assert process.wait(15) == (0 if how == "exit" else -15)
    process.stdout.close()
