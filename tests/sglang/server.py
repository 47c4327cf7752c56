"""SGLang's HTTP server, started like the engines of `harness`."""

import contextlib
import json
import os
import signal
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.engine.events_tools import free_ports
from tests.engine.harness import START_S, EngineError
from tests.sglang import harness
from tests.sglang.conftest import ENV

_KEY = "administrator"


class Server:
    """options: of `sglang.launch_server`, beside those of the harness. Ready when made."""

    def __init__(self, model: Path, **options: Any) -> None:
        port, _ = free_ports()
        self._address = f"http://127.0.0.1:{port}"
        mine = {"model_path": str(model), "port": port, "admin_api_key": _KEY, "skip_server_warmup": True}
        file, name = tempfile.mkstemp(prefix="sglang-server-", suffix=".log")
        os.close(file)
        self._log = Path(name)
        arguments = (name, ENV, {**harness.OPTIONS, **mine, **options})
        self._process = harness.context.Process(target=_serve, args=arguments, daemon=False)
        self._process.start()
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                if self.ask("GET", "/health")[0] == 200:
                    return
            if time.monotonic() > end or not self._process.is_alive():
                self.close()
                raise EngineError(f"the server does not start\n{self._log.read_text()[-6000:]}")
            time.sleep(0.1)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of the answer."""
        request = urllib.request.Request(
            self._address + path,
            method=method,
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {_KEY}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group of its own
        self._process.join(10)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._log.unlink(missing_ok=True)


def _serve(log: str, env: dict[str, str], options: dict[str, Any]) -> None:
    harness.become_engine(log, env)
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    launch_server(ServerArgs(**options))
