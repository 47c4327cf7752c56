"""What changes while SGLang runs: the storage backend, and the weights."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.sglang.conftest import Expect, write_model
from tests.sglang.harness import Engine, extra_config, flush, linker, storage
from tests.sglang.prompts import disk, prompts
from tests.sglang.router import TOPIC, Router
from tests.sglang.server import Server
from tests.sglang.test_linker import stored as stored_by_linker
from tests.sglang.test_storage import stored

ASKS = prompts(50, 400, 200)

# In the engine's process. SGLang refuses these while it has requests, and that is so for a moment after their
# answers: `flush` waits for the end of it.


def attach(engine: Any, config: str) -> tuple[bool, str]:
    flush(engine)
    answer = engine.tokenizer_manager.attach_hicache_storage("dynamic", config, "wait_complete")
    out = engine.loop.run_until_complete(answer)
    return out.success, out.message


def detach(engine: Any) -> bool:
    flush(engine)
    return engine.loop.run_until_complete(engine.tokenizer_manager.detach_hicache_storage()).success


def clear(engine: Any) -> bool:
    return engine.loop.run_until_complete(engine.tokenizer_manager.clear_hicache_storage()).success


def update_weights(engine: Any, folder: str) -> bool:
    flush(engine)
    return engine.update_weights_from_disk(folder)[0]


def test_attached_cleared_and_detached(keen: Path, expect: Expect, tmp_path: Path) -> None:
    want = expect(ASKS)
    options = storage({})
    for name in ("hicache_storage_backend", "hicache_storage_backend_extra_config"):
        del options[name]
    address = f"ipc://{tmp_path}/events"
    config = extra_config(disk(tmp_path), kv_events={"endpoint": address, "topic": TOPIC})
    with Engine(keen, **options) as engine, Router(address) as router:
        assert engine.run(ASKS).tokens == want
        ok, message = engine.call(attach, extra_config({"disk": {"size_gb": 3}}))
        assert not ok
        assert "size_gb" in message
        assert engine.call(attach, config)[0]
        router.wait_connected()
        stored(engine, ASKS, want)
        _, events = router.receive()
        assert events[0]["type"] == "BlockStored"
        assert engine.call(clear)
        assert engine.run_anew(ASKS).storage == [0] * len(ASKS)
        stored(engine, ASKS, want)
        assert engine.call(detach)
        ran = engine.run_anew(ASKS)
        assert (ran.tokens, ran.storage) == (want, [0, 0])
        assert engine.call(attach, config)[0]
        ran = stored(engine, ASKS, want)
    assert ran.host == [0, 0]


def test_over_http(keen: Path) -> None:
    """As in docs/sglang.md."""
    options = storage({})
    for name in ("hicache_storage_backend", "hicache_storage_backend_extra_config"):
        del options[name]
    backend = {
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config_json": extra_config({"host": {"num_blocks": 100}}),
    }
    ask = {"input_ids": list(ASKS[0]), "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    path = "/hicache/storage-backend"
    with Server(keen, **options) as server:

        def until_ok(method: str, path: str, body: dict[str, Any] | None = None) -> str:
            """SGLang refuses these for a moment after an answer."""
            end = time.monotonic() + 20
            while (answer := server.ask(method, path, body))[0] != 200:
                assert time.monotonic() < end, answer
            return answer[1]

        def cached() -> dict[str, Any]:
            until_ok("POST", "/flush_cache")
            told = json.loads(server.ask("POST", "/generate", ask)[1])["meta_info"]
            return told["cached_tokens_details"] or {}

        assert cached() == {}
        until_ok("PUT", path, backend)
        assert '"class_name\\": \\"KvbmStorage' in until_ok("GET", path)
        end = time.monotonic() + 20
        while (told := cached()).get("storage") != 384:
            assert time.monotonic() < end, told
        assert told["storage_backend"] == "KvbmStorage"
        until_ok("POST", f"{path}/clear")
        assert cached().get("storage", 0) == 0
        until_ok("DELETE", path)
        assert "storage" not in cached()


@pytest.mark.parametrize("way", ["storage", "linker"])
def test_other_weights(way: str, keen: Path, plain: Engine, expect: Expect, tmp_path: Path) -> None:
    """SGLang forgets its own tiers then, and ours are told by the way."""
    other = write_model(tmp_path / "other", seed=2)
    old = expect(ASKS)
    assert plain.call(update_weights, str(other))
    new = expect(ASKS)
    assert plain.call(update_weights, str(keen))
    assert old == expect(ASKS) != new
    ask = {"storage": stored, "linker": stored_by_linker}[way]
    options = {"storage": storage, "linker": linker}[way](disk(tmp_path))
    with Engine(keen, **options) as engine:
        ask(engine, ASKS, old)
        assert engine.call(update_weights, str(other))
        ran = engine.run_anew(ASKS)
        assert (ran.tokens, ran.storage, ran.host) == (new, [0, 0], [0, 0])
        ask(engine, ASKS, new)
        assert engine.call(update_weights, str(keen))
        ran = engine.run_anew(ASKS)
        assert (ran.tokens, ran.storage, ran.host) == (old, [0, 0], [0, 0])
