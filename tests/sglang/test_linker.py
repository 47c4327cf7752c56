"""KVBM's linker in a real SGLang engine: outputs, and where the KV of the prompts came from."""

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.disk_tools import io_processes
from tests.sglang.conftest import Expect
from tests.sglang.harness import Engine, Ran, linker
from tests.sglang.prompts import TP2, Prompt, disk, prompts, whole_pages

ASKS = prompts(1, 600, 333, 47, 17, 5)


def stored(engine: Engine, asks: list[Prompt], want: list[list[int]]) -> Ran:
    """Ask until all that can be comes from KVBM; outputs are right all the time."""
    end = time.monotonic() + 60
    while (ran := engine.run_anew(asks)).host != whole_pages(asks):
        assert ran.tokens == want
        assert time.monotonic() < end, ran
    assert ran.tokens == want
    return ran


@pytest.mark.parametrize("ranks", [1, 2])
def test_from_memory_and_after_a_restart_from_disk(
    ranks: int, keen: Path, expect: Expect, tmp_path: Path
) -> None:
    options = {**(TP2 if ranks == 2 else {}), **linker(disk(tmp_path))}
    want = expect(ASKS)
    with Engine(keen, **options) as engine:
        first = engine.run(ASKS)
        assert (first.tokens, sum(first.host)) == (want, 0)
        assert stored(engine, ASKS, want).device == [0] * len(ASKS)
        again = engine.run(ASKS)
        assert (again.tokens, again.device) == (want, whole_pages(ASKS))
        assert len(io_processes(engine)) == ranks
    with Engine(keen, **options) as engine:
        end = time.monotonic() + 60
        while sum((ran := engine.run(ASKS)).host) == 0:  # what the disk has is there for who asks next
            assert ran.tokens == want
            engine.flush()
            assert time.monotonic() < end
        assert ran.tokens == want


@pytest.fixture(scope="module")
def small(keen: Path) -> Iterator[Engine]:
    """Room for 150 pages in memory; the device has 128."""
    settings = {"host": {"num_blocks": 150}, "observe": {"log_interval_s": 0.1}}
    with Engine(keen, **linker(settings)) as engine:
        yield engine


def test_more_than_memory_has_room_for(small: Engine, expect: Expect) -> None:
    """Requests that share prefixes, many at once, in device and host memory that are too small for them."""
    rng = np.random.default_rng(0)
    stems = prompts(20, 500, 400, 300, 600)
    asks = [
        stems[rng.integers(4)][: int(rng.integers(16, 600))] + tail
        for tail in prompts(21, *rng.integers(1, 80, 24).tolist())
    ]
    want = expect(asks)
    served = 0
    for _ in range(4):
        order = rng.permutation(len(asks)).tolist()
        ran = small.run_anew([asks[i] for i in order])
        assert ran.tokens == [want[i] for i in order]
        served += sum(ran.host)
    assert served > 500
    wait_logged(small, r"evicted (\d+)", 100)


def wait_logged(engine: Engine, pattern: str, least: int) -> None:
    end = time.monotonic() + 20
    while int((re.findall(pattern, engine.log(1 << 20)) or ["0"])[-1]) < least:
        assert time.monotonic() < end, engine.log()
        time.sleep(0.1)


def test_aborted_requests_leave_nothing_behind(small: Engine, expect: Expect) -> None:
    asks = prompts(30, *[300] * 12)
    want = expect(asks)
    ended = [small.call(run_and_abort, asks, delay_ms) for delay_ms in (0, 2, 5, 10, 20, 40)]
    assert any(0 < aborted < len(asks) for aborted in ended), ended
    # All memory can be used again: these prompts fill it.
    stored(small, asks[:7], want[:7])


def run_and_abort(engine: Any, asks: Sequence[Prompt], delay_ms: float) -> int:
    """Half of the requests are aborted after a while; how many were, before their end."""
    parameters = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}

    async def one(number: int, ask: Prompt) -> bool:
        answer = await engine.async_generate(
            input_ids=list(ask), sampling_params=parameters, rid=f"abort-{delay_ms}-{number}"
        )
        return answer["meta_info"]["finish_reason"]["type"] == "abort"

    async def all_of_them() -> int:
        running = [asyncio.create_task(one(*numbered)) for numbered in enumerate(asks)]
        await asyncio.sleep(delay_ms / 1000)
        for number in range(0, len(asks), 2):
            engine.tokenizer_manager.abort_request(rid=f"abort-{delay_ms}-{number}")
        return sum(await asyncio.gather(*running))

    return engine.loop.run_until_complete(all_of_them())
