"""What tests do to an engine, executed in its process. The first argument is the `vllm.LLM`."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Tokens = list[int]


@dataclass(frozen=True)
class Ask:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int = 8
    salt: str | None = None


@dataclass(frozen=True)
class Seen:
    """State of engine and KVBM at one moment; counters count from the engine's start."""

    device_hits: int  # tokens, by vLLM's count
    external_hits: int  # tokens, by vLLM's count
    preemptions: int
    free_device_blocks: int
    device_blocks: int  # that can be given out
    unfinished: int
    # KVBM; an engine without has zeros
    hits_by_tier: dict[str, int] = field(default_factory=dict)  # tokens, by the count of vLLM 0.32 and later
    onboarded: int = 0
    offloaded: int = 0
    evictions: int = 0
    registered: int = 0
    pins: int = 0
    capacity: int = 0
    failures: dict[tuple[str, str], int] = field(default_factory=dict)
    not_cached: dict[str, int] = field(default_factory=dict)
    off_reason: str | None = None
    has_work: bool = False
    followed: int = 0  # requests and operations in KVBM's tables


@dataclass(frozen=True)
class Ran:
    """Outcome of some requests, in their order."""

    tokens: list[Tokens]
    cached: list[int]  # vLLM's num_cached_tokens of each
    before: Seen
    after: Seen

    @property
    def onboarded(self) -> int:
        return self.after.onboarded - self.before.onboarded

    @property
    def external_hits(self) -> int:
        return self.after.external_hits - self.before.external_hits

    @property
    def hits_by_tier(self) -> dict[str, int]:
        before = self.before.hits_by_tier
        hits = {tier: tokens - before[tier] for tier, tokens in self.after.hits_by_tier.items()}
        return {tier: tokens for tier, tokens in hits.items() if tokens}

    @property
    def device_hits(self) -> int:
        return self.after.device_hits - self.before.device_hits

    def failures(self, direction: str, reason: str) -> int:
        key = direction, reason
        return self.after.failures.get(key, 0) - self.before.failures.get(key, 0)


# ---- the engine's insides


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def side(llm: Any) -> Any:
    """The connector's half in the scheduler."""
    return scheduler(llm).connector.scheduler_side


def leader(llm: Any) -> Any:
    return side(llm).leader


def worker_side(llm: Any) -> Any:
    """The connector's half on the worker, which is in this process unless there are several."""
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group

    connector: Any = get_kv_transfer_group()
    return connector.worker_side


def worker(llm: Any) -> Any:
    return worker_side(llm)._worker


def scheduler_name(llm: Any) -> str:
    return type(scheduler(llm)).__name__


def observe(llm: Any) -> Seen:
    metrics = llm.get_metrics()
    values = {metric.name: getattr(metric, "value", 0) for metric in metrics}
    block_pool = scheduler(llm).kv_cache_manager.block_pool
    common: dict[str, Any] = {
        "device_hits": int(values["vllm:prefix_cache_hits"]),
        "external_hits": int(values.get("vllm:external_prefix_cache_hits", 0)),
        "preemptions": int(values["vllm:num_preemptions"]),
        "free_device_blocks": block_pool.get_num_free_blocks(),
        "device_blocks": block_pool.num_gpu_blocks - 1,  # without the null block
        "unfinished": llm.llm_engine.get_num_unfinished_requests(),
        "hits_by_tier": {
            metric.labels["source"]: int(metric.value)
            for metric in metrics
            if metric.name == "vllm:prompt_tokens_cached_by_source"
        },
    }
    connector = scheduler(llm).connector
    if connector is None or connector.scheduler_side.leader is None:
        return Seen(**common)
    half = connector.scheduler_side
    lead = half.leader
    tables = (half._requests, half._extra_keys, half._refused, half._offered, half._loading)
    planner = lead._planner
    return Seen(
        **common,
        onboarded=lead.stats.onboarded_blocks,
        offloaded=lead.stats.offloaded_blocks,
        evictions=lead.pool.evictions,
        registered=lead.pool.num_registered,
        pins=int(lead.pool.pins(np.arange(lead.pool.capacity)).sum()),
        capacity=lead.pool.capacity,
        failures={(d.name, f.name): n for (d, f), n in lead.stats.failures.items()},
        not_cached=dict(lead.not_cached),
        off_reason=lead.off_reason,
        has_work=half.has_work,
        followed=sum(map(len, tables))
        + len(planner._requests)
        + len(planner._in_flight)
        + sum(half._held.values()),
    )


