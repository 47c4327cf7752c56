"""The simulation against a model in plain Python, and what each tier adds."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvbm.config import load_config
from kvbm.errors import ConfigError, UsageError
from kvbm.logic.index import HashIndex
from kvbm.logic.policies import Lru
from kvbm.logic.pool import BlockPool
from kvbm.logic.simulation import Ceiling, Request, Result, Simulation, Tiers, ceiling, hashes_of
from kvbm.runtime.disk import make_disk_tier

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "100"))
SIZE = 4  # tokens in a block

Path = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """A request for a path in the tree of all sequences; a block's name is the path that leads to it."""

    path: Path
    input_tokens: int
    output_tokens: int
    time_s: float = 0.0

    @property
    def names(self) -> list[Path]:
        return [self.path[: i + 1] for i in range(len(self.path))]

    @property
    def computed(self) -> int:
        return (self.input_tokens + max(1, self.output_tokens) - 1) // SIZE

    @property
    def useful(self) -> int:
        return max(0, self.input_tokens - 1) // SIZE


@dataclass
class Names:
    """Numbers for paths, as a trace has them."""

    numbers: dict[Path, int] = field(default_factory=dict)

    def request(self, asked: Asked) -> Request:
        ids = [self.numbers.setdefault(name, len(self.numbers)) for name in asked.names]
        return Request(
            asked.time_s, asked.input_tokens, asked.output_tokens, hashes_of(np.array(ids, np.uint64))
        )

    def requests(self, asked: Sequence[Asked]) -> list[Request]:
        return [self.request(one) for one in asked]


@st.composite
def _asked(draw: st.DrawFn) -> Asked:
    path = tuple(draw(st.lists(st.integers(0, 1), max_size=7)))
    # The hashes are those of all full blocks of the prompt, and perhaps of some of the reply.
    input_tokens = draw(st.integers(0, SIZE * len(path) + SIZE - 1))
    output_tokens = draw(st.integers(0, SIZE * 3))
    return Asked(path, input_tokens, output_tokens)


TRACES = st.lists(_asked(), max_size=25)


def replay(requests: Sequence[Request], **tiers: Any) -> Result:
    simulation = Simulation(Tiers(**tiers), SIZE)
    for request in requests:
        simulation.replay(request)
    return simulation.result


def prompt(*path: int, rest: int = 1, output: int = 1, time_s: float = 0.0) -> Asked:
    return Asked(path, SIZE * len(path) + rest, output, time_s)


def results(*asked: Asked, **tiers: Any) -> Result:
    return replay(Names().requests(asked), **tiers)


