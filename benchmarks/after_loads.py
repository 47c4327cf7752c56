#!/usr/bin/env python3
"""Do decoding steps take longer once a prompt was loaded, and after which way of loading?

    PYTHONPATH=. python benchmarks/after_loads.py [--repeats 6] [--json FILE]

Seen on an H200 (benchmarks/results/2026-12-01-h200.md): steps of 16 requests that decode take 0.15 to 0.2 ms
more once KVBM has loaded anything, until the engine has been idle. Here one engine loads a prompt of 16k in
one way or another, or computes one, and decodes right after it; the ways take turns in random order. Figures
of each way: the median step in ms, where it went (`vllm_gpu.py` says what the parts are), the GPU's clocks.
"""

import argparse
import asyncio
import functools
import json
import mmap
import os
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import benchmarks.vllm_gpu as vllm_gpu
from kvbm.transfer.calibration import Method

IDLE_S = 4.0  # after which steps were as short as before
DECODE_S = 1.2
WAYS = (
    "nothing",  # the engine was idle before
    "computed",  # a prompt that nothing knows
    "in step, kernel",
    "in step, kernel on the model's stream",
    "in step, DMA",
    "staged",
    "staged, unpacked on the model's stream",
    "DMA",
    "kernel",
    "staged, then idle",
)


def switched() -> type[Any]:
    """The connector, in the engine's process: it loads in the way whose number the file $LOAD_WAY holds."""
    from benchmarks.connectors import TimedConnector
    from kvbm.runtime.leader import Leader
    from kvbm.transfer.cuda.engine import CudaCopyEngine

    with open(os.environ["LOAD_WAY"], "rb") as file:
        chosen = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)

    def way() -> str:
        return WAYS[chosen[0]]

    leader: Any = Leader
    can = leader.loads_in_step
    leader.loads_in_step = property(lambda self: way().startswith("in step") and can.fget(self))
    start, start_in_step, launch = CudaCopyEngine.start, CudaCopyEngine.start_in_step, CudaCopyEngine._launch

    def start_so(
        self: Any, direction: str, blocks: Any, slots: Any, after: Any = None, method: Any = None
    ) -> Any:
        if direction == "onboard" and method is None:
            method = {"staged": Method.STAGED, "DMA": Method.DMA, "kernel": Method.KERNEL}.get(
                way().split(",")[0]
            )
        return start(self, direction, blocks, slots, after, method)

    def start_in_step_so(self: Any, device_blocks: Any, host_slots: Any) -> Any:
        kept = self._piece_copies
        if way() == "in step, DMA":
            self._piece_copies = None
        try:
            return start_in_step(self, device_blocks, host_slots)
        finally:
            self._piece_copies = kept

    def launch_so(self: Any, stream: Any, *args: Any, gather: bool, **kwargs: Any) -> None:
        if gather or not way().endswith("model's stream"):
            launch(self, stream, *args, gather=gather, **kwargs)
            return
        models = torch.cuda.current_stream()
        models.wait_stream(stream)
        launch(self, models, *args, gather=gather, **kwargs)
        stream.wait_stream(models)

    CudaCopyEngine.start, CudaCopyEngine.start_in_step = start_so, start_in_step_so
    CudaCopyEngine._launch = launch_so
    return TimedConnector


@functools.cache
def __getattr__(name: str) -> Any:
    """vLLM asks this module for its connector, in each of its processes."""
    if name == "LoadsConnector":
        return switched()
    raise AttributeError(name)


class Clocks:
    """Samples the GPU's clocks in MHz, power in W and the driver's reasons to slow down, every 0.1 s."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, int, int, float, int]] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            from vllm.third_party import pynvml as nvml

            nvml.nvmlInit()
            gpu = nvml.nvmlDeviceGetHandleByIndex(0)
            while True:
                self.rows.append(
                    (
                        time.perf_counter(),
                        nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
                        nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
                        nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
                        nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu),
                    )
                )
                time.sleep(0.1)
        except Exception as error:
            print(f"no clocks: {error}", flush=True)

    def between(self, begin: float, end: float) -> list[float]:
        rows = [row[1:] for row in self.rows if begin < row[0] < end]
        return [statistics.median(column) for column in zip(*rows, strict=True)]


async def decode_after(engine: vllm_gpu.Engine, stored: list[int], way: str) -> dict[str, Any]:
    rng = np.random.default_rng()
    await engine.empty_device()
    await asyncio.sleep(IDLE_S)
    ttft = None
    if way == "computed":
        ttft = (await engine.ask(vllm_gpu.random_prompt(rng, len(stored))))["ttft"]
    elif way != "nothing":
        answer = await engine.ask(stored)
        vllm_gpu.expect_cached(answer, len(stored) - 32, len(stored))
        ttft = answer["ttft"]
    if "idle" in way:
        await asyncio.sleep(IDLE_S)
    decoders = vllm_gpu.start_decoding(engine, rng, DECODE_S)
    await asyncio.sleep(DECODE_S / 4)
    begin = time.perf_counter()
    await asyncio.sleep(DECODE_S * 3 / 4)
    end = time.perf_counter()
    answers = await asyncio.gather(*decoders)
    gaps = vllm_gpu.gaps_between(answers, begin, end)
    assert engine.step_times is not None
    steps = vllm_gpu.where_steps_go(engine.step_times, begin - DECODE_S / 4, begin, end, len(decoders))
    return {
        "median": 1e3 * float(np.median(gaps)),
        "ttft": ttft,
        "begin": begin,
        "end": end,
        **steps["after"],
    }


async def measure(repeats: int, host_gb: float, file: Path) -> None:
    with open(os.environ["LOAD_WAY"], "r+b") as switch:
        chosen = mmap.mmap(switch.fileno(), 1)
    vllm_gpu.CONNECTORS["timed"] = {
        **vllm_gpu.BENCH,
        "kv_connector": "LoadsConnector",
        "kv_connector_module_path": "benchmarks.after_loads",
    }
    engine = vllm_gpu.Engine("timed", "graphs", host_gb, gpu_memory_utilization=0.5)
    await engine.memory_is_pinned()
    clocks = Clocks()
    [stored] = await vllm_gpu.stored_prompts(engine, 1)
    for way in WAYS[1:]:  # warm up: a kernel may have to be compiled
        chosen[0] = WAYS.index(way)
        await engine.empty_device()
        await engine.ask(stored, 4)
    rows: dict[str, list[dict[str, Any]]] = {}
    order = random.Random(0)
    for _ in range(repeats):
        for way in order.sample(WAYS, len(WAYS)):
            chosen[0] = WAYS.index(way)
            row = await decode_after(engine, stored, way)
            row["SM, memory clock, W, reasons"] = clocks.between(row.pop("begin"), row.pop("end"))
            rows.setdefault(way, []).append(row)
        file.write_text(json.dumps(rows, indent=1))
    for way in WAYS:
        columns = {key: [row[key] for row in rows[way]] for key in ("median", *vllm_gpu.STEP_PARTS, "wait")}
        medians = {key: round(statistics.median(column), 3) for key, column in columns.items()}
        print(way, medians, [round(x, 2) for x in columns["median"]], flush=True)
    engine.llm.shutdown()
    print(f"figures in {file}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--host-gb", type=float, default=28.0)
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile() as switch:
        switch.write(b"\0")
        switch.flush()
        os.environ["LOAD_WAY"] = switch.name
        file = Path(arguments.json or tempfile.mktemp(suffix=".json"))
        asyncio.run(measure(arguments.repeats, arguments.host_gb, file))


if __name__ == "__main__":
    main()
