"""Ranks that hold the same bytes (MLA) share one host tier and one disk tier, with any number of ranks."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import disk_tools as disk
from tests.engine import scenarios
from tests.engine.disk_tools import SMALL, settings
from tests.engine.harness import Engine
from tests.engine.latent_model import RECORD_BYTES, write_latent_model
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

HOST_GB = 0.05
ONE: dict[str, Any] = {
    **SMALL,
    "attention_backend": "CPU_MLA",  # AMX has no float32
    "block_size": 16,  # the only one that it knows
    "num_gpu_blocks_override": 128,
    # vLLM 0.32's own operators for CPUs compute queries that depend on the batch and on the number of ranks.
    "compilation_config": {"custom_ops": ["none"]},
}
TWO: dict[str, Any] = {**ONE, "tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def latent(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_model(model, tmp_path_factory.mktemp("latent") / "model")


@pytest.fixture(scope="module")
def plain(latent: Path) -> Iterator[Engine]:
    """Two ranks without KVBM and without any cache."""
    with Engine(latent, enable_prefix_caching=False, **TWO) as engine:
        yield engine


@pytest.fixture(scope="module")
def asks(prompts: Prompts) -> list[Ask]:
    return [Ask(prompt, 12) for prompt in prompts.batch(1500, [100, 170, 257])]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    more = {"DYN_KVBM_CPU_CACHE_GB": str(HOST_GB)}
    return settings(tmp_path_factory.mktemp("shared"), host=None, more=more)


@pytest.fixture(scope="module")
def stored_by_one(latent: Path, env: dict[str, str], asks: list[Ask]) -> list[list[int]]:
    """One rank has left the blocks of `asks` on disk; its answers."""
    with Engine(latent, kvbm={}, env=env, **ONE) as engine:
        return engine.call(disk.store, asks).tokens


@pytest.fixture(scope="module")
def engine(latent: Path, env: dict[str, str], stored_by_one: object) -> Iterator[Engine]:
    """Two ranks that find what one rank has stored."""
    with Engine(latent, kvbm={}, env=env, **TWO) as engine:
        engine.call(_on_ranks, count_stores)
        yield engine


@pytest.mark.feature("MLA records on disk for any number of ranks")
def test_two_ranks_load_what_one_has_stored(
    engine: Engine, plain: Engine, asks: list[Ask], stored_by_one: list[list[int]]
) -> None:
    want = plain.begin(scenarios.run, asks)
    read = engine.call(disk.from_disk, asks)
    again = engine.call(disk.run_again, asks)
    assert len({tuple(tokens) for tokens in stored_by_one}) == len(asks)  # the answers depend on the prompt
    assert [stored_by_one, read.tokens, again.tokens] == [want().tokens] * 3
    assert read.disk_after.recovered == 6 + 11 + 16  # one has a block of the reply
    assert read.onboarded == again.onboarded == 6 + 10 + 16
    assert (again.read, again.at_rest, again.after.failures) == (0, True, {})


@pytest.mark.feature("MLA: one copy for all tensor-parallel ranks")
def test_one_copy_for_all_ranks(engine: Engine, plain: Engine, prompts: Prompts) -> None:
    asks = [Ask(prompt, 12) for prompt in prompts.batch(1520, [130, 290])]
    want = plain.begin(scenarios.run, asks)
    before = engine.call(_on_ranks, rank_seen)
    cold = engine.call(disk.store, asks)
    host = engine.call(disk.run_again, asks)
    read = engine.call(disk.from_disk, asks)
    assert [cold.tokens, host.tokens, read.tokens] == [want().tokens] * 3
    assert host.onboarded == read.onboarded == 8 + 18
    assert host.after.capacity == int(HOST_GB * 1e9) // RECORD_BYTES
    first, second = engine.call(_on_ranks, rank_seen)
    assert first["memory"] == second["memory"]
    assert first["stored"] - before[0]["stored"] >= 8 + 18
    assert second["stored"] == 0
    assert len(disk.io_processes(engine)) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_visible_when_all_ranks_have_reported(engine: Engine, prompts: Prompts, rank: int) -> None:
    ask = Ask(prompts.make(1530 + rank, 140), 1)
    engine.call(scenarios.withhold, rank)
    first = engine.call(scenarios.run, [ask], False)
    engine.call(scenarios.step_for, 0.3)
    assert engine.call(scenarios.registered, ask.prompt) == 0
    assert engine.call(scenarios.deliver) > 0
    engine.call(scenarios.drain)
    second = engine.call(scenarios.run_again, [ask])
    assert (second.tokens, second.onboarded) == (first.tokens, 8)


def test_a_damaged_record_is_found_by_every_rank(engine: Engine, plain: Engine, prompts: Prompts) -> None:
    """The checksum that rank 0 made is compared by the others, too."""
    ask = Ask(prompts.make(1540, 200), 12)
    want = plain.begin(scenarios.run, [ask])
    engine.call(scenarios.run, [ask])
    engine.call(damage, ask.prompt, 3)
    damaged = engine.call(scenarios.run_again, [ask])
    assert damaged.failures("ONBOARD", "CORRUPT") == 1
    assert damaged.onboarded == 11
    assert damaged.tokens == want().tokens
    assert engine.call(corrupt_loads) == [1, 1]


@pytest.mark.feature("MLA records on disk for any number of ranks")
def test_one_rank_loads_what_two_have_stored(
    engine: Engine, latent: Path, plain: Engine, env: dict[str, str], prompts: Prompts
) -> None:
    """And nothing is left of an engine of which a rank was killed."""
    asks = [Ask(prompt, 12) for prompt in prompts.batch(1550, [140, 210])]
    want = plain.begin(scenarios.run, asks)
    engine.call(disk.store, asks)
    ranks = [seen["pid"] for seen in engine.call(_on_ranks, rank_seen)]
    io_processes = disk.io_processes(engine)
    time.sleep(1.5)  # what the I/O process has written is committed once a second
    os.kill(ranks[1], signal.SIGKILL)
    end = time.monotonic() + 30
    while running(*ranks, *io_processes):
        assert time.monotonic() < end, "processes outlive a killed rank"
        time.sleep(0.05)
    engine.kill()
    with Engine(latent, kvbm={}, env=env, **ONE) as one:
        read = one.call(disk.from_disk, asks)
    assert read.tokens == want().tokens
    assert read.onboarded == 8 + 13
    assert read.read > 0


# ---- outside


def running(*pids: int) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


# ---- in the engine


def _on_ranks(llm: Any, function: Any) -> list[Any]:
    return llm.collective_rpc(function)


def damage(llm: Any, prompt: tuple[int, ...], block: int) -> None:
    hashes = scenarios.hashes(llm, prompt)
    slot = int(scenarios.leader(llm).pool.match(hashes)[block])
    llm.collective_rpc(damage_slot, args=(slot,))


def corrupt_loads(llm: Any) -> list[int]:
    return llm.collective_rpc(corrupt_seen)


# ---- on a rank


def count_stores(_: Any) -> None:
    """And the loads that were refused because a record is damaged."""
    records = scenarios.worker(None)._records
    records.stored = records.corrupt = 0
    offload, intact = records.offload, records.intact

    def counted(blocks: Any, slots: np.ndarray, after: object = None) -> None:
        records.stored += len(slots)
        offload(blocks, slots, after)

    def checked(slots: np.ndarray) -> np.ndarray:
        result = intact(slots)
        records.corrupt += int((~result).sum())
        return result

    records.offload, records.intact = counted, checked


def rank_seen(_: Any) -> dict[str, Any]:
    worker = scenarios.worker(None)
    memory = os.fstat(worker.arena.fd)
    return {
        "pid": os.getpid(),
        "memory": (memory.st_dev, memory.st_ino),
        "stored": worker._records.stored,
    }


def damage_slot(worker: Any, slot: int) -> None:
    """On one rank: it is the memory of all."""
    if worker.rank == 1:
        scenarios.worker(None).arena.slots[slot, 5] ^= 1


def corrupt_seen(_: Any) -> int:
    return scenarios.worker(None)._records.corrupt
