#!/usr/bin/env python3
"""What KVBM costs a request that finds nothing, and those that decode: several real vLLM on one GPU, in turn.

    PYTHONPATH=. python benchmarks/vllm_in_turn.py [--engines none null kvbm] [--repeats 15] [--json FILE]
        [--decode-repeats 5] [--only ttft decode] [--sizes 4k 16k 32k]

`vllm_gpu.py` measures one engine after the other, and a machine changes by more than the half percent that
is in question. Here all engines live at once, each in a process of its own; every prompt goes to one after
the other, in random order, while the others are idle. Figures: time to the first token (TTFT), cold, found on
the device and in the host tier, its median and least; and of each engine's differences to the first engine
(for the host tier: to its device hits), prompt by prompt, the median with the interval that holds the true
median with 95 % (by order statistics). Then the same of the inter-token latency of 16 requests that decode:
alone, and while prompts of 16k tokens arrive that are found on the device, or in the host tier.
"""

import argparse
import asyncio
import contextlib
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.vllm_gpu import (
    SIZES,
    Engine,
    decode_beside,
    decode_cases,
    has_host_tier,
    random_prompt,
    stored_prompts,
)

DEVICE_BLOCKS = 2600  # a prompt of 32k tokens, or one of 16k and 16 requests that decode, and room
ARRIVALS = 3


class Side:
    """One engine, in a child process that is told the seed and length of a prompt."""

    def __init__(self, name: str, mode: str, host_gb: float, share: float) -> None:
        self.name = name
        command = [sys.executable, sys.argv[0], "--child", name, mode, str(host_gb), str(share)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"the engine {self.name} has died")

    def close(self) -> None:
        """The child is told to end: killed, it would leave vLLM's own process behind."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


async def child(name: str, mode: str, host_gb: float, share: float) -> None:
    engine = Engine(name, mode, host_gb, num_gpu_blocks_override=DEVICE_BLOCKS, gpu_memory_utilization=share)
    await engine.memory_is_pinned()
    loop = asyncio.get_running_loop()
    prompts: list[list[int]] = []
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        if "decode" in order:
            prompts = prompts or await stored_prompts(engine, ARRIVALS)
            answer: Any = await decode_beside(engine, prompts, order["decode"])
        else:
            prompt = random_prompt(np.random.default_rng(order["seed"]), order["tokens"])
            answer = [1e3 * asked["ttft"] for asked in await engine.ask_cold_and_again(prompt)]
            if has_host_tier(name):
                answer.append(1e3 * (await engine.ask_host(prompt))["ttft"])
        print("answer", json.dumps(answer), flush=True)
    engine.llm.shutdown()


def compared(first: list[float], other: list[float]) -> dict[str, Any]:
    """The other over the first, and where the median of that lies with 95 % (a sign test's interval)."""
    gaps = sorted(mine - base for base, mine in zip(first, other, strict=True))
    count, outside = len(gaps), 0
    tail = 0.5**count
    while tail + math.comb(count, outside + 1) * 0.5**count <= 0.025:
        outside += 1
        tail += math.comb(count, outside) * 0.5**count
    found = [statistics.median(gaps), gaps[outside], gaps[-1 - outside]]
    base = statistics.median(first)
    return {
        "median": round(statistics.median(other), 2),
        "least": round(min(other), 2),
        "over the first: median, 95 %": [round(gap, 2) for gap in found],
        "the same in percent": [round(100 * gap / base, 2) for gap in found],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["none", "null", "kvbm"], help="as of vllm_gpu.py")
    parser.add_argument("--mode", default="graphs", choices=["eager", "graphs"])
    parser.add_argument("--host-gb", type=float, default=16.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--decode-repeats", type=int, help="of what requests that decode see; default: the same"
    )
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="of prompts")
    parser.add_argument("--only", nargs="+", default=["ttft", "decode"], choices=["ttft", "decode"])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, mode, host_gb, share = arguments.child
        asyncio.run(child(name, mode, float(host_gb), float(share)))
        return
    share = min(0.3, 0.9 / len(arguments.engines))  # of the GPU's memory for each
    sides = [Side(name, arguments.mode, arguments.host_gb, share) for name in arguments.engines]
    results: dict[str, Any] = {"engines": arguments.engines, "mode": arguments.mode}
    file = Path(arguments.json or tempfile.mktemp(suffix=".json"))
    try:
        for part in arguments.only:
            if part == "ttft":
                sizes = {name: SIZES[name] for name in arguments.sizes}
                first_tokens(sides, sizes, arguments.repeats, results)
            else:
                decoding(sides, arguments.decode_repeats or arguments.repeats, results)
            file.write_text(json.dumps(results, indent=1))
    finally:
        for side in sides:
            side.close()
    print(f"figures in {file}")


def first_tokens(sides: list[Side], sizes: dict[str, int], repeats: int, results: dict[str, Any]) -> None:
    order = random.Random(0)
    for tokens in (512, *sizes.values()):  # warm up
        for side in sides:
            side.ask(seed=tokens, tokens=tokens)
    for size, tokens in sizes.items():
        times: list[list[list[float]]] = [[] for _ in sides]  # by engine and repeat: cold, device, host
        for repeat in range(repeats):
            for which in order.sample(range(len(sides)), len(sides)):
                seed = 10**6 * (repeat + 1) + tokens
                times[which].append(sides[which].ask(seed=seed, tokens=tokens))
        results[size] = {}
        for i, where in enumerate(("cold", "device", "host")):
            base = [row[min(i, 1)] for row in times[0]]  # from the host: over the first engine's device hits
            for side, rows in zip(sides, times, strict=True):
                if i == len(rows[0]):
                    continue
                column = [row[i] for row in rows]
                row = compared(base, column)
                print(size, where, side.name, row, flush=True)
                results[size][f"{where}, {side.name}"] = {**row, "all": [round(ms, 2) for ms in column]}


def decoding(sides: list[Side], repeats: int, results: dict[str, Any]) -> None:
    """Each over the first engine alone."""
    order = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {}
    todo = [(side, case) for side in sides for case in decode_cases(side.name)]
    for _ in range(repeats):
        for side, case in order.sample(todo, len(todo)):
            rows.setdefault(f"{case}, {side.name}", []).append(side.ask(decode=case))
    base = [row["mean"] for row in rows[f"alone, {sides[0].name}"]]
    results["decode"] = {}
    for key, found in rows.items():
        row = compared(base, [each["mean"] for each in found])
        print("decode", key, row, flush=True)
        results["decode"][key] = {**row, "all": found}


if __name__ == "__main__":
    main()
