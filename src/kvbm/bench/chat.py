"""Several long chats on one small device cache, with KVBM and without, side by side.

Starts vLLM's OpenAI server twice, one after the other: first as it is, then with KVBM as its KV connector.
Each server holds the same conversations, turn by turn in rotation, so that the device cache has dropped a
conversation by the time its next turn comes. Without KVBM vLLM computes the whole prompt again; with KVBM the
dropped blocks come back from host memory. One row a turn shows where the prompt's tokens came from and the
time to the first token. The replies must be the same in both runs.

    kvbm bench chat [--conversations 6] [--turns 3] [--cpu-cache-gb 1] [--model DIR] [--json FILE]

Exit status: 0 all well; 1 replies differ, KVBM served nothing, or a server failed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from kvbm.bench.conversations import Conversation, make_conversation
from kvbm.bench.report import make_parser, words, write_figures

DEFAULT_MODEL = Path(".models/SmolLM2-135M-Instruct")  # where scripts/demo.sh puts it in a checkout
CONNECTOR = {
    "kv_connector": "DynamoConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "kvbm.vllm_integration.connector",
}
SERVED_NAME = "chat"
REPLY_TOKENS = 48
START_DEADLINE_S = 600
STOP_DEADLINE_S = 10
REQUEST_DEADLINE_S = 300
EXTERNAL_HITS = re.compile(r"^vllm:external_prefix_cache_hits_total(?:\{.*\})? (\S+)$", re.MULTILINE)

Message = dict[str, str]
# No proxy: the servers listen on this machine only.
HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DemoError(Exception):
    """Something the person at the terminal should read; no traceback."""


# ---- the server -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What to serve with: on a CPU small and exact, on a GPU longer texts and the model's own dtype."""

    name: str
    exact: bool  # greedy replies can be compared token by token
    block_size: int
    max_model_len: int
    register_size: int
    note_size: int
    server_args: tuple[str, ...]

    @property
    def device_blocks(self) -> int:
        """One longest request and a little: too small for the conversations together."""
        return self.max_model_len // self.block_size + 4


CPU = Machine("CPU, float32", True, 32, 4096, 16, 4, ("--dtype", "float32", "--enforce-eager"))
GPU = Machine("GPU", False, 16, 8192, 75, 6, ("--gpu-memory-utilization", "0.8"))


