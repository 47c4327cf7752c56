"""An HTTP app over a real leader with both tiers, whose ranks do at once what they are told."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvbm.config import load_config
from kvbm.logic.operations import Completion, Direction
from kvbm.observe.measurements import Measurements
from kvbm.runtime.admin import Admin
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import WorkerReport
from kvbm.runtime.observer import Observer
from kvbm.settings import ObserveConfig

HOST, DISK, BLOCK = 32, 64, 4
HOST_BYTES, DISK_BYTES = 4096, 8192
PREFIX = list(range(100, 100 + 5 * BLOCK))
TOKEN = "correct horse battery"


class Engine:
    """One rank. leader, admin: over `disk` slots of disk, none for 0."""

    def __init__(self, disk: int = DISK, ready: bool = True, **settings: Any) -> None:
        self.now = 5000.0
        config = load_config(
            environ={},
            **{
                "host__num_blocks": HOST,
                "disk__num_blocks": disk,
                "disk__disable_filter": True,
                "disk__skip_slow_loads": False,
                "observe__metrics": True,
                **settings,
            },
        )
        self.observer = Observer(config.observe, BLOCK, engine="engine-1")
        self.leader = Leader(
            config,
            namespace=b"n" * 16,
            block_size=BLOCK,
            num_slots=HOST,
            ranks=1,
            disk_slots=disk,
            disk_record_bytes=DISK_BYTES,
            observer=self.observer,
            clock=lambda: self.now,
        )
        self.admin = Admin(self.leader, self.observer, block_bytes=HOST_BYTES, disk_block_bytes=DISK_BYTES)
        if ready:
            nothing = (np.empty(0, np.int32), np.empty((0, 2), np.uint64))
            self.leader.receive([WorkerReport(0, HOST, HOST, found=nothing, found_all=True)])
            self.step()

    def step(self, seconds: float = 0.01) -> list[Direction]:
        """A step of the engine in which all orders are executed; of which kinds they were."""
        self.now += seconds
        self.leader.tick()
        operations = self.leader.take_orders().operations
        done = [Completion(operation.id, np.empty(0, np.int32)) for operation in operations]
        if done:
            self.leader.receive([WorkerReport(0, HOST, HOST, completions=done)])
        return [operation.direction for operation in operations]

    def run(self, id_: str, tokens: list[int], salt: str | None = None) -> int:
        """A request from its arrival to its end; how many of its blocks were loaded."""
        leader, blocks = self.leader, len(tokens) // BLOCK
        table = list(range(blocks))
        leader.start(id_, salt=salt, prompt_tokens=len(tokens))
        hasher = leader.hasher(id_)
        assert hasher is not None
        hasher.extend(tokens)
        while (loaded := leader.match(id_, 0, blocks)) is None:
            self.step()
        leader.answered(id_, 0, loaded, blocks)
        if loaded:
            leader.load(id_, 0, loaded, table)
        else:
            leader.set_table(id_, table)
        self.step()
        leader.store([(id_, blocks)])
        self.step()
        leader.finish(id_, blocks, table)
        leader.ended(id_, hasher, 1)
        while self.step():
            pass
        return loaded


class Nothing:
    """An admin of a cache in which nothing happens. Its answers may be replaced by what raises or waits."""

    def __init__(self, **answers: Any) -> None:
        for name, answer in answers.items():
            setattr(self, name, answer)
        self._engine = Engine()

    def measure(self) -> Measurements:
        return self._engine.admin.measure()

    def requests(self, limit: int) -> list[dict[str, Any]]:
        return []

    def request(self, request_id: str) -> dict[str, Any] | None:
        return None

    def misses(self) -> dict[str, int]:
        return {}

    def clear(self, tier: str | None = None, salt: str | None = None) -> int:
        return 0

    def new_weights(self, version: str | None = None) -> str:
        return version or "unnamed"

    def resize(self, tier: str, blocks: int) -> int:
        return blocks

    def pin(self, tokens: list[int], ttl_s: float, salt: str | None = None) -> tuple[str, int]:
        return "pin-1", len(tokens) // BLOCK

    def unpin(self, name: str) -> int:
        return 1

    def prefetch(self, tokens: list[int], salt: str | None = None) -> tuple[int, int]:
        return 0, 0


ORDERS = {
    "clear": {"tier": None, "salt": None},
    "weights": {"version": "step 7"},
    "resize": {"tier": "host", "blocks": HOST},
    "pin": {"tokens": PREFIX, "ttl_s": 10},
    "prefetch": {"tokens": PREFIX},
}


def observe_config(**settings: Any) -> ObserveConfig:
    return ObserveConfig(**{"metrics": True, "host": "127.0.0.1", "port": 0, **settings})


def ask(
    port: int | None, path: str, body: Any = None, headers: Mapping[str, str] | None = None, **more: Any
) -> tuple[int, Any]:
    """Status and body, as JSON where it is, of a server on this machine."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    usual = {"Content-Type": "application/json"} if data is not None else {}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data, {**usual, **(headers or {})}, **more
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            status, kind, content = answer.status, answer.headers["content-type"], answer.read()
    except urllib.error.HTTPError as error:
        status, kind, content = error.code, error.headers["content-type"], error.read()
    return status, json.loads(content) if kind == "application/json" else content.decode()


class From:
    """A client with a peer address and headers of its own, of an app without sockets."""

    def __init__(
        self, peer: str | None = "127.0.0.1", admin: Any = None, token: str | None = TOKEN, **headers: str
    ) -> None:
        from kvbm.observe.api import make_app

        self._app: Any = make_app(admin or Nothing(), token)
        self._peer = peer
        self._headers = {"host": "127.0.0.1:6880", **headers}

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        import anyio
        import httpx

        async def answer() -> Any:
            client: Any = (self._peer, 1234) if self._peer else None
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False, client=client)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
                content = json.dumps(body).encode() if body is not None else None
                kind = {"content-type": "application/json"} if body is not None else {}
                return await http.request(
                    method, path, content=content, headers={**kind, **self._headers, **headers}
                )

        response = anyio.run(answer)
        self.headers = response.headers
        kind = response.headers.get("content-type", "")
        return response.status_code, response.json() if kind == "application/json" else response.text
