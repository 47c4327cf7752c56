"""What the block logic costs: a prompt of 8,192 blocks in a full pool of 1,000,000, and an idle engine step.

    kvbm bench blocks [--json FILE]

Per block: hash the tokens, match (a miss), claim a slot (which evicts, since the pool is full), register,
match again (a hit), pin and release. The baseline of the same run is a plain dict of bytes to int with an
OrderedDict as LRU, given the same hashes. Medians of several runs; nothing is asserted here.
"""

import gc
import platform
import statistics
import sys
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvbm.bench.report import make_parser, progress, words, write_figures
from kvbm.config import load_config
from kvbm.logic.hashing import SequenceHasher, namespace_digest, root_hash
from kvbm.logic.operations import Completion
from kvbm.logic.policies import POLICIES, EvictionPolicy
from kvbm.logic.pool import BlockPool
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.vllm_integration.scheduler import SchedulerSide

POOL, PROMPT, BLOCK_SIZE, RUNS = 1_000_000, 8192, 16, 15
NONE_FAILED = np.empty(0, np.int32)
NAMESPACE = namespace_digest({"benchmark": 1})


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) / PROMPT * 1e6, result


def prompts() -> Iterator[list[int]]:
    """Made one at a time: an engine hands over a prompt that it has just received."""
    rng = np.random.default_rng(0)
    for _ in range(RUNS):
        yield rng.integers(0, 128_000, PROMPT * BLOCK_SIZE).tolist()


def hash_prompt(tokens: list[int]) -> SequenceHasher:
    hasher = SequenceHasher(root_hash(NAMESPACE, BLOCK_SIZE), BLOCK_SIZE)
    hasher.extend(tokens)
    return hasher


def bare_digests() -> None:
    """What the hash chain can't do without: one BLAKE2b digest of 80 bytes a block."""
    copy = blake2b(digest_size=16).copy
    content = bytes(80)
    for _ in range(PROMPT):
        state = copy()
        state.update(content)
        state.digest()


def full_collection() -> float:
    start = time.perf_counter()
    gc.collect()
    return time.perf_counter() - start


def full_pool(policy: type[EvictionPolicy]) -> tuple[BlockPool, float]:
    """A pool with every block registered, and its bytes a block."""
    tracemalloc.start()
    pool = BlockPool(POOL, policy)
    rng = np.random.default_rng(1)
    for start in range(0, POOL, 10_000):
        hashes = rng.integers(0, 2**64, (10_000, 2), dtype=np.uint64)
        slots, _ = pool.claim(hashes, 10_000)
        pool.register(slots)
        pool.release(slots)
        del hashes, slots, start
    bytes_a_block = tracemalloc.get_traced_memory()[0] / POOL
    tracemalloc.stop()
    return pool, bytes_a_block


def bench_pool(name: str) -> dict[str, float]:
    pool, bytes_a_block = full_pool(POLICIES[name])
    rows: list[dict[str, float]] = []
    pauses: list[float] = []
    collected = 0.0

    def on_gc(phase: str, _: dict[str, int]) -> None:
        nonlocal collected
        if phase == "start":
            collected = time.perf_counter()
        else:
            pauses.append(time.perf_counter() - collected)

    gc.callbacks.append(on_gc)
    for tokens in prompts():
        row: dict[str, float] = {}
        digests, _ = timed(bare_digests)
        row["hash"], hasher = timed(partial(hash_prompt, tokens))
        hashes = hasher.hashes
        row["match, miss"], _ = timed(partial(pool.match, hashes))
        row["claim, evict"], (slots, _) = timed(partial(pool.claim, hashes, PROMPT))
        row["register"], _ = timed(partial(pool.register, slots))
        row["release"], _ = timed(partial(pool.release, slots))
        row["all in"] = sum(row.values())
        row["match, hit"], found = timed(partial(pool.match, hashes))
        row["pin"], _ = timed(partial(pool.pin, found))
        row["for comparison: the bare digest calls"] = digests
        pool.release(found)
        rows.append(row)
    with_pool = full_collection()
    gc.callbacks.remove(on_gc)
    del pool
    result = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    result["all in, best run"] = min(row["all in"] for row in rows)
    result["bytes a block"] = bytes_a_block
    result["longest gc pause meanwhile, ms"] = max(pauses, default=0) * 1e3
    result["full collection with the pool, ms"] = with_pool * 1e3
    result["full collection without it, ms"] = full_collection() * 1e3
    return result


