"""A real SGLang engine on a CPU, driven from a test: tokenizer side, scheduler (one a rank) and detokenizer.

They are processes as in production, but forked from one that has imported SGLang already: an engine starts in
5 s instead of 20. Real are the scheduler, radix tree, HiCache controller, host pools, linker and model;
`cpu_plugin` stands in for the kernels that copy between device and host pool.
"""

import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engine import harness
from tests.engine.harness import clean_environ
from tests.sglang.conftest import ENV

PAGE = 16
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",  # in bfloat16 the outputs depend on the composition of the batch
    "page_size": PAGE,
    "max_total_tokens": 2048,
    "context_length": 1024,
    "max_running_requests": 8,
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "skip_tokenizer_init": True,
    "random_seed": 0,
    "log_level": "info",
}
_PRELOAD = [
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",  # imports all models
    "kvbm.sglang_integration.hicache",
    "kvbm.sglang_integration.linker",
]
context: Any = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(_PRELOAD)


@dataclass(frozen=True)
class Ran:
    """Outcome of some requests, in their order: tokens answered, and where those of the prompts came from."""

    tokens: list[list[int]]
    device: list[int]
    host: list[int]
    storage: list[int]


class Engine(harness.Engine):
    """options: keyword arguments of `sglang.Engine`, beside ours."""

    def __init__(self, model: Path, *, env: dict[str, str] | None = None, **options: Any) -> None:
        self._start({**ENV, **(env or {})}, str(model), {**OPTIONS, **options})

    def _start(self, env: dict[str, str], model: str | None, options: dict[str, Any]) -> None:
        self._connection, theirs = context.Pipe()
        file, name = tempfile.mkstemp(prefix="sglang-test-", suffix=".log")
        os.close(file)
        self._log = Path(name)
        self._process = context.Process(target=_child, args=(theirs, name, env, model, options), daemon=False)
        self._process.start()
        theirs.close()
        self._sent, self._received = 1, 0  # the child reports that it is ready
        self._results = {}
        self._ready = False

    def run(self, prompts: Sequence[Sequence[int]], *, max_tokens: int = 8, **more: Any) -> Ran:
        """All at once, greedily. more: keyword arguments of `Engine.generate`."""
        return self.call(_run, prompts, max_tokens, more)

    def flush(self) -> None:
        """SGLang forgets what it has in device and host memory."""
        self.call(flush)

    def run_anew(self, prompts: Sequence[Sequence[int]], **more: Any) -> Ran:
        self.flush()
        return self.run(prompts, **more)

    def __enter__(self) -> "Engine":
        return self


def storage(
    kvbm: dict[str, Any],
    layout: str = "page_first",
    io: str = "kernel",
    *,
    zero_copy: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Options of an engine with KVBM behind HiCache. more: in the extra config, beside our settings."""
    return {
        "enable_hierarchical_cache": True,
        "hicache_ratio": 2.0,
        "hicache_mem_layout": layout,
        "hicache_io_backend": io,
        "hicache_storage_prefetch_policy": "wait_complete",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": extra_config(kvbm, zero_copy=zero_copy, **more),
    }


def extra_config(kvbm: dict[str, Any], *, zero_copy: bool = True, **more: Any) -> str:
    config = {
        "backend_name": "kvbm",
        "module_path": "kvbm.sglang_integration.hicache",
        "class_name": "KvbmStorage",
        "prefetch_threshold": PAGE,
        "kvbm": kvbm,
        **({"interface_v1": 1} if zero_copy else {}),
        **more,
    }
    return json.dumps(config)


def linker(kvbm: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Options of an engine with KVBM's linker. more: beside our settings."""
    return {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "KvbmLinker",
            "linker_module_path": "kvbm.sglang_integration.linker",
            "linker_extra_config": {"kvbm": kvbm, **more},
        },
    }


# ---- in the child


def _run(engine: Any, prompts: Sequence[Sequence[int]], max_tokens: int, more: dict[str, Any]) -> Ran:
    answers = engine.generate(
        input_ids=[list(prompt) for prompt in prompts],
        sampling_params={"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True},
        **more,
    )
    told = [answer["meta_info"].get("cached_tokens_details") or {} for answer in answers]
    for answer, details in zip(answers, told, strict=True):
        counts = [count for count in details.values() if isinstance(count, int)]
        assert answer["meta_info"]["cached_tokens"] == sum(counts)
    return Ran(
        [list(answer["output_ids"]) for answer in answers],
        *([details.get(where, 0) for details in told] for where in ("device", "host", "storage")),
    )


def flush(engine: Any) -> None:
    waiting = engine.tokenizer_manager.flush_cache(timeout_s=30)  # until nothing is being stored
    assert engine.loop.run_until_complete(waiting).success


def _child(connection: Any, log: str, env: dict[str, str], model: str, options: dict[str, Any]) -> None:
    become_engine(log, env)
    try:
        engine = importlib.import_module("sglang").Engine(model_path=model, **options)
    except BaseException:
        connection.send((False, traceback.format_exc()))
        return
    connection.send((True, None))
    while (order := _receive(connection)) is not None:
        function, args = order
        try:
            connection.send((True, function(engine, *args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    engine.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _receive(connection: Any) -> Any:
    try:
        return connection.recv()
    except EOFError:
        return None


def become_engine(log: str, env: dict[str, str]) -> None:
    """Of a process that was forked for it: its own group, log and environment; SGLang may fork, too."""
    os.setpgrp()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    environ = clean_environ(env)
    os.environ.clear()
    os.environ.update(environ)
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None
