"""The command line: exit codes, what is printed, and the clients against a server that plays the engine's."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kvbm import __version__
from kvbm.cli import bench, main
from kvbm.cli.output import plain, print_table

TOKEN = "very secret words"
STATUS = {
    "engine": "vllm 0.32.0",
    "ready": True,
    "off_reason": None,
    "tiers": [
        {"tier": "host", "blocks": 1000, "registered": 900, "free": 100, "usable": 1000, "evicted": 12345},
        {"tier": "disk", "blocks": 20000, "registered": 7, "free": 19993, "usable": 20000, "evicted": 0},
    ],
    "edges": [
        {"edge": "offload", "blocks": 3000, "bytes": 6291456000, "failures": {"timeout": 1}, "operations": 40}
    ],
    "hit_rates": {"host": 0.5, "disk": 0.125},
    "uptime_s": 12.5,
    "misses": {"never_seen": 3},
    "pinned": 0,
    "disk_off_reason": None,
}
REQUEST = {
    "id": "chat/1",
    "at": 1_700_000_000.0,
    "prompt_tokens": 4096,
    "device_tokens": 1024,
    "host_tokens": 2048,
    "disk_tokens": 0,
    "computed_tokens": 1024,
    "missed_block": 192,
    "reason": "evicted",
    "explanation": "Block 192 was missed: it was evicted from the host tier 2.0 s before.",
}


class Engine(ThreadingHTTPServer):
    """The server of an engine. `answer` may be replaced; `seen` are method, path, body and token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen: list[tuple[str, str, Any, str | None]] = []
        self.answer: Callable[[str], tuple[int, bytes]] = self.usual

    def usual(self, path: str) -> tuple[int, bytes]:
        answers: dict[str, Any] = {
            "/api/status": STATUS,
            "/api/requests?limit=10": {"requests": [REQUEST]},
            "/api/requests?limit=2": {"requests": []},
            "/api/requests/chat%2F1": REQUEST,
            "/api/clear": {"cleared_blocks": 1234},
        }
        if path not in answers:
            return 404, json.dumps({"detail": "No request 'nobody' is known."}).encode()
        return 200, json.dumps(answers[path]).encode()


class Handler(BaseHTTPRequestHandler):
    server: Engine  # type: ignore[assignment]

    def do_GET(self) -> None:
        self.respond(None)

    def do_POST(self) -> None:
        self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def respond(self, body: Any) -> None:
        self.server.seen.append((self.command, self.path, body, self.headers["Authorization"]))
        code, content = self.server.answer(self.path)
        self.send_response(code)
        if code == 302:
            self.send_header("Location", content.decode())
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("DYN_KVBM", "KVBM"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = main.main(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    out, err = capsys.readouterr()
    return code, out, err


# ---- the command as such ----


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"kvbm {__version__}\n", "")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("doctor", "status", "explain", "simulate", "bench", "config", "clear", "weights"):
        assert command in out
        assert run(capsys, command, "--help")[0] == 0


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["cure"],
        ["status", "extra"],
        ["clear", "--tier", "moon"],
        ["explain", "--limit", "0"],
        ["bench", "x"],
    ],
)
def test_wrong_usage_is_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert "usage: kvbm" in err


def test_module_runs_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kvbm.cli.main import make_parser; make_parser(); "
        "print([name for name in ('numpy', 'torch', 'vllm') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    done = subprocess.run([sys.executable, "-m", "kvbm", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"kvbm {__version__}\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_goes_away_makes_no_traceback(unbuffered: str) -> None:
    command = f"({sys.executable} -m kvbm config; echo $? >&2) | true"
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    assert subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env).stderr == "1\n"


# ---- config ----


def test_config_shows_what_is_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_GB", "40")
    monkeypatch.setenv("DYN_KVBM_LEADER_ZMQ_HOST", "x")
    code, out, err = run(capsys, "config")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["setting", "value", "from"]
    assert lines[1].split() == ["host.cache_gb", "40.0", "environment", "DYN_KVBM_CPU_CACHE_GB"]
    assert "disk.dir" not in out
    assert "DYN_KVBM_LEADER_ZMQ_HOST is set, but" in out
    assert "off" not in out


def test_config_all_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "config", "--all", "--json")
    settings = json.loads(out)["settings"]
    assert code == 0
    assert settings["disk.dir"] == {"value": "/tmp", "source": "default"}
    assert settings["observe.admin_token"]["value"] is None
    assert "KVBM is off" in run(capsys, "config", "--all")[1]
    assert json.loads(run(capsys, "config", "--json")[1]) == {"settings": {}, "notices": []}


@pytest.mark.parametrize("options", [[], ["--all"], ["--json"], ["--all", "--json"]])
def test_config_keeps_the_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setenv("KVBM_ADMIN_TOKEN", TOKEN)
    code, out, err = run(capsys, "config", *options)
    assert code == 0
    assert TOKEN not in out + err
    (line,) = [line for line in out.replace('"', " ").splitlines() if "admin_token" in line]
    assert "set" in line or "value: set" in out.replace('"', "").replace(" :", ":")