def bench_dict() -> dict[str, float]:
    """The same work on plain Python containers."""
    rng = np.random.default_rng(1)
    raw = rng.bytes(16 * POOL)
    index: OrderedDict[bytes, int] = OrderedDict((raw[i * 16 : i * 16 + 16], i) for i in range(POOL))
    del raw
    rows: list[dict[str, float]] = []
    for tokens in prompts():
        keys = [hash_.tobytes() for hash_ in hash_prompt(tokens).hashes]
        row: dict[str, float] = {}

        def match(keys: list[bytes] = keys) -> list[int | None]:
            return [index.get(key) for key in keys]

        def replace(keys: list[bytes] = keys) -> None:
            for key in keys:
                index[key] = index.popitem(last=False)[1]

        row["match, miss"], _ = timed(match)
        row["claim, evict"], _ = timed(replace)
        row["match, hit"], _ = timed(match)
        rows.append(row)
    result = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    result["full collection with the dict, ms"] = full_collection() * 1e3
    return result


def bench_step(requests: int = 256, steps: int = 2000) -> dict[str, float]:
    """vLLM's hooks of one step, µs, with `requests` decoding: none fills a block, or 1 in 16 does."""
    leader = Leader(
        load_config({"host.num_blocks": 200_000}, environ={}),
        namespace=NAMESPACE,
        block_size=BLOCK_SIZE,
        num_slots=200_000,
        ranks=1,
    )
    leader.receive([WorkerReport(rank=0, num_slots=200_000)])
    side = SchedulerSide(leader, BLOCK_SIZE)
    rng = np.random.default_rng(0)
    running = []
    for i in range(requests):
        tokens = rng.integers(0, 128_000, 2048 + i % BLOCK_SIZE).tolist()
        request = SimpleNamespace(
            request_id=f"request-{i}", all_token_ids=tokens, num_computed_tokens=len(tokens) - 1,
            num_tokens=len(tokens), num_prompt_tokens=len(tokens), pooling_params=None, prompt_embeds=None,
            mm_features=None, lora_request=None, cache_salt=None, skip_reading_prefix_cache=False,
        )  # fmt: skip
        running.append(request)
        side.match(request, 0)
        side.allocated(request, [list(range(i * 200, i * 200 + 129))], 0)
    ids = [request.request_id for request in running]
    scheduled = dict.fromkeys(ids, 1)

    def step(new_block_ids: list[Any]) -> float:
        output = SimpleNamespace(
            preempted_req_ids=set(), scheduled_new_reqs=[], num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=requests,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=ids, resumed_req_ids=set(), new_block_ids=new_block_ids
            ),
        )  # fmt: skip
        start = time.perf_counter()
        orders = side.build_orders(output)
        side.update((), [report(orders)])
        return (time.perf_counter() - start) * 1e6

    def report(orders: StepOrders) -> WorkerReport:
        return WorkerReport(0, completions=[Completion(op.id, NONE_FAILED) for op in orders.operations])

    idle = [step([None] * requests) for _ in range(steps)]
    busy = []
    for n in range(160):
        due = []
        for i, request in enumerate(running):
            request.all_token_ids.append(n)
            request.num_tokens += 1
            request.num_computed_tokens += 1
            due.append(([i * 200 + 130],) if request.num_computed_tokens % BLOCK_SIZE == 0 else None)
        busy.append(step(due))
    return {
        "idle step, median µs": statistics.median(idle),
        "idle step, 99th percentile µs": sorted(idle)[int(len(idle) * 0.99)],
        "step with 1 in 16 requests filling a block, median µs": statistics.median(busy[16:]),
    }


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = make_parser(__doc__, prog).parse_args(argv)
    # vLLM does the same once its engine is up; what is collected from here on is what the benchmark makes.
    gc.collect()
    gc.freeze()
    parts = {**{name: partial(bench_pool, name) for name in POLICIES}, "dict": bench_dict, "step": bench_step}
    results = {name: run() for name, run in progress(parts.items(), "benchmarks", len(parts))}
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    machine = f"{platform.processor() or platform.machine()}, {versions}"
    with words(arguments.json):
        print(machine)
        for name, rows in results.items():
            print(f"\n{name} (µs a block unless said otherwise)")
            for key, value in rows.items():
                print(f"  {key:<56} {value:10.3f}")
    write_figures({"machine": machine, "results": results}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