# ---- plain use


def run(llm: Any, asks: Sequence[Ask], drained: bool = True) -> Ran:
    """Generate; with `drained` wait, in the end, until no offload is under way."""
    from vllm import SamplingParams

    before = observe(llm)
    outputs = llm.generate(
        [_prompt(ask) for ask in asks],
        [SamplingParams(temperature=0, max_tokens=ask.max_tokens, ignore_eos=True) for ask in asks],
        use_tqdm=False,
    )
    if drained:
        drain(llm)
    return Ran(
        [list(output.outputs[0].token_ids) for output in outputs],
        [output.num_cached_tokens or 0 for output in outputs],
        before,
        observe(llm),
    )


def _prompt(ask: Ask) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": list(ask.prompt)}
    if ask.salt is not None:
        prompt["cache_salt"] = ask.salt
    return prompt


def drain(llm: Any, deadline_s: float = 60.0) -> None:
    """Step until the engine has nothing more to do, as vLLM's engine process does when it is idle."""
    core = llm.llm_engine.engine_core.engine_core
    end = time.monotonic() + deadline_s
    while core.scheduler.has_requests() or core.batch_queue:
        if time.monotonic() > end:
            raise TimeoutError(f"the engine does not come to rest: {observe(llm)}")
        llm.llm_engine.step()
        time.sleep(0.001)


def reset(llm: Any, running: bool = False, connector: bool = False) -> bool:
    return llm.reset_prefix_cache(running, connector)


