"""What the TensorRT-LLM connector costs the engine's threads in a step: its hooks, of leader and worker.

    PYTHONPATH=. python benchmarks/trtllm_steps.py [--json FILE]

The simulated executor of tests/trtllm makes TensorRT-LLM's calls in their order, with blocks of 32 tokens.
Only the calls into the connector are timed, beside those into hooks that do nothing. Copies are a few bytes:
what they take on a GPU is measured elsewhere.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvbm.bench.report import make_parser, write_figures
from tests.trtllm import executor, interface

PROMPT, REPLY = 1024, 40
HOOKS = {
    *("get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "request_finished"),
    *("bind_connector_meta", "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save"),
    "get_finished",
}


class Timed:
    """Stands before a connector's half and adds up the seconds in its hooks."""

    def __init__(self, half: Any, spent: list[float], empty: bool) -> None:
        self._half, self._spent, self._empty = half, spent, empty

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._half, name)
        return self._timed(method) if name in HOOKS else method

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begin = time.perf_counter()
            if self._empty:
                _nothing(*args)
                self._spent[0] += time.perf_counter() - begin
                return method(*args)  # the simulation needs its answers
            result = method(*args)
            self._spent[0] += time.perf_counter() - begin
            return result

        return call


def _nothing(*_: Any) -> None:
    return None


def microseconds_a_step(requests: int, *, empty: bool, hit: bool) -> float:
    """Median over the steps in which all requests decode, or in which all are admitted if `hit`."""
    with interface.provided() as here, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text('{"model_type": "llama"}')
        engine = executor.Executor(here, _llm_args(folder), num_blocks=requests * 40 + 64)
        spent = [0.0]
        engine.leader = Timed(engine.leader, spent, empty)
        engine.workers = [Timed(worker, spent, empty) for worker in engine.workers]
        engine.generate(range(PROMPT + 1), 2)  # the first step caches nothing
        prompts = [[1000 * i + j for j in range(PROMPT)] for i in range(requests)]
        if hit:
            for prompt in prompts:
                engine.generate(prompt, 1)
        for prompt in prompts:
            engine.add(prompt, REPLY)
        steps = []
        while engine.waiting or engine.running:
            spent[0] = 0.0
            engine.step()
            steps.append(spent[0])
        engine.close()
        return 1e6 * (max(steps) if hit else statistics.median(steps))


def _llm_args(folder: str) -> Any:
    return SimpleNamespace(
        model=folder,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        context_parallel_size=1,
        max_beam_width=1,
        max_seq_len=4096,
        enable_attention_dp=False,
        sparse_attention_config=None,
        kv_cache_config=SimpleNamespace(
            tokens_per_block=executor.BLOCK,
            host_cache_size=None,
            enable_block_reuse=True,
            max_attention_window=None,
            dtype="auto",
        ),
    )


def main() -> None:
    options = make_parser(__doc__, None).parse_args()
    os.environ["DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS"] = "20000"
    executor.BLOCK, executor.WIDTH = 32, 1
    figures: dict[str, float] = {}
    for requests in (1, 32, 256):
        for what, hit in (("decoding", False), ("admitted, all in host memory", True)):
            if hit and requests > 32:  # the simulated model computes them for minutes
                continue
            for name, empty in (("hooks that do nothing", True), ("KVBM", False)):
                row = f"{requests} requests, {what}, {name}, µs"
                figures[row] = round(microseconds_a_step(requests, empty=empty, hit=hit), 1)
                print(row, figures[row], flush=True)
    write_figures(figures, options.json)


if __name__ == "__main__":
    main()
