"""What observing costs: the scheduler's hooks over many steps, without observers, with, and with metrics.

    python benchmarks/observe_cost.py [--json FILE]

256 running requests, of which one in 16 fills a block in a step, and one ends and is followed by a new one
in every fourth: vLLM's calls in their order, answered by a worker that copies nothing. Only these calls are
timed, in seconds of CPU; the variants take turns with each step. Needs vLLM installed, not running.
"""

import gc
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvbm.bench.report import make_parser, words, write_figures
from kvbm.config import load_config
from kvbm.logic.hashing import namespace_digest
from kvbm.logic.operations import Completion
from kvbm.observe.metrics import render
from kvbm.runtime.admin import Admin
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.runtime.observer import Observer
from kvbm.vllm_integration.scheduler import SchedulerSide
from kvbm.vllm_integration.stats import StatsSource

REQUESTS, STEPS, ROUNDS = 256, 400, 9
BLOCK, PROMPT, SLOTS = 16, 2048, 40_000
NONE_FAILED = np.empty(0, np.int32)
BLOCK_BYTES = 2 << 20
TABLE = list(range(PROMPT // BLOCK + 300))  # device blocks of every request


@dataclass(frozen=True)
class Variant:
    observed: bool
    metrics: bool = False


VARIANTS = {"without": Variant(False), "observed": Variant(True), "with metrics": Variant(True, True)}


class Engine:
    """vLLM's scheduler, as far as the connector sees it."""

    def __init__(self, variant: Variant) -> None:
        config = load_config(environ={}, host__num_blocks=SLOTS, observe__metrics=variant.metrics)
        observer = Observer(config.observe, BLOCK, engine="bench") if variant.observed else None
        namespace = namespace_digest({"benchmark": 1})
        leader = Leader(
            config, namespace=namespace, block_size=BLOCK, num_slots=SLOTS, ranks=1, observer=observer
        )
        leader.receive([WorkerReport(0, SLOTS, SLOTS)])
        self.side = SchedulerSide(leader, BLOCK)
        null = defaultdict(lambda: SimpleNamespace(is_null=True))
        self.side.bind_block_pool(
            SimpleNamespace(blocks=null, touch=len, free_blocks=len, reset_prefix_cache=lambda: True)
        )
        self.admin = None
        if observer is not None:
            self.side.stats = StatsSource(leader, observer.log, BLOCK_BYTES, BLOCK_BYTES)
            self.admin = Admin(leader, observer, block_bytes=BLOCK_BYTES, disk_block_bytes=BLOCK_BYTES)
        self._rng = np.random.default_rng(0)
        self._next = 0
        self._steps = 0
        self._reports: list[WorkerReport] = []
        self.running = [self._arrive() for _ in range(REQUESTS)]
        for request in self.running:
            self._start(request)

    def _arrive(self) -> Any:
        i = self._next
        self._next += 1
        # One in four has been here before, as far as 1,024 tokens.
        tokens = self._rng.integers(0, 128_000, PROMPT + i % BLOCK).tolist()
        if i % 4 == 0:
            tokens[:1024] = range(1024)
        return SimpleNamespace(
            request_id=f"request-{i}", all_token_ids=tokens, num_computed_tokens=len(tokens) - 1,
            num_tokens=len(tokens), num_prompt_tokens=len(tokens), pooling_params=None, prompt_embeds=None,
            mm_features=None, lora_request=None, cache_salt=None, skip_reading_prefix_cache=False,
        )  # fmt: skip

    def _start(self, request: Any) -> None:
        matched, _ = self.side.match(request, 0)
        self.side.allocated(request, [TABLE], matched or 0)

    def step(self) -> float:
        """Returns the seconds of CPU in KVBM's hooks."""
        self._steps += 1
        spent = 0.0
        if self._steps % 4 == 0:
            ended = self.running.pop(0)
            request = self._arrive()
            start = time.thread_time()
            self.side.finish(ended, [TABLE])
            self._start(request)
            spent += time.thread_time() - start
            self.running.append(request)
        blocks: list[Any] = []
        for request in self.running:
            request.all_token_ids.append(self._steps)
            request.num_tokens += 1
            request.num_computed_tokens += 1
            blocks.append(([7],) if request.num_computed_tokens % BLOCK == 0 else None)
        output = self._output(blocks)
        start = time.thread_time()
        orders = self._run(output, self._reports)
        spent += time.thread_time() - start
        done = [Completion(operation.id, NONE_FAILED) for operation in orders.operations]
        self._reports = [WorkerReport(0, SLOTS, SLOTS, completions=done, timed=orders.timed)]
        return spent

    def quiet_step(self) -> float:
        """No request fills a block, comes or ends."""
        output = self._output([None] * len(self.running))
        start = time.thread_time()
        self._run(output, ())
        return time.thread_time() - start

    def _run(self, output: Any, reports: Sequence[WorkerReport]) -> StepOrders:
        orders = self.side.build_orders(output)
        self.side.update((), reports)
        if self.side.stats is not None:
            self.side.stats.take()
        return orders

    def _output(self, blocks: list[Any]) -> Any:
        ids = [request.request_id for request in self.running]
        return SimpleNamespace(
            preempted_req_ids=set(), scheduled_new_reqs=[], num_scheduled_tokens=dict.fromkeys(ids, 1),
            total_num_scheduled_tokens=len(ids),
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=ids, resumed_req_ids=set(), new_block_ids=blocks
            ),
        )  # fmt: skip


def mean_us(call: Callable[[], Any], times: int) -> float:
    start = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - start) / times * 1e6


