"""Models whose layers need different parts of a prefix: all, the last blocks, or the state at its end."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine import features, scenarios
from tests.engine.features import Query
from tests.engine.hybrid_models import write_hybrid_model
from tests.engine.pair import Pair
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ran

# Answers of the engine with a device cache: without one, vLLM computes states in other pieces.
PLAIN = {"enable_prefix_caching": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3": {"num_gpu_blocks_override": 400},
    # vLLM chooses the size of blocks that hold states; its CPU kernel of linear attention wants bfloat16.
    "lfm2": {"block_size": None, "num_gpu_blocks_override": 60},
    "qwen3next": {"block_size": None, "num_gpu_blocks_override": 60, "dtype": "bfloat16"},
}
# Answers of its random weights are others where a prompt is computed in other pieces, which rounds otherwise.
ROUGH = {"lfm2"}
for options in OPTIONS.values():
    options |= {"load_format": "dummy", "seed_weights": 3}


@pytest.fixture(
    params=[
        pytest.param("gemma3", marks=pytest.mark.feature("Sliding windows and full attention (Gemma 3)")),
        pytest.param("lfm2", marks=pytest.mark.feature("Short convolution and full attention (LFM2)")),
        pytest.param("qwen3next", marks=pytest.mark.feature("Linear and full attention (Qwen3-Next)")),
    ]
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, tiny: Path, tmp_path: Path) -> Path:
    return write_hybrid_model(tiny, tmp_path / name, name)


def one_by_one(llm: Any, queries: list[Query]) -> Ran:
    """Their batch would depend on what is cached, and with it how kernels round."""
    runs = [features.run(llm, [query]) for query in queries]
    return Ran(
        [run.tokens[0] for run in runs], [run.cached[0] for run in runs], runs[0].before, runs[-1].after
    )


def turns(prompts: Prompts, name: str = "") -> list[Query]:
    """Prompts that go on where another has ended, end sooner, or leave another half-way."""
    first = prompts.make(5000, 860)
    queries = [Query(first[:700]), Query(first)]
    if name not in ROUGH:
        queries += [Query(first[:640]), Query(first[:600] + prompts.make(5001, 200))]
    return queries


def checked(ran: Ran) -> Ran:
    assert (ran.after.off_reason, ran.after.failures, ran.after.not_cached) == (None, {}, {})
    assert (ran.after.pins, ran.after.followed, ran.after.has_work) == (0, 0, False)
    assert ran.after.free_device_blocks == ran.after.device_blocks
    return ran


def test_from_host(pair: Pair, name: str, folder: Path, prompts: Prompts) -> None:
    queries = turns(prompts, name)
    with pair.engines(folder, plain=PLAIN, **OPTIONS[name]):
        want = pair.plain(one_by_one, queries)
        pair.call(features.run, [Query(prompts.make(1, 40))])  # the host tier is ready with the first step
        cold = checked(pair.call(one_by_one, queries))
        host = checked(pair.call(features.again, one_by_one, queries))
        assert [cold.tokens, host.tokens] == [want().tokens] * 2
        assert len({tuple(tokens) for tokens in host.tokens}) == len(queries), (
            "answers that are all alike prove nothing"
        )
        assert host.external_hits > 700
        # What the host had served is on the device again, and the shorter prompt hits what it was cut from.
        assert min(host.cached) >= 512


def break_group(llm: Any, prompt: tuple[int, ...], group: int) -> int:
    """Change all host records of one group of the prompt. Returns how many."""
    leader = scenarios.leader(llm)
    slots = leader.pool.find(leader._planner.groups.keys(scenarios.hashes(llm, prompt), group))
    slots = slots[slots >= 0]
    scenarios.worker(llm).arena.slots[slots, :200] ^= 0x5A
    return len(slots)


def test_a_damaged_block_of_any_group_is_a_miss(
    pair: Pair, name: str, folder: Path, prompts: Prompts
) -> None:
    query = Query(prompts.make(5002, 800))
    with pair.engines(folder, plain=PLAIN, **OPTIONS[name]):
        want = pair.plain(one_by_one, [query])().tokens
        pair.call(features.run, [Query(prompts.make(1, 40))])
        for group in range(pair.call(num_groups)):
            pair.call(features.again, one_by_one, [query])  # what was damaged is gone, and is stored again
            stored = pair.call(features.again, one_by_one, [query])
            assert stored.external_hits > 0
            assert pair.call(break_group, query.prompt, group) > 0
            ran = pair.call(features.again, one_by_one, [query])
            assert ran.failures("ONBOARD", "CORRUPT") > 0
            assert ran.tokens == stored.tokens == want
            assert ran.after.off_reason is None


def num_groups(llm: Any) -> int:
    return len(scenarios.leader(llm)._planner.groups)


def test_from_disk_after_a_restart(
    pair: Pair, name: str, folder: Path, prompts: Prompts, tmp_path: Path
) -> None:
    queries = turns(prompts, name)
    disk = {
        "host.num_blocks": 150, "disk.cache_gb": 0.5, "disk.dir": str(tmp_path / "disk"),
        "disk.disable_filter": True, "disk.skip_slow_loads": False,
    }  # fmt: skip
    options = {"plain": PLAIN, "kvbm": disk, **OPTIONS[name]}
    with pair.engines(folder, **options):
        want = pair.plain(one_by_one, queries)().tokens
        pair.call(features.run, [Query(prompts.make(1, 40))])
        assert pair.call(one_by_one, queries).tokens == want
    with pair.engines(folder, **options):
        ran = pair.call(one_by_one, queries)
        assert ran.tokens == want
        assert ran.external_hits > 700
        assert pair.call(blocks_read) > 0


def blocks_read(llm: Any) -> int:
    return scenarios.leader(llm).disk.stats.read_blocks


@pytest.mark.parametrize("name", ["gemma3"], indirect=True)
def test_under_pressure(pair: Pair, name: str, folder: Path, prompts: Prompts) -> None:
    """Too few device blocks for all: requests are preempted, windows move, copies run behind."""
    queries = [Query(prompts.make(6000 + seed % 3, 300 + 40 * seed), {"max_tokens": 60}) for seed in range(8)]
    options = {**OPTIONS[name], "num_gpu_blocks_override": 200, "max_num_batched_tokens": 256}
    with pair.engines(folder, **options):
        want = pair.plain(features.run, queries)
        rounds = [pair.call(features.run, queries)]
        rounds += [pair.call(features.again, features.run, queries) for _ in range(1)]
        assert [ran.tokens for ran in rounds] == [want().tokens] * 2
        assert sum(ran.after.preemptions - ran.before.preemptions for ran in rounds) > 0
        assert rounds[-1].external_hits > 500
        checked(rounds[-1])


@pytest.mark.feature("Sliding windows alone")
def test_one_window_for_all_layers(pair: Pair, tiny: Path, tmp_path: Path, prompts: Prompts) -> None:
    """A model without full attention: only the last blocks of a prompt are loaded."""
    layers = {"layer_types": ["sliding_attention"] * 6}
    folder = write_hybrid_model(tiny, tmp_path / "windows", "gemma3", **layers)
    queries = turns(prompts)
    with pair.engines(folder, plain=PLAIN, **OPTIONS["gemma3"]):
        want = pair.plain(one_by_one, queries)
        pair.call(features.run, [Query(prompts.make(1, 40))])
        pair.call(one_by_one, queries)
        host = checked(pair.call(features.again, one_by_one, queries))
        assert host.tokens == want().tokens
        assert host.external_hits > 700
        assert host.onboarded * 32 < host.external_hits


@pytest.mark.feature("Sliding windows without the hybrid KV cache manager")
def test_without_the_hybrid_manager(pair: Pair, tiny: Path, tmp_path: Path, prompts: Prompts) -> None:
    """vLLM then keeps all blocks of all layers, and so do we."""
    folder = write_hybrid_model(tiny, tmp_path / "gemma3", "gemma3")
    queries = turns(prompts)
    options = {**OPTIONS["gemma3"], "disable_hybrid_kv_cache_manager": True}
    with pair.engines(folder, plain=PLAIN, **options):
        want = pair.plain(one_by_one, queries)
        pair.call(features.run, [Query(prompts.make(1, 40))])
        pair.call(one_by_one, queries)
        host = checked(pair.call(features.again, one_by_one, queries))
        assert host.tokens == want().tokens
        assert host.external_hits == 32 * host.onboarded > 800