@pytest.mark.parametrize("command", ["config", "status"])
def test_wrong_configuration_is_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("DYN_KVBM_CPU_CACHE_GB", "much")
    code, out, err = run(capsys, command)
    assert (code, out) == (2, "")
    assert err.startswith("kvbm: wrong KVBM configuration:")
    assert "Traceback" not in err


# ---- clients ----


def test_status(capsys: pytest.CaptureFixture[str], engine: Engine) -> None:
    code, out, _ = run(capsys, "status", "--url", engine.url)
    assert code == 0
    assert out.startswith("vllm 0.32.0: caching\n")
    assert "host   1,000         900" in out
    assert "offload   3,000  6.3 GB  timeout 1          40" in out
    assert "hit rates: host 50.0 %, disk 12.5 %" in out
    assert out.endswith(
        "uptime s: 12.5\nmisses: never seen 3\n"
    )  # what this client does not know of is shown too
    code, out, _ = run(capsys, "status", "--url", engine.url + "/", "--json")
    assert (code, json.loads(out)) == (0, STATUS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ready": False}, "still starting"),
        ({"ready": False, "off_reason": "more than one KV group"}, "caching is off: more than one KV group"),
        ({"ready": False, "tiers": None, "edges": [], "hit_rates": {"host": None}}, "hit rates: host none"),
    ],
)
def test_engine_that_does_not_cache_is_1(
    capsys: pytest.CaptureFixture[str], engine: Engine, change: dict[str, Any], words: str
) -> None:
    engine.answer = lambda path: (200, json.dumps(STATUS | change).encode())
    code, out, _ = run(capsys, "status", "--url", engine.url)
    assert code == 1
    assert words in out


def test_explain(capsys: pytest.CaptureFixture[str], engine: Engine) -> None:
    code, out, _ = run(capsys, "explain", "chat/1", "--url", engine.url)
    assert code == 0
    assert out.splitlines()[1].split() == ["tokens", "of", "the", "prompt", "4,096"]
    assert "loaded from host memory        2,048" in out
    assert out.endswith(REQUEST["explanation"] + "\n")
    code, out, _ = run(capsys, "explain", "chat/1", "--url", engine.url, "--json")
    assert json.loads(out) == REQUEST


def test_explain_lists_the_last_requests(capsys: pytest.CaptureFixture[str], engine: Engine) -> None:
    code, out, _ = run(capsys, "explain", "--url", engine.url)
    assert code == 0
    assert out.splitlines()[1].split()[0] == "chat/1"
    assert out.splitlines()[1].endswith("4,096   1,024  2,048     0     1,024  evicted")
    code, out, _ = run(capsys, "explain", "--url", engine.url, "--limit", "2")
    assert (code, out) == (0, "No request has come yet.\n")


def test_explain_of_an_unknown_request(capsys: pytest.CaptureFixture[str], engine: Engine) -> None:
    code, out, err = run(capsys, "explain", "nobody", "--url", engine.url)
    assert (code, out) == (1, "")
    assert err == (
        "kvbm: No request 'nobody' is known; `kvbm explain` without an id lists what is remembered.\n"
    )


def test_weights(capsys: pytest.CaptureFixture[str], engine: Engine) -> None:
    engine.answer = lambda path: (200, b'{"version": "step 7"}')
    assert run(capsys, "weights", "step 7", "--url", engine.url) == (0, "New weights: step 7.\n", "")
    assert "no name" in run(capsys, "weights", "--url", engine.url)[1]
    assert json.loads(run(capsys, "weights", "--url", engine.url, "--json")[1]) == {"version": "step 7"}
    assert [seen[:3] for seen in engine.seen[:2]] == [
        ("POST", "/api/weights", {"version": "step 7"}),
        ("POST", "/api/weights", {"version": None}),
    ]


def test_clear(capsys: pytest.CaptureFixture[str], engine: Engine) -> None:
    assert run(capsys, "clear", "--url", engine.url) == (0, "Dropped 1,234 blocks from all tiers.\n", "")
    assert run(capsys, "clear", "--url", engine.url, "--tier", "disk")[1].endswith("from disk.\n")
    assert run(capsys, "clear", "--url", engine.url, "--salt", "me") == (
        *(0, "Dropped 1,234 blocks with the salt 'me' from all tiers.\n", ""),
    )
    assert run(capsys, "clear", "--url", engine.url, "--salt", "me", "--tier", "disk")[0] == 2
    assert json.loads(run(capsys, "clear", "--url", engine.url, "--json")[1]) == {"cleared_blocks": 1234}
    assert [seen[:3] for seen in engine.seen[:3]] == [
        ("POST", "/api/clear", {"tier": None, "salt": None}),
        ("POST", "/api/clear", {"tier": "disk", "salt": None}),
        ("POST", "/api/clear", {"tier": None, "salt": "me"}),
    ]


