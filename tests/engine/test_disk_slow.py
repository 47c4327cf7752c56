"""A disk from which blocks come later than they are computed is left alone, and tried again."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine import disk_tools as disk
from tests.engine import scenarios
from tests.engine.conftest import Expect
from tests.engine.disk_tools import SMALL, DiskRan, SlowIo, settings
from tests.engine.harness import Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

BLOCKS = 8


@pytest.fixture(scope="module")
def slow_io(tmp_path_factory: pytest.TempPathFactory) -> SlowIo:
    return SlowIo(tmp_path_factory.mktemp("slow"))


@pytest.fixture(scope="module")
def engine(
    model: Path, baseline: Engine, slow_io: SlowIo, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    env = settings(
        tmp_path_factory.mktemp("disk"), disk=64, more={"KVBM_DISK_SKIP_SLOW_LOADS": "", **slow_io.env}
    )
    with Engine(model, kvbm={}, env=env, **SMALL) as engine:
        engine.wait_ready()
        yield engine


def timed(engine: Engine, function: Any, asks: list[Ask]) -> tuple[Any, float]:
    start = time.monotonic()
    return engine.call(function, asks), time.monotonic() - start


def retry_after(llm: Any, seconds: float) -> None:
    scenarios.leader(llm).disk._estimate.RETRY_S = seconds


def test_slow_loads_are_declined(engine: Engine, slow_io: SlowIo, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompts.make(900, BLOCKS * 32 + 8), 1)]
    want = expect(asks)
    engine.call(disk.store, asks)
    cold, cold_s = timed(engine, disk.compute, asks)

    slow_io.set(read_s=4.0)  # each: all are read at once
    first, first_s = timed(engine, disk.from_disk, asks)  # not known to be slow yet
    assert first.read == BLOCKS
    assert first_s > 4.0
    second, second_s = timed(engine, disk.from_disk, asks)
    assert (second.read, second.cached) == (0, [0])
    assert second.disk_after.declined - second.disk_before.declined == BLOCKS
    assert second_s < 2 * cold_s + 0.5
    assert [cold, first.tokens, second.tokens] == [want()] * 3
    assert second.at_rest

    # What the host tier has is no load from disk.
    host = engine.call(disk.run_again, asks)
    assert (host.cached, host.read) == ([BLOCKS * 32], 0)

    # Faster again: it is tried with a few blocks after a while, and in the end known to be fast.
    slow_io.set()
    engine.call(retry_after, 0.0)
    runs: list[DiskRan] = [engine.call(disk.from_disk, asks) for _ in range(12)]
    engine.call(retry_after, 1e9)
    last = engine.call(disk.from_disk, asks)
    assert [ran.read for ran in (*runs, last)] == [BLOCKS] * 13
    assert [ran.tokens for ran in (*runs, last)] == [want()] * 13
