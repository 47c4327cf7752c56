"""How fast blocks move between a GPU and pinned host memory, beside a contiguous copy of the same bytes.

    kvbm bench copies [--pin-gb 8 40] [--json FILE]

2 GiB: 1,024 blocks of 2 MiB, the shape of Llama-3.1-8B in bf16, device blocks in random order. For each
layout and method: GB/s offloading, onboarding and both at once, and the CPU time to order a copy. Then: loads
inside a step, and how long an arena takes to be pinned and what that does to an engine's launches meanwhile.
Medians of several; bit-exactness is checked in the same run, nothing else is asserted.
"""

import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kvbm.bench.report import make_parser, words, write_figures
from kvbm.transfer.arena import HostArena
from kvbm.transfer.calibration import Method
from kvbm.transfer.cuda import driver
from kvbm.transfer.cuda.engine import CudaCopyEngine, CudaTransfer
from kvbm.transfer.layout import recognise, tensor_view

BLOCKS, LAYERS, RUNS = 1024, 32, 5
GPU = torch.device("cuda:0")


def packed() -> list[torch.Tensor]:
    """vLLM with FlashAttention: a tensor a layer, K and V of a head side by side. 64 KiB pieces."""
    return [torch.zeros((2 * BLOCKS, 16, 8, 256), dtype=torch.bfloat16, device=GPU) for _ in range(LAYERS)]


def apart() -> list[torch.Tensor]:
    """K and V apart: 32 KiB pieces, 65,536 of them."""
    return [torch.zeros((2, 2 * BLOCKS, 16, 8, 128), dtype=torch.bfloat16, device=GPU) for _ in range(LAYERS)]


def block_major() -> list[torch.Tensor]:
    """All layers of a block together: one piece of 2 MiB."""
    whole = torch.zeros((2 * BLOCKS, LAYERS, 16, 8, 256), dtype=torch.bfloat16, device=GPU)
    return [whole[:, layer] for layer in range(LAYERS)]


LAYOUTS: dict[str, Callable[[], list[torch.Tensor]]] = {
    "packed, 64 KiB pieces": packed,
    "K and V apart, 32 KiB pieces": apart,
    "block-major, 2 MiB pieces": block_major,
}


def seconds(run: Callable[[], None]) -> float:
    """Median time of `run`, which includes its wait for the device."""
    run()
    times = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def contiguous(arena: HostArena) -> dict[str, float]:
    """The limit: one stretch of device memory to and from pinned memory, a DMA for each registration."""
    size = arena.slots.nbytes // 2
    device = torch.zeros(2 * size, dtype=torch.uint8, device=GPU)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    step = 32 << 20
    offsets = np.arange(0, size, step, dtype=np.int64)
    lengths = np.full(len(offsets), step, np.int64)

    def load() -> None:
        driver.copy_batch(
            device.data_ptr() + offsets, arena.address + offsets, lengths, streams[0].cuda_stream
        )

    def store() -> None:
        driver.copy_batch(
            arena.address + size + offsets,
            device.data_ptr() + size + offsets,
            lengths,
            streams[1].cuda_stream,
        )

    def both() -> None:
        load()
        store()

    def timed(order: Callable[[], None]) -> float:
        return seconds(lambda: (order(), torch.cuda.synchronize())[0])

    return {
        "onboard": size / timed(load) / 1e9,
        "offload": size / timed(store) / 1e9,
        "both": 2 * size / timed(both) / 1e9,
    }


class Copies:
    """One layout under measurement; device blocks in random order, slots as a pool gives them out."""

    def __init__(self, make: Callable[[], list[torch.Tensor]], arena: HostArena) -> None:
        self.tensors = make()
        views = [tensor_view(str(i), tensor) for i, tensor in enumerate(self.tensors)]
        layout = recognise(views, 2 * BLOCKS, arena.record_bytes)
        start = time.perf_counter()
        self.engine = CudaCopyEngine(layout, arena, GPU)
        self.start_s = time.perf_counter() - start
        self.engine.wait_ready()
        self.arena = arena
        order = np.random.default_rng(0).permutation(2 * BLOCKS).astype(np.int32)
        self.blocks = {"onboard": order[:BLOCKS], "offload": order[BLOCKS:]}
        self.slots = {
            "onboard": np.arange(BLOCKS, dtype=np.int32),
            "offload": np.arange(BLOCKS, 2 * BLOCKS, dtype=np.int32),
        }
        self.bytes = BLOCKS * arena.record_bytes

    def order(self, direction: str, method: Method | None) -> CudaTransfer:
        return self.engine.start(direction, self.blocks[direction], self.slots[direction], None, method)

    def measure(self, method: Method | None) -> dict[str, float]:
        result: dict[str, float] = {}
        for direction in ("offload", "onboard"):
            result[direction] = self.bytes / seconds(lambda d=direction: self.order(d, method).wait()) / 1e9
            result[f"{direction} submit ms"] = 1e3 * self.submit_s(direction, method)

        def both() -> None:
            transfers = [self.order(direction, method) for direction in ("onboard", "offload")]
            for transfer in transfers:
                transfer.wait()

        result["both"] = 2 * self.bytes / seconds(both) / 1e9
        return result

    def submit_s(self, direction: str, method: Method | None) -> float:
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            transfer = self.order(direction, method)
            times.append(time.perf_counter() - start)
            transfer.wait()
        return statistics.median(times)

    def in_step(self) -> dict[str, float]:
        submits: list[float] = []

        def run() -> None:
            start = time.perf_counter()
            load = self.engine.start_in_step(self.blocks["onboard"], self.slots["onboard"])
            load.before_all()
            submits.append(time.perf_counter() - start)
            torch.cuda.current_stream().synchronize()

        return {
            "onboard": self.bytes / seconds(run) / 1e9,
            "onboard submit ms": 1e3 * statistics.median(submits),
        }

    def is_exact(self) -> bool:
        """Random blocks out, and back into other blocks."""
        for tensor in self.tensors:
            tensor.view(torch.int16).random_(-(2**15), 2**15 - 1)
        self.engine.offload(self.blocks["offload"], self.slots["offload"], self.engine.fence())
        self.engine.onboard(self.blocks["onboard"], self.slots["offload"], self.engine.fence())
        dim = int(self.tensors[0].shape[0] == 2)
        return all(
            torch.equal(
                tensor.movedim(dim, 0)[self.blocks["onboard"]].view(torch.int16),
                tensor.movedim(dim, 0)[self.blocks["offload"]].view(torch.int16),
            )
            for tensor in self.tensors
        )