def bench_hooks() -> dict[str, float]:
    engines = {name: Engine(variant) for name, variant in VARIANTS.items()}
    seen: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        spent: dict[str, float] = defaultdict(float)
        for _ in range(STEPS):
            for name, engine in engines.items():
                spent[f"busy step, {name}"] += engine.step()
                spent[f"quiet step, {name}"] += engine.quiet_step()
        for name, seconds in spent.items():
            seen.setdefault(name, []).append(seconds / STEPS * 1e6)
    stats = engines["with metrics"].side.stats
    assert stats is not None

    def something_new() -> None:
        stats._log.totals.host_tokens += 16
        stats.take()

    for _ in range(ROUNDS):
        seen.setdefault("vLLM's stats, nothing new", []).append(mean_us(stats.take, 2000))
        seen.setdefault("vLLM's stats, something new", []).append(mean_us(something_new, 2000))
    figures = {name: statistics.median(values) for name, values in seen.items()}
    for kind in ("busy", "quiet"):
        for name in ("observed", "with metrics"):
            pairs = zip(seen[f"{kind} step, {name}"], seen[f"{kind} step, without"], strict=True)
            figures[f"{kind} step, {name}: more by"] = statistics.median(a - b for a, b in pairs)
    return figures


def bench_scrapes() -> dict[str, float]:
    """In a thread of its own, but it takes the GIL."""
    engine = Engine(VARIANTS["with metrics"])
    admin = engine.admin
    assert admin is not None
    for _ in range(4 * 1100):
        engine.step()

    def scrape() -> None:
        render(admin.measure(), admin.misses(), "")

    first = mean_us(scrape, 1)
    return {
        "first scrape, explains 1,000 requests": first,
        "scrape": min(mean_us(scrape, 10) for _ in range(ROUNDS)),
        "of that under the leader's lock": min(mean_us(admin.measure, 100) for _ in range(ROUNDS)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser(__doc__, None).parse_args(argv)
    gc.collect()
    gc.freeze()
    figures = {**bench_hooks(), **bench_scrapes()}
    with words(arguments.json):
        for name, value in figures.items():
            print(f"{name:<60} {value:10.2f} µs")
    write_figures({name: round(value, 2) for name, value in figures.items()}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