def step_for(llm: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        llm.llm_engine.step()
        time.sleep(0.001)


def run_again(llm: Any, asks: Sequence[Ask]) -> Ran:
    """With an empty device cache: what hits comes from the host."""
    drain(llm)
    if not reset(llm):
        raise RuntimeError("the device cache could not be reset")
    return run(llm, asks)


# ---- step by step


class Stepper:
    """Requests whose steps are taken one at a time."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.tokens: dict[str, Tokens] = {}
        self.finished: set[str] = set()
        self.cached: dict[str, int] = {}

    def add(self, name: str, ask: Ask) -> None:
        from vllm import SamplingParams

        self.llm.llm_engine.add_request(
            name, _prompt(ask), SamplingParams(temperature=0, max_tokens=ask.max_tokens, ignore_eos=True)
        )

    def step(self) -> None:
        for output in self.llm.llm_engine.step():
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)
            self.cached[output.request_id] = output.num_cached_tokens or 0
            if output.finished:
                self.finished.add(output.request_id)

    def abort(self, name: str) -> None:
        self.llm.llm_engine.abort_request([name])

    def finish(self, deadline_s: float = 180.0) -> None:
        end = time.monotonic() + deadline_s
        while self.llm.llm_engine.has_unfinished_requests():
            if time.monotonic() > end:
                raise TimeoutError(f"requests do not finish: {observe(self.llm)}")
            self.step()
            time.sleep(0.0005)


def run_with_aborts(llm: Any, asks: Sequence[Ask], seed: int, at_once: int = 24) -> dict[str, Any]:
    """All requests, a part of which is aborted at some moment; some while their blocks are being loaded."""
    rng = random.Random(seed)
    stepper = Stepper(llm)
    before = observe(llm)
    waiting = list(enumerate(asks))
    alive: list[str] = []
    aborted: set[str] = set()
    during_load = 0
    slow(llm, "onboard", 0.1)  # longer than a step, so that aborts can hit a load
    while waiting or alive:
        for _ in range(rng.randrange(4)):
            if waiting and len(alive) < at_once:
                index, ask = waiting.pop(0)
                stepper.add(str(index), ask)
                alive.append(str(index))
        stepper.step()
        alive = [name for name in alive if name not in stepper.finished]
        loading = {
            name.split("-")[0] for name in side(llm)._loading
        }  # vLLM appends to the names it was given
        for name in alive:
            if rng.random() < (0.25 if name in loading else 0.03):
                during_load += name in loading
                stepper.abort(name)
                aborted.add(name)
        alive = [name for name in alive if name not in aborted]
    restore(llm)
    drain(llm)
    return {
        "before": before,
        "after": observe(llm),
        "aborted": aborted,
        "during_load": during_load,
        "tokens": {int(name): stepper.tokens[name] for name in stepper.finished - aborted},
    }


def abort_after_steps(llm: Any, ask: Ask, steps: int) -> Seen:
    """Abort the only request after so many steps, and take two more."""
    stepper = Stepper(llm)
    stepper.add("aborted", ask)
    for _ in range(steps):
        stepper.step()
    stepper.abort("aborted")
    for _ in range(2):
        stepper.step()
    return observe(llm)


def run_with_resets(
    llm: Any, asks: Sequence[Ask], at_steps: Sequence[int], connector: bool
) -> dict[str, Any]:
    """All requests at once; the caches are reset, running requests included, before each of `at_steps`."""
    stepper = Stepper(llm)
    for index, ask in enumerate(asks):
        stepper.add(str(index), ask)
    before, steps, reset_while_running, offloads_under_way, results = observe(llm), 0, 0, 0, []
    due = list(at_steps)
    while llm.llm_engine.has_unfinished_requests():
        # vLLM itself refuses while requests wait for a load, until it has put them back after its end.
        waits = any(
            request.status.name == "WAITING_FOR_REMOTE_KVS" for request in scheduler(llm).requests.values()
        )
        if due and steps >= due[0] and not waits:
            due.pop(0)
            reset_while_running += bool(scheduler(llm).running)
            offloads_under_way += side(llm).has_work
            results.append(reset(llm, running=True, connector=connector))
        stepper.step()
        steps += 1
    drain(llm)
    return {
        "before": before,
        "after": observe(llm),
        "results": results,
        "running": reset_while_running,
        "offloads_under_way": offloads_under_way,
        "tokens": [stepper.tokens[str(index)] for index in range(len(asks))],
    }


# ---- faults


def copy_engine(llm: Any) -> Any:
    """Moves the bytes, on the worker's threads: offload and onboard(device_blocks, host_slots, after)."""
    return worker(llm)._records._engine


_ORIGINALS: dict[str, Callable[..., None]] = {}


def _patch(llm: Any, name: str, replacement: Callable[..., None]) -> None:
    engine = copy_engine(llm)
    _ORIGINALS.setdefault(name, getattr(engine, name))
    setattr(engine, name, replacement)


def restore(llm: Any) -> None:
    """Undo all changes to the copy engine."""
    for name, original in _ORIGINALS.items():
        setattr(copy_engine(llm), name, original)
    _ORIGINALS.clear()


def slow(llm: Any, name: str, seconds: float) -> None:
    original = getattr(copy_engine(llm), name)

    def slowed(*args: Any) -> None:
        time.sleep(seconds)
        original(*args)

    _patch(llm, name, slowed)


def fail(llm: Any, name: str, every: int) -> None:
    """Every n-th copy in that direction raises, after it has written something wrong."""
    original = getattr(copy_engine(llm), name)
    calls = 0

    def failing(device_blocks: Any, host_slots: Any, *rest: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            if name == "onboard":
                original(device_blocks[::-1], host_slots, *rest)
            raise OSError("injected")
        original(device_blocks, host_slots, *rest)

    _patch(llm, name, failing)


_HANG = threading.Event()
_HUNG: list[Tokens] = []


def hang(llm: Any, name: str) -> None:
    """The next copies in that direction wait for `let_go`."""
    original = getattr(copy_engine(llm), name)
    _HANG.clear()
    _HUNG.clear()

    def hanging(device_blocks: Any, *rest: Any) -> None:
        _HUNG.append(device_blocks.tolist())
        _HANG.wait()
        original(device_blocks, *rest)

    _patch(llm, name, hanging)


def hung_blocks(llm: Any) -> tuple[Tokens, Tokens]:
    """Device blocks of copies that hang, and how many users each has."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    blocks = [block for blocks in _HUNG for block in blocks]
    return blocks, [pool.blocks[block].ref_cnt for block in blocks]


def let_go(llm: Any) -> None:
    """Let hanging copies go on, and wait until the worker is idle."""
    restore(llm)
    _HANG.set()
    end = time.monotonic() + 30
    while worker(llm)._tasks:
        if time.monotonic() > end:
            raise TimeoutError("copies do not end")
        time.sleep(0.01)


def hashes(llm: Any, prompt: Sequence[int], salt: str | None = None) -> Any:
    """Sequence hashes of a prompt's full blocks, computed apart from the connector."""
    from kvbm.logic.hashing import SequenceHasher, root_hash

    lead = leader(llm)
    hasher = SequenceHasher(root_hash(lead._namespace, lead._block_size, salt=salt), lead._block_size)
    hasher.extend(list(prompt))
    return hasher.hashes


def registered(llm: Any, prompt: Sequence[int], salt: str | None = None) -> int:
    """Leading blocks of the prompt that can be matched."""
    return len(leader(llm).pool.match(hashes(llm, prompt, salt)))


def corrupt(llm: Any, prompt: Sequence[int], block: int) -> int:
    """Change bytes of the host record of one block of the prompt. Returns its slot."""
    slots = leader(llm).pool.match(hashes(llm, prompt))
    slot = int(slots[block])
    worker(llm)._records.arena.slots[slot, 1000:5000] ^= 0x5A
    return slot


def watch_loads(llm: Any) -> None:
    """Record from now on what the worker reports of its loads; see `watched`."""
    half = worker_side(llm)
    if not hasattr(half, "seen"):
        half.seen = Counter()
        snapshot = half.snapshot

        def recorded() -> Any:
            result = snapshot()
            half.seen["finished"] += len(result.finished_recving)
            half.seen["failed requests"] += len(result.failed_recving)
            half.seen["failed blocks"] += len(result.failed_blocks)
            return result

        half.snapshot = recorded
    half.seen.clear()


def watched(llm: Any) -> dict[str, int]:
    return dict(worker_side(llm).seen)


def use_old_interface(llm: Any) -> None:
    """Ask the worker for its results as vLLM before 0.30 does."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group

    connector: Any = get_kv_transfer_group()
    connector.get_transfer_results = lambda ids: KVConnectorBase_V1.get_transfer_results(connector, ids)


def use_new_interface(llm: Any) -> None:
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group

    vars(get_kv_transfer_group()).pop("get_transfer_results", None)


def break_submit(llm: Any) -> None:
    """The next time that the worker is given operations it raises, as a lost CUDA context would make it."""
    target = worker(llm)
    submit = target.submit

    def broken(operations: Any) -> None:
        target.submit = submit
        raise RuntimeError("injected")

    target.submit = broken


# ---- several ranks

_WITHHELD: list[Any] = []


def withhold(llm: Any, rank: int) -> None:
    """Keep the reports of one rank from the leader."""
    half = side(llm)
    _ORIGINALS["update"] = original = half.update

    def update(finished_recving: Any, reports: Any) -> None:
        _WITHHELD.extend(report for report in reports if report.rank == rank)
        original(finished_recving, [report for report in reports if report.rank != rank])

    half.update = update


def deliver(llm: Any) -> int:
    half = side(llm)
    half.update = _ORIGINALS.pop("update")
    reports, _WITHHELD[:] = list(_WITHHELD), []
    half.update((), reports)
    return len(reports)


# ---- starting


def try_start(_: Any, model: str, env: dict[str, str], options: dict[str, Any]) -> str:
    """Start an engine in this process, which has none: the error it ends with, or ''."""
    import os

    from tests.engine.harness import make_engine

    os.environ.update(env)
    try:
        make_engine(model, dict(options))
    except Exception as error:
        return f"{type(error).__module__}.{type(error).__name__}: {error}"
    finally:
        for name in env:
            del os.environ[name]
        from vllm.distributed.kv_transfer import kv_transfer_state

        kv_transfer_state._KV_CONNECTOR_AGENT = None  # vLLM would use it again for the next engine
    return ""
