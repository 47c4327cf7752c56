#!/usr/bin/env python3
"""What KVBM costs a request that finds nothing: two real vLLM on one GPU, asked in turn.

    PYTHONPATH=. python benchmarks/vllm_in_turn.py [--engines none kvbm] [--repeats 15] [--json FILE]

`vllm_gpu.py` measures one engine after the other, and a machine changes by more than the half percent that is
in question. Here both engines live at once, each in a process of its own, and every prompt goes to one and then
to the other, in random order, while the other is idle. Figures: time to the first token (TTFT), cold and found
on the device, its median and least, and the median of the differences pair by pair with the interval that holds
the true median with 95 % (by order statistics).
"""

import argparse
import asyncio
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

from benchmarks.vllm_gpu import SIZES, Engine, expect_cached, random_prompt

DEVICE_BLOCKS = 3000  # a prompt of 32k tokens, and room
SHARE = 0.4  # of the GPU's memory for each engine


class Side:
    """One engine, in a child process that is told the seed and length of a prompt."""

    def __init__(self, name: str, mode: str, host_gb: float) -> None:
        self.name = name
        command = [sys.executable, __file__, "--child", name, mode, str(host_gb)]
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
        self._process.kill()
        self._process.wait()


async def child(name: str, mode: str, host_gb: float) -> None:
    engine = Engine(name, mode, host_gb, num_gpu_blocks_override=DEVICE_BLOCKS, gpu_memory_utilization=SHARE)
    await asyncio.sleep(0.35 * host_gb)  # KVBM pins its memory in the background
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        prompt = random_prompt(np.random.default_rng(order["seed"]), order["tokens"])
        await engine.wake_up()
        answers = [await engine.ask(prompt) for _ in range(2)]  # cold, and found on the device
        for answer, least in zip(answers, (0, order["tokens"] - 32), strict=True):
            expect_cached(answer, least, least and order["tokens"])
        await asyncio.sleep(0.3)  # offloads are over
        await engine.empty_device()
        print("answer", json.dumps([1e3 * answer["ttft"] for answer in answers]), flush=True)


def differences(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Of the second over the first, and where its median lies with 95 % (a sign test's interval)."""
    gaps = sorted(second - first for first, second in pairs)
    count, outside = len(gaps), 0
    tail = 0.5**count
    while tail + math.comb(count, outside + 1) * 0.5**count <= 0.025:
        outside += 1
        tail += math.comb(count, outside) * 0.5**count
    first, second = (list(side) for side in zip(*pairs, strict=True))
    base = statistics.median(first)
    return {
        "median": [round(base, 2), round(statistics.median(second), 2)],
        "least": [round(min(first), 2), round(min(second), 2)],
        "difference": round(statistics.median(gaps), 2),
        "difference, 95 %": [round(gaps[outside], 2), round(gaps[-1 - outside], 2)],
        "percent": round(100 * statistics.median(gaps) / base, 2),
        "percent, 95 %": [round(100 * gaps[i] / base, 2) for i in (outside, -1 - outside)],
        "all": [[round(value, 2) for value in side] for side in (first, second)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs=2, default=["none", "kvbm"], help="as of vllm_gpu.py")
    parser.add_argument("--mode", default="graphs", choices=["eager", "graphs"])
    parser.add_argument("--host-gb", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, mode, host_gb = arguments.child
        asyncio.run(child(name, mode, float(host_gb)))
        return
    sides = [Side(name, arguments.mode, arguments.host_gb) for name in arguments.engines]
    order = random.Random(0)
    results: dict[str, Any] = {"engines": arguments.engines, "mode": arguments.mode}
    try:
        for tokens in (512, *SIZES.values()):  # warm up
            for side in sides:
                side.ask(seed=tokens, tokens=tokens)
        for size, tokens in SIZES.items():
            pairs: dict[str, list[tuple[float, float]]] = {"cold": [], "device": []}
            for repeat in range(arguments.repeats):
                seen: dict[int, list[float]] = {}
                for which in order.sample(range(2), 2):
                    seen[which] = sides[which].ask(seed=1000 * repeat + tokens, tokens=tokens)
                for where, (first, second) in zip(pairs, zip(seen[0], seen[1], strict=True), strict=True):
                    pairs[where].append((first, second))
            results[size] = {where: differences(found) for where, found in pairs.items()}
            for where, row in results[size].items():
                print(size, where, {key: row[key] for key in row if key != "all"}, flush=True)
    finally:
        for side in sides:
            side.close()
    file = Path(arguments.json or tempfile.mktemp(suffix=".json"))
    file.write_text(json.dumps(results, indent=1))
    print(f"figures in {file}")


if __name__ == "__main__":
    main()
