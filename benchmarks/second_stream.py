#!/usr/bin/env python3
"""Does a kernel on a second stream make the kernels of a CUDA graph on the first slower, and for how long?

    python benchmarks/second_stream.py [--json FILE]

A graph is replayed after each of a row of things that a copy engine does beside a model: kernels and DMA on
another stream, events, nothing, and waiting. Figures: microseconds of a replay, median of 50, by CUDA events.
https://github.com/pytorch/pytorch/issues/161104 reports 1.3 µs instead of 1.1 for each small kernel of a
graph once two streams have had kernels, also after a synchronization. Needs torch and a CUDA device, no more.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

REPLAYS = 60
IDLE_S = 4.0


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def graphs() -> dict[str, torch.cuda.CUDAGraph]:
    """Of 300 kernels each, one behind the other."""
    small, all_sms = (torch.zeros(n, device="cuda") for n in (1 << 10, 1 << 20))
    tokens = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(32, 4096, 4096, device="cuda", dtype=torch.bfloat16) / 64  # 1 GiB: not in the cache

    def adds(tensor: torch.Tensor) -> Callable[[], object]:
        return lambda: [tensor.add_(1.0) for _ in range(300)]

    def decode() -> torch.Tensor:
        hidden = tokens
        for i in range(300):
            hidden = hidden @ weights[i % len(weights)]
        return hidden

    return {
        "small": captured(adds(small)),
        "on all SMs": captured(adds(all_sms)),
        "matrices of 16 tokens": captured(decode),
    }


def replay(graph: torch.cuda.CUDAGraph) -> float:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in pairwise(marks)]
    return 1e3 * statistics.median(times[10:])


def acts() -> dict[str, Callable[[], object]]:
    second, urgent = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
    few, many = torch.zeros(1 << 14, device="cuda"), torch.zeros(1 << 26, device="cuda")
    host = torch.empty(1 << 26, pin_memory=True)

    def on(stream: torch.cuda.Stream, act: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with torch.cuda.stream(stream):
                act()

        return run

    def events() -> None:
        second.wait_stream(torch.cuda.current_stream())
        torch.cuda.current_stream().wait_stream(second)

    def idle() -> None:
        torch.cuda.synchronize()
        time.sleep(IDLE_S)

    return {
        "nothing": lambda: None,
        "a kernel on the same stream": lambda: few.add_(1.0),
        "DMA in on the second": on(second, lambda: many.copy_(host, non_blocking=True)),
        "DMA out on the second": on(second, lambda: host.copy_(many, non_blocking=True)),
        "events with the second": events,
        "a small kernel on the second": on(second, lambda: few.add_(1.0)),
        "then nothing": lambda: None,
        "then 4 s idle": idle,
        "a large kernel on the second": on(second, lambda: many.add_(1.0)),
        "then DMA in on the second": on(second, lambda: many.copy_(host, non_blocking=True)),
        "4 s idle, again": idle,
        "a kernel on one of high priority": on(urgent, lambda: few.add_(1.0)),
        "4 s idle, at last": idle,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="file for the figures")
    arguments = parser.parse_args()
    all_acts = acts()
    result: dict[str, dict[str, float]] = {}
    for name, graph in graphs().items():
        time.sleep(IDLE_S)
        replay(graph)
        result[name] = {}
        for what, act in all_acts.items():
            act()
            result[name][what] = round(replay(graph), 1)
            print(f"{name:24}{what:36}{result[name][what]:10.1f}", flush=True)
    if arguments.json:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        Path(arguments.json).write_text(json.dumps({**machine, "us a replay": result}, indent=1))


if __name__ == "__main__":
    main()
