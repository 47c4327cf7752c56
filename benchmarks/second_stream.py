#!/usr/bin/env python3
"""What do kernels and copies on a second stream cost a model that runs as CUDA graphs, and for how long?

    python benchmarks/second_stream.py [--trials 20] [--json FILE]

A decoding step of Llama-3.1-8B's shape (16 requests, 32 layers: one graph, and a kernel behind it as an
engine's sampling) is replayed while something runs beside it in five steps, then alone. Once two streams have
launched kernels, an H200 is in a state in which each kernel of the graph takes half a microsecond longer. It
outlasts any idleness and ends when another process uses the device, as here before each trial. Kernels
launched as graphs of one kernel do not count. Like https://github.com/pytorch/pytorch/issues/161104. Needs
torch and a CUDA device, no more.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

LAYERS, HIDDEN, MLP, HEADS, KV_HEADS, HEAD, TOKENS, CONTEXT = 32, 4096, 14336, 32, 8, 128, 16, 512
STEPS = 6
SLOWER = 1.015  # the state makes it 1.03
IDLE_S = 4.0
OTHER_PROCESS = """
import sys, torch
memory = torch.zeros(1 << 24, device="cuda")
for _ in sys.stdin:
    for _ in range(3):
        memory.add_(1.0)
    torch.cuda.synchronize()
    print("done", flush=True)
"""

Act = Callable[[], object]


class OtherProcess:
    def __init__(self) -> None:
        command = [sys.executable, "-c", OTHER_PROCESS]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def run_kernels(self) -> None:
        for _ in range(2):
            print("go", file=self._process.stdin, flush=True)
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "done\n"

    def close(self) -> None:
        self._process.communicate()


def captured(run: Act) -> Act:
    """Replays a graph of what `run` launches."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(keep: Act = run) -> None:  # with the tensors that it reads
        graph.replay()

    return replay


def decoding_step() -> Act:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / 64

    query = HEADS * HEAD
    layers = [
        (
            random(HIDDEN, query + 2 * KV_HEADS * HEAD),
            random(query, HIDDEN),
            random(HIDDEN, 2 * MLP),
            random(MLP, HIDDEN),
        )
        for _ in range(LAYERS)
    ]
    start, norm = random(TOKENS, HIDDEN), random(HIDDEN)
    keys, values = (random(TOKENS, KV_HEADS, CONTEXT, HEAD) for _ in range(2))

    def run() -> torch.Tensor:
        hidden = start
        for qkv, out, up, down in layers:
            queries = (rms_norm(hidden, (HIDDEN,), norm) @ qkv)[:, :query].reshape(TOKENS, HEADS, 1, HEAD)
            attention = scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
            hidden = hidden + attention.reshape(TOKENS, query) @ out
            gate = rms_norm(hidden, (HIDDEN,), norm) @ up
            hidden = hidden + (silu(gate[:, :MLP]) * gate[:, MLP:]) @ down
        return hidden

    return captured(run)


def ways() -> dict[str, Act]:
    """What runs beside a step. All of it starts with the step."""
    model, second = torch.cuda.current_stream(), torch.cuda.Stream()
    few, many = (torch.zeros(n, device="cuda") for n in (1 << 14, 1 << 26))
    host = torch.empty(1 << 24, pin_memory=True)
    one_few, one_many = captured(lambda: few.add_(1.0)), captured(lambda: many.add_(1.0))

    def times(n: int, act: Act) -> Act:
        return lambda: [act() for _ in range(n)]

    def beside(act: Act) -> Act:
        def run() -> None:
            second.wait_stream(model)
            with torch.cuda.stream(second):
                act()

        return run

    return {
        "nothing": lambda: None,
        "20 large kernels on the model's stream": times(20, lambda: many.add_(1.0)),
        "100 small kernels, plainly": beside(times(100, lambda: few.add_(1.0))),
        "100 small kernels, each as a graph": beside(times(100, one_few)),
        "20 large kernels, plainly": beside(times(20, lambda: many.add_(1.0))),
        "20 large kernels, each as a graph": beside(times(20, one_many)),
        "DMA in": beside(times(4, lambda: many[: 1 << 24].copy_(host, non_blocking=True))),
        "DMA out": beside(times(4, lambda: host.copy_(many[: 1 << 24], non_blocking=True))),
    }


def engine_step() -> Act:
    decode, sampled = decoding_step(), torch.zeros(1 << 16, device="cuda")

    def run() -> None:
        decode()
        sampled.add_(1.0)

    return run


def timed(step: Act, act: Act | None = None) -> float:
    """Median of some steps in ms, by CUDA events. The CPU is a step ahead, as in an engine."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(STEPS)]
    for i, (begin, end) in enumerate(marks):
        if act is not None and i < STEPS - 1:
            act()
        begin.record()
        step()
        end.record()
        if i:
            marks[i - 1][1].synchronize()
    torch.cuda.synchronize()
    return statistics.median([begin.elapsed_time(end) for begin, end in marks][1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    other = OtherProcess()
    torch.cuda.set_stream(torch.cuda.Stream())
    step = engine_step()
    other.run_kernels()
    alone = statistics.median(timed(step) for _ in range(5))
    print(f"alone {alone:.3f} ms")

    all_ways = ways()
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in all_ways}
    for _ in range(arguments.trials):
        for name, act in all_ways.items():
            other.run_kernels()
            rows[name].append((timed(step, act), timed(step)))
    result: dict[str, object] = {}
    for name, row in rows.items():
        slow = [after for _, after in row if after > SLOWER * alone]
        result[name] = {
            "beside ms": round(statistics.median(beside for beside, _ in row), 3),
            "slower afterwards": f"{len(slow)} of {len(row)}",
            "by us": round(1e3 * (statistics.median(slow) - alone), 1) if slow else None,
        }
        print(f"{name:40}", result[name])

    ends: dict[str, Act] = {"idle for 4 s": lambda: time.sleep(IDLE_S), "another process": other.run_kernels}
    for name, act in ends.items():
        pairs = []
        for _ in range(3):
            for _ in range(50):
                if (before := timed(step)) > SLOWER * alone:
                    act()
                    pairs.append((round(1e3 * (before - alone), 1), round(1e3 * (timed(step) - alone), 1)))
                    break
                timed(step, all_ways["100 small kernels, plainly"])
        result[name] = pairs
        print(f"{name:40} us longer before, after: {pairs}")
    other.close()
    if arguments.json:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "alone ms": alone}
        Path(arguments.json).write_text(json.dumps({**machine, "beside a step": result}, indent=1))


if __name__ == "__main__":
    main()