class PlainLru:
    """A cache of named blocks, least recently used first; a sequence's tail counts as older than its head."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.order: list[object] = []

    def prefix(self, names: Sequence[object]) -> int:
        for count, name in enumerate(names):
            if name not in self.order:
                return count
        return len(names)

    def use(self, names: Sequence[object]) -> None:
        held = [name for name in names if name in self.order]
        others = [name for name in self.order if name not in held]
        for name in names:
            if name in held:
                continue
            if len(held) + len(others) == self.capacity:
                if not others:
                    break
                others.pop(0)
            held.append(name)
        self.order = others + [name for name in reversed(names) if name in held]


def plain_hits(asked: Sequence[Asked], device: int, host: int) -> list[tuple[int, int]]:
    """Of each request: hits in device memory, and beyond them in the host tier."""
    caches = PlainLru(device), PlainLru(host)
    hits = []
    for number, one in enumerate(asked):
        wanted: list[object] = list(one.names[: one.useful])
        on_device = caches[0].prefix(wanted)
        hits.append((on_device, caches[1].prefix(wanted[on_device:])))
        known = one.names[: one.computed]
        names = [*known, *(("reply", number, i) for i in range(one.computed - len(known)))]
        for cache in caches:
            cache.use(names)
    return hits


@settings(max_examples=EXAMPLES, deadline=None)
@given(TRACES, st.integers(0, 12), st.integers(1, 12))
@example([prompt(0, 0, 0), prompt(0, 0, 1), prompt(0, 0, 0)], 0, 2)
def test_lru_tiers_hit_as_a_plain_model_does(asked: list[Asked], device: int, host: int) -> None:
    simulation = Simulation(Tiers(device_blocks=device, host_blocks=host), SIZE)
    before = (0, 0)
    names = Names()
    for one, expected in zip(asked, plain_hits(asked, device, host), strict=True):
        simulation.replay(names.request(one))
        now = simulation.result.device_hits, simulation.result.host_hits
        assert (now[0] - before[0], now[1] - before[1]) == expected
        before = now


def plain_ceiling(asked: Sequence[Asked]) -> Ceiling:
    seen: set[Path] = set()
    hits = unnamed = 0
    for one in asked:
        wanted = one.names[: one.useful]
        hits += next((i for i, name in enumerate(wanted) if name not in seen), len(wanted))
        seen.update(one.names[: one.computed])
        unnamed += max(0, one.computed - len(one.path))
    return Ceiling(hits, len(seen) + unnamed)


@settings(max_examples=EXAMPLES, deadline=None)
@given(TRACES)
def test_ceiling_is_what_a_cache_has_that_never_evicts(asked: list[Asked]) -> None:
    requests = Names().requests(asked)
    top = ceiling(requests, SIZE)
    assert top == plain_ceiling(asked)
    result = replay(requests, host_blocks=top.blocks + 1)
    assert (result.hits, result.host_evictions) == (top.hits, 0)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    TRACES,
    st.integers(0, 8),
    st.integers(1, 12),
    st.sampled_from(["lru", "segmented-lru"]),
    st.integers(0, 12),
    st.booleans(),
)
def test_no_tiers_exceed_the_ceiling(
    asked: list[Asked], device: int, host: int, policy: str, disk: int, filtered: bool
) -> None:
    requests = Names().requests(asked)
    tiers = {"device_blocks": device, "host_blocks": host, "host_policy": policy}
    result = replay(requests, **tiers, disk_blocks=disk, disk_filter=filtered)
    assert result.hits <= ceiling(requests, SIZE).hits
    assert (
        result.hits + result.misses == result.prompt_blocks == sum(r.input_tokens // SIZE for r in requests)
    )
    assert result.missed_tokens + result.hits * SIZE == sum(r.input_tokens for r in requests)
    assert result.disk_hits == 0 or disk


@settings(max_examples=EXAMPLES, deadline=None)
@given(TRACES)
def test_more_host_memory_never_hits_less_with_lru(asked: list[Asked]) -> None:
    requests = Names().requests(asked)
    longest = max((one.computed for one in asked), default=0)
    hits = [replay(requests, host_blocks=longest + more).hits for more in (1, 4, 8, 32)]
    assert hits == sorted(hits)


@settings(max_examples=EXAMPLES, deadline=None)
@given(TRACES)
def test_a_disk_that_holds_everything_is_an_infinite_cache(asked: list[Asked]) -> None:
    requests = Names().requests(asked)
    top = ceiling(requests, SIZE)
    # Of the host tier one half at most may be on its way to disk, or from there.
    host = 2 + 2 * max((one.computed for one in asked), default=0)
    result = replay(requests, host_blocks=host, disk_blocks=top.blocks + 1, disk_filter=False)
    assert (result.hits, result.disk_writes) == (top.hits, top.blocks)


def test_a_prompt_computes_at_least_one_token() -> None:
    whole = prompt(0, 0, rest=0)
    result = results(whole, whole, host_blocks=8)
    assert (result.host_hits, result.prompt_blocks, result.missed_tokens) == (1, 4, 3 * SIZE)


def test_a_block_that_is_not_full_is_no_hit() -> None:
    result = results(prompt(0, rest=3), prompt(0, rest=3), host_blocks=8)
    assert (result.host_hits, result.misses, result.missed_tokens) == (1, 1, SIZE + 6)


def test_a_known_reply_is_found_by_the_next_turn() -> None:
    first = Asked((0, 0, 0), SIZE, 2 * SIZE + 1)
    assert results(first, prompt(0, 0, 0, 1), host_blocks=8).host_hits == 3


def test_the_last_token_of_a_reply_has_no_kv() -> None:
    first = Asked((0, 0, 0), SIZE, 2 * SIZE)
    assert results(first, prompt(0, 0, 0, 1), host_blocks=8).host_hits == 2


def test_an_unknown_reply_takes_room() -> None:
    first = Asked((0, 0), 2 * SIZE, 2 * SIZE + 1)
    other = prompt(1, 1)
    assert results(first, other, prompt(0, 0), host_blocks=6).host_evictions == 0
    result = results(first, other, prompt(0, 0), host_blocks=5)
    assert (result.host_hits, result.host_evictions) == (2, 1)  # the reply's last block went first


def test_the_device_is_asked_first_and_the_host_for_the_rest() -> None:
    result = results(prompt(0, 0, 0), prompt(1), prompt(0, 0, 0), device_blocks=3, host_blocks=16)
    assert (result.device_hits, result.host_hits, result.device_evictions) == (2, 1, 2)


def test_what_the_device_alone_has_counts_for_the_device() -> None:
    result = results(prompt(0, 0), prompt(0, 0), device_blocks=4)
    assert (result.device_hits, result.host_hits, result.rate(result.hits)) == (2, 0, 8 / 18)


def test_disk_has_what_the_host_evicted() -> None:
    # Two prompts of two blocks take turns in a host tier of four; a third drives both out.
    asked = [prompt(0, 0), prompt(1, 1), prompt(2, 2), prompt(0, 0)]
    result = results(*asked, host_blocks=4, disk_blocks=16, disk_filter=False)
    assert (result.host_hits, result.disk_hits, result.disk_writes) == (0, 2, 6)
    assert results(*asked, host_blocks=4).hits == 0


def test_the_filter_lets_pass_what_is_seen_twice() -> None:
    asked = [prompt(0, 0), prompt(1, 1), prompt(2, 2), prompt(0, 0), prompt(3, 3), prompt(4, 4), prompt(0, 0)]
    result = results(*asked, host_blocks=4, disk_blocks=16)
    assert (result.disk_writes, result.disk_hits) == (2, 2)


@pytest.mark.parametrize(("later_s", "written"), [(599.0, 2), (601.0, 0)])
def test_the_filter_forgets_with_the_time_of_the_trace(later_s: float, written: int) -> None:
    asked = [prompt(0, 0), prompt(1, 1), prompt(2, 2), prompt(0, 0, time_s=later_s)]
    assert results(*asked, host_blocks=4, disk_blocks=16).disk_writes == written


def test_time_never_runs_backwards() -> None:
    result = results(
        prompt(0, 0, time_s=700.0), prompt(0, 0, time_s=1.0), host_blocks=4, disk_blocks=4, disk_filter=True
    )
    assert result.disk_writes == 2


def test_policies_differ() -> None:
    loop = [prompt(0, 0), prompt(0, 0)]
    scan = [prompt(i, i) for i in range(1, 4)]
    asked = [*loop, *scan, prompt(0, 0)]
    assert results(*asked, host_blocks=4).host_hits == 2
    assert results(*asked, host_blocks=4, host_policy="segmented-lru").host_hits == 4


class MostRecent(Lru):
    """Evicts what was used last."""

    def evict(self, count: int) -> np.ndarray:
        order = self._queue.pop(len(self._queue))
        self._queue.push(order[: max(0, len(order) - count)])
        return order[::-1][:count]


def test_a_policy_of_ones_own() -> None:
    asked = [prompt(0), prompt(1), prompt(2), prompt(0)]
    assert results(*asked, host_blocks=2).host_hits == 0
    own = f"{MostRecent.__module__}:MostRecent"
    sys.modules.setdefault(MostRecent.__module__, sys.modules[__name__])
    assert results(*asked, host_blocks=2, host_policy=own).host_hits == 1


def test_unknown_policy_and_disk_without_host() -> None:
    with pytest.raises(ConfigError, match=r"disk\.policy = 'mru'"):
        Simulation(Tiers(host_blocks=1, disk_blocks=1, disk_policy="mru"), SIZE)
    with pytest.raises(UsageError, match="host_blocks"):
        Simulation(Tiers(disk_blocks=1), SIZE)


def test_no_tiers_and_no_requests() -> None:
    assert results(prompt(0), prompt(0)).hits == 0
    empty = replay([], host_blocks=1)
    assert (empty.rate(empty.hits), ceiling([], SIZE)) == (0.0, Ceiling(0, 0))


@pytest.mark.parametrize(("host", "disk"), [(16, 4), (5000, 100_000), (700_000, 10)])
def test_disk_tier_is_arranged_as_the_engine_does(host: int, disk: int) -> None:
    config = load_config(host__num_blocks=host, disk__num_blocks=disk)
    real = make_disk_tier(
        config,
        BlockPool(host, Lru),
        capacity=disk,
        record_bytes=1 << 20,
        ranks=1,
        ids=iter(range(9)),
        drop=lambda *args: None,
        estimate=None,
    )
    below = Simulation(Tiers(host_blocks=host, disk_blocks=disk), SIZE)._below
    assert below is not None
    ours = below.disk
    assert ours is not None
    for limit in ("max_batch_blocks", "max_queued_writes", "max_fetched_blocks"):
        assert getattr(ours._limits, limit) == getattr(real._limits, limit), limit
    assert ours._admission is not None
    assert real._admission is not None
    assert ours._admission._capacity == real._admission._capacity
    assert type(ours.pool._policy) is type(real.pool._policy)


def test_hashes_of_numbers_are_distinct_even_and_always_the_same() -> None:
    numbers = np.arange(100_000, dtype=np.uint64)
    hashes = hashes_of(numbers)
    assert len(np.unique(hashes[:, 0])) == len(np.unique(hashes[:, 1])) == len(numbers)
    assert hashes_of(numbers[7:8])[0].tolist() == hashes[7].tolist()
    index = HashIndex(len(numbers))
    index.insert(hashes, np.arange(len(numbers)))
    assert len(index._overflow) < 0.001 * len(numbers)