def pinning(gigabytes: float) -> dict[str, float]:
    """Time until an arena is usable and until it is whole, and an engine's launches meanwhile."""
    record = 2 << 20
    tensors = [torch.zeros((64, 16, 8, 256), dtype=torch.bfloat16, device=GPU) for _ in range(LAYERS)]
    layout = recognise([tensor_view(str(i), t) for i, t in enumerate(tensors)], 64, record)
    arena = HostArena(int(gigabytes * 1e9 // record), record)
    x = torch.zeros(1024, device=GPU)
    start = time.perf_counter()
    engine = CudaCopyEngine(layout, arena, GPU)
    usable = time.perf_counter() - start
    launches = []
    while engine.ready_slots < arena.num_slots and time.perf_counter() - start < 120:
        before = time.perf_counter()
        x.add_(1)
        launches.append(time.perf_counter() - before)
        if len(launches) % 20 == 0:
            torch.cuda.synchronize()
    whole = time.perf_counter() - start
    start = time.perf_counter()
    engine.close()
    closed = time.perf_counter() - start
    arena.close()
    return {
        "GB": gigabytes,
        "usable after s": usable,
        "whole after s": whole,
        "launch median us": 1e6 * float(np.median(launches)),
        "launch p99.9 us": 1e6 * float(np.percentile(launches, 99.9)),
        "launch max ms": 1e3 * max(launches),
        "closed in s": closed,
    }


def run(pin_gb: Sequence[float]) -> dict[str, Any]:
    """All of it, printed as it is measured."""
    results: dict[str, Any] = {
        "machine": f"{torch.cuda.get_device_name()}, {platform.processor() or platform.machine()}",
        "versions": f"torch {torch.__version__}, CUDA driver {driver.version()}, "
        f"Python {platform.python_version()}",
        "layouts": {},
    }
    print(results["machine"], results["versions"], flush=True)
    arena = HostArena(2 * BLOCKS, 2 << 20)
    limit: dict[str, float] | None = None
    for name, make in LAYOUTS.items():
        copies = Copies(make, arena)
        if limit is None:
            limit = results["contiguous"] = contiguous(arena)
            print("contiguous:", {key: round(value, 1) for key, value in limit.items()}, flush=True)
        rows: dict[str, Any] = {"exact": copies.is_exact(), "start s": copies.start_s}
        for method in (None, *Method):
            if method is Method.STAGED and make is block_major:
                continue
            rows["chosen" if method is None else method.value] = copies.measure(method)
        rows["in step"] = copies.in_step()
        rows["methods"] = str(copies.engine._methods.rows)
        results["layouts"][name] = rows
        print(f"\n{name}: exact {rows['exact']}, start {rows['start s']:.2f} s, {rows['methods']}")
        for key, row in rows.items():
            if isinstance(row, dict):
                shown = (
                    f"{k} {v:.1f} ({100 * v / limit[k]:.0f} %)" if k in limit else f"{k} {v:.2f}"
                    for k, v in row.items()
                )
                print(f"  {key:8s}", ", ".join(shown), flush=True)
        copies.engine.close()
        del copies
        torch.cuda.empty_cache()
    arena.close()
    results["pinning"] = []
    for gigabytes in pin_gb:
        row = pinning(gigabytes)
        results["pinning"].append(row)
        print({key: round(value, 3) for key, value in row.items()}, flush=True)
    return results


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = make_parser(__doc__, prog)
    parser.add_argument(
        "--pin-gb", type=float, nargs="*", default=[8.0, 40.0], help="sizes of the arenas that are pinned"
    )
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device, and torch finds none; `kvbm doctor` says more.")
    with words(arguments.json):
        results = run(arguments.pin_gb)
    write_figures(results, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
