import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.trtllm import interface
from tests.trtllm.executor import BLOCK, Executor

Make = Callable[..., Executor]


@pytest.fixture
def here() -> Iterator[SimpleNamespace]:
    with interface.provided() as here:
        yield here


@pytest.fixture
def llm_args(tmp_path: Any) -> Any:
    """As TensorRT-LLM's arguments for a plain text model."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    return SimpleNamespace(
        model=str(model),
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        context_parallel_size=1,
        max_beam_width=1,
        max_seq_len=4096,
        enable_attention_dp=False,
        sparse_attention_config=None,
        kv_cache_config=SimpleNamespace(
            tokens_per_block=BLOCK,
            host_cache_size=None,
            enable_block_reuse=True,
            max_attention_window=None,
            dtype="auto",
        ),
    )


@pytest.fixture
def make(here: SimpleNamespace, llm_args: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """An engine with KVBM; settings by environment variable."""
    made: list[Executor] = []

    def make(*, ranks: int = 1, env: dict[str, str] | None = None, **more: Any) -> Executor:
        settings = {"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "64", **(env or {})}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        llm_args.tensor_parallel_size = ranks
        made.append(Executor(here, llm_args, ranks=ranks, **more))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def plain(here: SimpleNamespace) -> Make:
    """The same engine without KVBM."""
    return lambda **more: Executor(here, None, **more)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], threading.Event]]:
    """A rank whose copies wait for the event that is given back."""
    gates: list[threading.Event] = []

    def slow(worker: Any) -> threading.Event:
        gate = threading.Event()
        gates.append(gate)
        engine = worker.side._worker._records._engine
        for name in ("offload", "onboard"):
            copy = getattr(engine, name)

            def waiting(*args: Any, copy: Any = copy) -> None:
                gate.wait()
                copy(*args)

            monkeypatch.setattr(engine, name, waiting)
        return gate

    yield slow
    for gate in gates:
        gate.set()