def test_settings_name_port_and_token(
    capsys: pytest.CaptureFixture[str], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    monkeypatch.setenv("DYN_KVBM_METRICS_PORT", str(engine.server_port))
    assert run(capsys, "status")[0] == 0
    monkeypatch.setenv("KVBM_ADMIN_TOKEN", TOKEN)
    assert run(capsys, "status")[0] == 0
    assert run(capsys, "status", "--token", "other")[0] == 0
    assert [token for *_, token in engine.seen] == [None, f"Bearer {TOKEN}", "Bearer other"]


def test_token_is_not_sent_on(
    capsys: pytest.CaptureFixture[str], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = f"http://localhost:{engine.server_port}/api/requests?limit=2"
    engine.answer = lambda path: (302, elsewhere.encode()) if path == "/api/status" else engine.usual(path)
    run(capsys, "status", "--url", engine.url, "--token", TOKEN)
    assert [token for *_, token in engine.seen] == [f"Bearer {TOKEN}", None]


@pytest.mark.parametrize(
    ("code", "content", "words"),
    [
        (401, b"{}", "give --token"),
        (403, b'{"detail": "no"}', "KVBM_ADMIN_TOKEN"),
        (404, b"<html>", "Is it KVBM's server?"),
        (500, b'{"detail": "the leader is gone"}', "answered 500: the leader is gone"),
        (503, b"", "answered 503: Service Unavailable"),
        (200, b"<html>", "is not KVBM's server"),
        (200, b"[]", "is not KVBM's server"),
        (200, b"\xff\xfe", "is not KVBM's server"),
    ],
)
def test_server_that_refuses(
    capsys: pytest.CaptureFixture[str], engine: Engine, code: int, content: bytes, words: str
) -> None:
    engine.answer = lambda path: (code, content)
    for command in ("status", "explain", "clear", "weights"):
        status, out, err = run(capsys, command, "--url", engine.url, "--token", TOKEN, "--json")
        assert (status, out) == (1, "")
        assert words in err
        assert err.count("\n") == 1
        assert TOKEN not in err


def test_no_server(capsys: pytest.CaptureFixture[str], engine: Engine) -> None:
    url = "http://127.0.0.1:9"
    for command in ("status", "explain", "clear", "weights"):
        code, out, err = run(capsys, command, "--url", url)
        assert (code, out) == (1, "")
        assert f"No KVBM server answers at {url}" in err
        assert "DYN_KVBM_METRICS=1" in err
        assert err.count("\n") == 1
    assert run(capsys, "status", "--url", "no-such-host.invalid:1")[0] == 2
    assert run(capsys, "status", "--url", "http://[")[0] == 1
    assert run(capsys, "status", "--url", "http://127.0.0.1:port")[0] == 1


# ---- bench ----


def test_bench_hands_its_options_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[Any] = []

    class Benchmark:
        @staticmethod
        def main(argv: list[str], prog: str) -> int:
            handed.append((argv, prog))
            return 3

    monkeypatch.setattr(bench, "import_module", lambda name: handed.append(name) or Benchmark)
    assert run(capsys, "bench", "disk", "--dir", "/x", "--json", "-h")[0] == 3
    assert handed == ["kvbm.bench.disk", (["--dir", "/x", "--json", "-h"], "kvbm bench disk")]


def test_bench_without_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "kvbm.bench.copies", raising=False)
    code, out, err = run(capsys, "bench", "copies")
    assert (code, out) == (1, "")
    assert "needs the package torch" in err


def test_bench_disk_runs(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    small = ["bench", "disk", "--dir", str(tmp_path), "--restart", "100"]
    code, out, err = run(capsys, *small)
    assert (code, err) == (0, "")
    assert "100 records, written in" in out
    code, out, err = run(capsys, *small, "--json")
    assert json.loads(out)["records"] == 100
    assert "100 records, written in" in err
    run(capsys, *small, "--json", str(tmp_path / "figures.json"))
    assert json.loads((tmp_path / "figures.json").read_text())["records"] == 100
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    code, _, err = run(capsys, "bench", "disk", "--dir", str(tmp_path / "nowhere"))
    assert code == 2
    assert "there is no such directory" in err


# ---- printing ----


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "none"), (True, "yes"), (12345, "12,345"), (0.5, "0.5"), (2.0, "2"), ("x", "x")),
        *(({"a_b": 1, "b": [2, False]}, "a b 1, b 2, no"), ([], "none"), ({}, "none")),
    ],
)
def test_plain(value: Any, text: str) -> None:
    assert plain(value) == text


def test_table_puts_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("tier", "blocks"), [("host", 5), ("disk", 12345), ("far", None)])
    assert capsys.readouterr().out == "tier  blocks\nhost       5\ndisk  12,345\nfar     none\n"
