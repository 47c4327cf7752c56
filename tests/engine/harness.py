"""A real vLLM in a child process of its own, driven from a test.

The engine core runs inside the child (no further process), so that the functions of `scenarios`, which the
child executes, can reach vLLM's scheduler and both halves of the connector. Every call has a deadline; a
child that misses it is killed with all its processes, and the end of its log is in the error.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK_SIZE = 32  # the least that vLLM's CPU attention accepts
START_S = 240.0
CALL_S = 240.0

_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
KVBM = {
    "kv_connector": "DynamoConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "kvbm.vllm_integration.connector",
}
# float32: in bfloat16 the outputs depend on the composition of the batch, with or without a connector.
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": BLOCK_SIZE,
    "max_model_len": 1024,
    "num_gpu_blocks_override": 128,
    "max_num_seqs": 16,
    "disable_log_stats": False,
    "seed": 0,
}


class EngineError(Exception):
    """The child raised, died, or missed its deadline."""


class Engine:
    """One vLLM in one child. Starts at once; the first `call` waits until it is ready.

    env: of the child, besides ours. kvbm: None for an engine without connector, otherwise its
    kv_connector_extra_config. options: keyword arguments of `vllm.LLM`, and of `make_engine`.
    """

    def __init__(
        self,
        model: Path,
        *,
        kvbm: dict[str, Any] | None = None,
        env: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        if kvbm is not None:
            options["kv_transfer_config"] = {**KVBM, "kv_connector_extra_config": kvbm}
        self._start(env or {}, str(model), {**ENGINE, **options})

    def _start(self, env: dict[str, str], model: str | None, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        file, name = tempfile.mkstemp(prefix="engine-test-", suffix=".log")
        os.close(file)
        self._log = Path(name)
        self._process = context.Process(target=_child, args=(theirs, name, env, model, options), daemon=False)
        self._process.start()
        theirs.close()
        self._sent = self._received = 0
        self._results: dict[int, tuple[bool, Any]] = {}
        if model is not None:
            self._sent = 1  # the child reports that it is ready
        self._ready = model is None

    def call(self, function: Callable[..., Any], *args: Any, deadline_s: float = CALL_S) -> Any:
        """The result of `function(llm, *args)` in the child."""
        return self.begin(function, *args)(deadline_s)

    def begin(self, function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        """Start a call; the returned function waits for its result."""
        self.wait_ready()
        number = self._sent
        self._sent += 1
        self._connection.send((function, args))
        return lambda deadline_s=CALL_S: self._result(number, deadline_s, function.__name__)

    def wait_ready(self) -> None:
        if not self._ready:
            self._result(0, START_S, "start of the engine")
            self._ready = True

    def _result(self, number: int, deadline_s: float, what: str) -> Any:
        while number not in self._results:
            if not self._connection.poll(deadline_s):
                os.kill(self.pid, signal.SIGUSR1)  # stacks of all its threads to the log
                time.sleep(1.0)
                self.kill()
                raise EngineError(f"{what}: no answer in {deadline_s} s\n{self.log()}")
            try:
                self._results[self._received] = self._connection.recv()
            except (EOFError, ConnectionResetError):
                self.kill()
                raise EngineError(f"{what}: the engine's process died\n{self.log()}") from None
            self._received += 1
        ok, value = self._results.pop(number)
        if not ok:
            raise EngineError(f"{what}: {value}\n---- log\n{self.log()}")
        return value

    def log(self, size: int = 6000) -> str:
        """End of what the child has printed."""
        return self._log.read_text(errors="replace")[-size:]

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def close(self) -> None:
        try:
            self._connection.send(None)
            self._process.join(20)
        except OSError:
            pass
        self.kill()
        self._log.unlink(missing_ok=True)

    def kill(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)  # it leads a group of its own, see _child
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.join(10)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Child(Engine):
    """A child that has imported nothing yet: its functions get None for the engine."""

    def __init__(self, env: dict[str, str] | None = None) -> None:
        self._start(env or {}, None, {})


def clean_environ(env: dict[str, str]) -> dict[str, str]:
    """Environment of an engine: no setting of KVBM but those in `env`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("KVBM_", "DYN_KVBM_"))}
    path = os.pathsep.join(dict.fromkeys(entry for entry in sys.path if entry))
    return {**inherited, **_ENV, "PYTHONPATH": path, **env}


def _child(
    connection: Any, log: str, env: dict[str, str], model: str | None, options: dict[str, Any]
) -> None:
    os.setpgrp()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    environ = clean_environ(env)
    os.environ.clear()
    os.environ.update(environ)
    llm = None
    if model is not None:
        try:
            llm = make_engine(model, options)
        except BaseException:
            connection.send((False, traceback.format_exc()))
            return
        connection.send((True, None))
    while True:
        try:
            order = connection.recv()
        except EOFError:
            order = None
        if order is None:
            break
        function, args = order
        try:
            connection.send((True, function(llm, *args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
    sys.stdout.flush()
    os._exit(0)


def make_engine(model: str, options: dict[str, Any]) -> Any:
    """A vLLM engine in this process.

    options: of `vllm.LLM`; async_scheduler: as on GPUs; prepare: a function to be called before the start.
    """
    asynchronous = options.pop("async_scheduler", False)
    prepare = options.pop("prepare", None)
    import vllm  # not before the environment is set

    if prepare is not None:
        prepare()

    if asynchronous:
        # vLLM has no async scheduling on CPU. Its scheduler and step queue run there none the less.
        from vllm.config import VllmConfig

        config: Any = VllmConfig
        config.max_concurrent_batches = property(lambda self: 2)
        options["scheduler_cls"] = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
    return vllm.LLM(model, **options)
