"""kill -9 at random moments: of the I/O process, of the engine, of both. Never a wrong token, never a hang.

KVBM_TEST_KILLS: how many of each, joined by commas. KVBM_TEST_SEED: of an earlier run; a failure names it.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine import disk_tools as disk
from tests.engine.conftest import Expect
from tests.engine.disk_tools import SMALL, SlowIo, settings
from tests.engine.harness import Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

IO_KILLS, ENGINE_KILLS, BOTH_KILLS = map(int, os.environ.get("KVBM_TEST_KILLS", "40,3,2").split(","))
SEED = int(os.environ.get("KVBM_TEST_SEED") or random.randrange(1 << 30))
ANSWER_S = 60.0  # a tenth of it is usual

# The host tier holds a fifth of the prompts, and the disk, whose slots are used again and again, a half.
HOST, DISK = 32, 80
LENGTHS = [70, 100, 130, 170, 200, 230, 257, 290]


@pytest.fixture(scope="module")
def pool(prompts: Prompts) -> list[Ask]:
    return [Ask(prompt, 12) for prompt in prompts.batch(2000, LENGTHS * 4)]


@pytest.fixture(scope="module")
def right(pool: list[Ask], expect_keen: Expect) -> Callable[[list[Ask]], list[list[int]]]:
    """The answers to some of the pool."""
    known = dict(zip((ask.prompt for ask in pool), expect_keen(pool)(), strict=True))
    return lambda asks: [known[ask.prompt] for ask in asks]


def sample(rng: random.Random, pool: list[Ask]) -> list[Ask]:
    return rng.sample(pool, rng.randrange(1, 7))


def slow_down(rng: random.Random, slow: SlowIo) -> None:
    """So that a kill meets reads or writes under way, or neither."""
    slow.set(read_s=rng.choice([0.0, 0.01, 0.04]), write_s=rng.choice([0.0, 0.01, 0.04]))


@pytest.mark.timeout(300 + 5 * IO_KILLS)
def test_io_process(
    keen: Path,
    tmp_path: Path,
    pool: list[Ask],
    right: Callable[[list[Ask]], list[list[int]]],
) -> None:
    """Many times under one engine, which goes on."""
    rng = random.Random(f"io {SEED}")
    slow = SlowIo(tmp_path)
    env = settings(tmp_path / "disk", host=HOST, disk=DISK, more=slow.env)
    kills = 0
    with Engine(keen, kvbm={}, env=env, prepare=disk.quick_restarts, **SMALL) as engine:
        engine.call(disk.wait_ready)
        while kills < IO_KILLS:
            where = f"seed {SEED}, kill {kills} of the I/O process"
            asks = sample(rng, pool)
            if rng.random() < 0.7:  # else it may be killed while it starts
                slow.set()
                engine.call(disk.wait_io)
                engine.call(disk.run_again, asks)
            slow_down(rng, slow)
            if rng.random() < 0.5:
                asks = [*asks, *sample(rng, pool)]
            answer = engine.begin(rng.choice([disk.run_again, disk.from_disk, disk.from_disk]), asks)
            time.sleep(0.3 * rng.random())
            kills += disk.kill_io(engine)
            got = answer(ANSWER_S)
            assert got.tokens == right(asks), where
            assert got.at_rest, f"{where}: {got.after} {got.disk_after}"
        slow.set()
        engine.call(disk.wait_io)
        some = pool[:4]
        engine.call(disk.store, some)
        last = engine.call(disk.from_disk, some)
    assert last.tokens == right(some), f"seed {SEED}"
    assert last.read == 2 + 3 + 4 + 5
    # The kills met both kinds of I/O, and the tier worked in between.
    failures = Counter(last.disk_after.failures)
    print(f"seed {SEED}: the I/O process was killed {kills} times; {last.disk_after}")
    if kills >= 30:
        assert failures["READ", "UNAVAILABLE"] > 0, f"seed {SEED}"
        assert failures["WRITE", "UNAVAILABLE"] > 0, f"seed {SEED}"
        assert last.disk_before.read > 2 * kills, f"seed {SEED}"
        assert last.disk_before.written > 2 * kills, f"seed {SEED}"


@pytest.mark.timeout(300 + 40 * (ENGINE_KILLS + BOTH_KILLS))
def test_engine(
    keen: Path,
    tmp_path: Path,
    pool: list[Ask],
    right: Callable[[list[Ask]], list[list[int]]],
) -> None:
    """Alone, or with its I/O process; the next engine finds the folder as it is left."""
    rng = random.Random(f"engine {SEED}")
    slow = SlowIo(tmp_path)
    env = settings(tmp_path / "disk", host=HOST, disk=DISK, more=slow.env)
    kinds = ["engine"] * ENGINE_KILLS + ["both"] * BOTH_KILLS
    rng.shuffle(kinds)
    seen: Counter[str] = Counter()
    before: list[Ask] = []  # asked when the engine before was killed
    for number, kind in enumerate([*kinds, ""]):
        where = f"seed {SEED}, life {number}, to be ended by a kill of {kind}"
        slow.set()
        engine = Engine(keen, kvbm={}, env=env, **SMALL)
        try:
            if kind and number and rng.random() < 0.2:
                time.sleep(12 * rng.random())
                seen["killed while starting"] += 1
            else:
                found = engine.call(disk.wait_ready).recovered
                seen["recovered"] += found
                for asks in ([*before, *sample(rng, pool)], sample(rng, pool)):
                    got = engine.call(disk.run_again, asks, deadline_s=ANSWER_S)
                    assert got.tokens == right(asks), where
                    assert got.at_rest, f"{where}: {got.after} {got.disk_after}"
                assert got.disk_after.off_reason is None, where
                seen["read"] += got.disk_after.read
                seen["corrupt"] += got.disk_after.failures.get(("READ", "CORRUPT"), 0)
                if not kind:
                    break
                slow_down(rng, slow)
                before = rng.sample(pool, 6)
                engine.begin(disk.from_disk, before)
                time.sleep(1.5 * rng.random())
            if kind == "both":
                engine.kill()
            else:
                disk.kill_engine(engine)
        finally:
            engine.close()
    print(f"seed {SEED}: {Counter(kinds)} kills; {seen}")
    # What an engine found, and served, came from those that were killed.
    assert seen["recovered"] > 0, f"seed {SEED}"
    assert seen["read"] > 0, f"seed {SEED}"
    assert seen["corrupt"] == 0, (
        f"seed {SEED}"
    )  # whoever was killed, an index names no record that is not whole