def detect_machine() -> Machine:
    """Asked in a process of its own: a parent with a CUDA context would hold device memory."""
    code = (
        "import importlib.util as u, torch; print(u.find_spec('vllm') is not None, torch.cuda.is_available())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if not answer.stdout.startswith("True"):
        raise DemoError(
            f"vLLM or torch is missing in {sys.executable}. Install vLLM there; in a checkout of KVBM "
            f"'bash scripts/demo.sh' does."
        )
    return GPU if answer.stdout.split()[1] == "True" else CPU


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def server_env(cpu_cache_gb: float, scratch: Path) -> dict[str, str]:
    env = dict(os.environ, HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", PYTHONUNBUFFERED="1")
    env |= {"TMPDIR": str(scratch), "DYN_KVBM_CPU_CACHE_GB": f"{cpu_cache_gb:g}"}
    # OpenMP threads that spin at barriers stall when other work wants the same cores: let them sleep.
    env.setdefault("OMP_NUM_THREADS", str(min(8, len(os.sched_getaffinity(0)))))
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return env


class Server:
    """One vLLM server in a process group of its own; leaving the `with` block ends the whole group.

    A guard process does the killing: it waits on a pipe that closes when this script ends, however it ends.
    """

    def __init__(self, label: str, args: list[str], env: dict[str, str], log: Path) -> None:
        self.label, self.log = label, log
        self.port = free_port()
        self._command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *args]
        self._command += ["--host", "127.0.0.1", "--port", str(self.port)]
        self._env = env

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["sh", "-c", 'read -r _; kill -s KILL -- "-$0" 2>/dev/null', str(self._process.pid)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def get(self, path: str, timeout_s: float = 30) -> str:
        with HTTP.open(f"http://127.0.0.1:{self.port}{path}", timeout=timeout_s) as response:
            return str(response.read().decode())

    def _wait_until_ready(self) -> None:
        started = time.monotonic()
        while (waited := time.monotonic() - started) < START_DEADLINE_S:
            if self._process.poll() is not None:
                raise self.failure(f"ended with status {self._process.returncode} while starting")
            with contextlib.suppress(OSError):
                self.get("/health", timeout_s=5)
                show(f"{self.label}: server ready after {waited:.0f} s", last=True)
                return
            show(f"{self.label}: starting the server, {waited:.0f} s")
            time.sleep(1)
        raise self.failure(f"did not answer within {START_DEADLINE_S} s")

    def failure(self, what: str) -> DemoError:
        """What went wrong, the end of the server's log, and a hint."""
        lines = self.log.read_text(errors="replace").splitlines()
        hint = diagnose("\n".join(lines))
        tail = "\n".join("  | " + line[:200] for line in lines[-25:])
        return DemoError(f"{self.label}: the server {what}. The end of its log ({self.log}):\n{tail}\n{hint}")

    def _stop(self) -> None:
        """SIGTERM for the server, then SIGKILL, by the guard, for whatever of its group is left."""
        try:
            self._process.terminate()
            self._process.wait(timeout=STOP_DEADLINE_S)
            for _ in range(30):  # vLLM's resource tracker removes its shared memory after the server's end
                os.killpg(self._process.pid, 0)
                time.sleep(0.1)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            pass
        finally:
            self._guard.communicate()
            self._process.kill()
            self._process.wait()


HINTS = (
    (r"No module named '?kvbm", "kvbm is not installed for this Python: pip install kvbm."),
    (r"No module named '?(\w+)", "A Python package is missing: install it beside vLLM."),
    (r"out of memory|Free memory on device", "The GPU has too little free memory: stop what else uses it."),
    (r"Cannot allocate memory|MemoryError", "Too little memory: the demonstration needs about 4 GB free."),
    (r"No space left", "The disk (or /dev/shm) is full: make room, or pass a smaller --cpu-cache-gb."),
    (r"config\.json|Repo id|not a valid model", "The model's folder is not complete."),
)


def diagnose(log: str) -> str:
    for pattern, hint in HINTS:
        if re.search(pattern, log):
            return hint
    return "The log above says why."


# ---- one turn ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    conversation: int
    turn: int
    prompt_tokens: int
    device_tokens: int
    kvbm_tokens: int
    ttft_s: float
    reply: str

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.device_tokens - self.kvbm_tokens


def chat(server: Server, messages: list[Message], max_tokens: int) -> tuple[str, dict[str, Any], float]:
    """One streamed request: the reply, the server's token usage, the time to the first token."""
    body = {
        "model": SERVED_NAME,
        "messages": messages,
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    reply, ttft = "", 0.0
    usage: dict[str, Any] = {}
    started = time.perf_counter()
    try:
        with HTTP.open(request, timeout=REQUEST_DEADLINE_S) as response:
            for event in events(response):
                if "error" in event:
                    raise server.failure(f"answered with an error: {event['error']}")
                usage = event.get("usage") or usage
                text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                ttft = ttft or (time.perf_counter() - started if text else 0.0)
                reply += text
    except urllib.error.HTTPError as error:
        raise server.failure(
            f"answered {error.code}: {error.read()[:300].decode(errors='replace')}"
        ) from error
    except OSError as error:
        raise server.failure(f"stopped answering: {error}") from error
    if not usage:
        raise server.failure("ended a reply early")
    return reply, usage, ttft or time.perf_counter() - started


def events(response: Any) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[len(b"data: ") :])


def external_hits(server: Server) -> int:
    return int(sum(float(value) for value in EXTERNAL_HITS.findall(server.get("/metrics"))))


def take_turn(server: Server, conversation: int, turn: int, messages: list[Message]) -> Turn:
    hits_before = external_hits(server)
    reply, usage, ttft = chat(server, messages, REPLY_TOKENS)
    kvbm = external_hits(server) - hits_before
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Turn(conversation, turn, usage["prompt_tokens"], cached - kvbm, kvbm, ttft, reply)


def hold(server: Server, conversations: list[Conversation], script: list[Turn] | None) -> Iterator[Turn]:
    """All turns in rotation, one request at a time. With a script, its replies make the history, so that
    both servers are asked exactly the same."""
    chat(server, [{"role": "user", "content": "Hello!"}], 4)  # the first request ever pays for lazy set-up
    histories: list[list[Message]] = [[{"role": "system", "content": item.system}] for item in conversations]
    scripted = iter(script or ())
    for turn in range(len(conversations[0].says)):
        for index, (conversation, history) in enumerate(zip(conversations, histories, strict=True)):
            history.append({"role": "user", "content": conversation.says[turn]})
            result = take_turn(server, index + 1, turn + 1, history)
            yield result
            history.append({"role": "assistant", "content": next(scripted, result).reply})


# ---- what is shown ----------------------------------------------------------------------------------------


def show(text: str, last: bool = False) -> None:
    """A progress line: rewritten in place on a terminal, only its last state elsewhere."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{text}", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


HEADER = """
                              ---------------- with KVBM ----------------   ---- without -----
conversation  turn   prompt   device     KVBM  computed      TTFT   reply    device       TTFT"""


def print_row(with_kvbm: Turn, without: Turn) -> None:
    same = "same" if with_kvbm.reply == without.reply else "DIFF"
    print(
        f"{with_kvbm.conversation:>12}{with_kvbm.turn:>6}{with_kvbm.prompt_tokens:>9}{with_kvbm.device_tokens:>9}"
        f"{with_kvbm.kvbm_tokens:>9}{with_kvbm.computed_tokens:>10}{with_kvbm.ttft_s:>8.2f} s{same:>8}"
        f"{without.device_tokens:>10}{without.ttft_s:>9.2f} s",
        flush=True,
    )


def total(turns: list[Turn], field: str) -> Any:
    return sum(getattr(turn, field) for turn in turns)


def summarize(without: list[Turn], with_kvbm: list[Turn]) -> dict[str, Any]:
    later = [pair for pair in zip(with_kvbm, without, strict=True) if pair[0].turn > 1]
    medians = [statistics.median(turn.ttft_s for turn in side) for side in zip(*later, strict=True)] or [
        None,
        None,
    ]
    return {
        "prompt_tokens": total(with_kvbm, "prompt_tokens"),
        "tokens_from_kvbm": total(with_kvbm, "kvbm_tokens"),
        "tokens_computed": {
            side: total(turns, "computed_tokens") for side, turns in sides(with_kvbm, without)
        },
        "first_token_wait_s": {side: total(turns, "ttft_s") for side, turns in sides(with_kvbm, without)},
        "ttft_median_from_turn_2_s": {"with": medians[0], "without": medians[1]},
        "replies_equal": sum(a.reply == b.reply for a, b in zip(with_kvbm, without, strict=True)),
        "replies": len(with_kvbm),
    }


def sides(with_kvbm: list[Turn], without: list[Turn]) -> tuple[tuple[str, list[Turn]], ...]:
    return ("with", with_kvbm), ("without", without)


def print_summary(summary: dict[str, Any], sample: Turn, asked: str) -> None:
    computed, wait = summary["tokens_computed"], summary["first_token_wait_s"]
    median = summary["ttft_median_from_turn_2_s"]
    prompt, kvbm = summary["prompt_tokens"], summary["tokens_from_kvbm"]
    print(f'\nOne of the exchanges (with a very small model): "{asked}"\n  -> {sample.reply.strip()!r}\n')
    print(
        f"tokens to compute, of {prompt} in prompts: {computed['without']} without KVBM, "
        f"{computed['with']} with it ({kvbm} came from KVBM)"
    )
    print(f"waiting for first tokens, all turns: {wait['without']:.1f} s without, {wait['with']:.1f} s with")
    if median["with"]:
        print(
            f"time to first token from turn 2 on, median: {median['without']:.2f} s without, "
            f"{median['with']:.2f} s with: {median['without'] / median['with']:.1f} times as long without"
        )


def verdict(summary: dict[str, Any], exact: bool) -> int:
    equal, replies = summary["replies_equal"], summary["replies"]
    if not summary["tokens_from_kvbm"]:
        print("FAILED: KVBM served no token.")
        return 1
    if equal == replies:
        print(f"OK: all {replies} replies are the same with KVBM and without.")
        return 0
    if exact:
        print(f"FAILED: {replies - equal} of {replies} replies differ between the two runs.")
        return 1
    print(f"{equal} of {replies} replies are the same; the others may differ by rounding in this dtype.")
    return 0


# ---- the run ----------------------------------------------------------------------------------------------


def serving_args(machine: Machine, model: Path) -> list[str]:
    return [
        *("--model", str(model), "--served-model-name", SERVED_NAME),
        *("--max-model-len", str(machine.max_model_len), "--block-size", str(machine.block_size)),
        *("--num-gpu-blocks-override", str(machine.device_blocks), "--enable-prompt-tokens-details"),
        *machine.server_args,
    ]


def run(options: argparse.Namespace, logs: Path) -> tuple[int, dict[str, Any]]:
    """The exit status and the figures."""
    machine = detect_machine()
    if not (options.model / "config.json").is_file():
        raise DemoError(
            f"no model in {options.model}. Name a chat model's folder with --model; in a checkout of KVBM "
            f"'python scripts/prepare_model.py' makes a small one."
        )
    conversations = [
        make_conversation(index, options.turns, machine.register_size, machine.note_size)
        for index in range(options.conversations)
    ]
    count = options.conversations * options.turns
    args, env = serving_args(machine, options.model), server_env(options.cpu_cache_gb, logs)
    cache = f"{machine.device_blocks * machine.block_size} tokens"
    chats = f"{options.conversations} conversations of {options.turns} turns"
    print(f"{chats}, {options.model.name} on {machine.name}.")
    print(f"Device cache {cache}, KVBM's host cache {options.cpu_cache_gb:g} GB.")
    without: list[Turn] = []
    with Server("without KVBM", args, env, logs / "without-kvbm.log") as server:
        for turn in hold(server, conversations, None):
            without.append(turn)
            done = len(without) == count
            show(
                f"without KVBM: turn {len(without)} of {count}, first token after {turn.ttft_s:.2f} s",
                last=done,
            )
    with_kvbm: list[Turn] = []
    args += ["--kv-transfer-config", options.kv_transfer_config]
    with Server("with KVBM", args, env, logs / "with-kvbm.log") as server:
        print(HEADER, flush=True)
        for turn, reference in zip(hold(server, conversations, without), without, strict=True):
            with_kvbm.append(turn)
            print_row(turn, reference)
    summary = summarize(without, with_kvbm)
    print_summary(summary, with_kvbm[0], conversations[0].says[0])
    report: dict[str, Any] = {"machine": machine.name, "summary": summary}
    report |= {side: [asdict(turn) for turn in turns] for side, turns in sides(with_kvbm, without)}
    return verdict(summary, machine.exact), report


def parse_options(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = make_parser(__doc__, prog)
    parser.add_argument("--conversations", type=int, default=6, help="how many in rotation (default 6)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each conversation (default 3)")
    parser.add_argument(
        "--cpu-cache-gb", type=float, default=1.0, help="KVBM's host memory in GB (default 1)"
    )
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, help=f"a chat model's folder (default {DEFAULT_MODEL})"
    )
    parser.add_argument("--kv-transfer-config", default=json.dumps(CONNECTOR), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.conversations < 1 or options.turns < 1 or options.cpu_cache_gb <= 0:
        parser.error("--conversations, --turns and --cpu-cache-gb must be positive")
    return options


def stop_on_signal(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = parse_options(argv, prog)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop_on_signal)
    logs = Path(tempfile.mkdtemp(prefix="kvbm-chat-"))
    keep_logs = False
    try:
        with words(options.json):
            status, report = run(options, logs)
        keep_logs = status != 0
        write_figures(report, options.json)
        return status
    except DemoError as error:
        keep_logs = any(logs.iterdir())
        print(f"\nFAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; the servers are stopped.", file=sys.stderr)
        return 130
    finally:
        if keep_logs:
            print(f"The servers' logs are in {logs}.", file=sys.stderr)
        else:
            shutil.rmtree(logs, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
