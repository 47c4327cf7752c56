"""The connector in vLLM's OpenAI server: several processes, nothing of ours in between."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import KVBM, clean_environ

READY_S = 240


class Server:
    def __init__(self, model: Path, folder: Path, *options: str, **env: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = folder / "server.log"
        environ = clean_environ({"DYN_KVBM_CPU_CACHE_GB": "0.5", "TMPDIR": str(folder), **env})
        del environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "512"]
        command += ["--num-gpu-blocks-override", "20", "--max-num-seqs", "4"]
        command += ["--kv-transfer-config", json.dumps(KVBM), *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environ, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )

    def wait_ready(self) -> None:
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(0.5)
        self.kill()
        pytest.fail(
            f"the server did not start:\n{self.log.read_text(errors='replace')[-6000:]}", pytrace=False
        )

    def get(self, path: str, body: Any = None, timeout: float = 120, **headers: str) -> str:
        data = None if body is None else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json", **headers}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read().decode()

    def chat(self, text: str, max_tokens: int = 12) -> str:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        return json.loads(self.get("/v1/chat/completions", body))["choices"][0]["message"]["content"]

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", self.get("/metrics"), re.MULTILINE)
        assert found, name
        return float(found[1])

    def processes(self) -> list[int]:
        """All of its processes: they are in its session."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(stat[3]) == self.process.pid and stat[0] != "Z":
                    found.append(int(entry.name))
        return found

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(model, tmp_path_factory.mktemp("server"))
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()


def listing() -> set[str]:
    """Entries by which something outlives a process."""
    return {str(path) for folder in ("/dev/shm", "/tmp") for path in Path(folder).iterdir()}


def ours(pid: int) -> list[str]:
    """Files of ours that a process has mapped or open."""
    found = set()
    try:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "kvbm" in line.partition("/")[2]:
                found.add("/" + line.partition("/")[2])
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if "kvbm" in (target := os.readlink(link)):
                found.add(target)
    except OSError:
        pass
    return sorted(found)


def test_chat_twice_with_others_in_between(server: Server) -> None:
    story = "Tell me what happened. " + " ".join(
        f"On day {day} Anna bought {day * 7} apples." for day in range(1, 15)
    )
    first = server.chat(story)
    for number in range(4):  # 19 device blocks hold two such prompts
        server.chat(f"{number} is a number. " + " ".join(f"{n * 37 + number}" for n in range(70)), 1)
    before = server.metric("vllm:external_prefix_cache_hits_total")
    second = server.chat(story)
    assert second == first
    assert len(first) > 5
    assert server.metric("vllm:external_prefix_cache_hits_total") >= before + 4 * 32


def test_nothing_remains_after_kill_9(server: Server, model: Path) -> None:
    """The host tier is memory without a name: it goes with the processes."""
    before = listing()
    processes = server.processes()
    assert len(processes) > 1  # server and engine
    held = [name for pid in processes for name in ours(pid) if not name.endswith((".so", ".py"))]
    assert held
    assert all(name.startswith("/memfd:kvbm") for name in held)
    server.kill()
    assert server.processes() == []
    assert {name for name in listing() - before if "kvbm" in name} == set()
    assert [name for name in listing() if "kvbm" in name.lower() and "host" in name] == []
    left = [str(path) for path in server.log.parent.rglob("*") if "kvbm" in path.name]
    assert left == []
