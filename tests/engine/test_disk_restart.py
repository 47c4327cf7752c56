"""What an engine finds on disk that another one left there, and what it must not find."""

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.storage.index_file import ENTRY, State
from tests.engine import disk_tools as disk
from tests.engine import scenarios
from tests.engine.conftest import Expect, make_keen, write_weights
from tests.engine.disk_tools import SMALL, SlowIo, settings
from tests.engine.harness import Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

BLOCKS = 3 + 5 + 8 + 4


@pytest.fixture(scope="module")
def asks(prompts: Prompts) -> list[Ask]:
    return [Ask(prompt, 12) for prompt in prompts.batch(700, [100, 170, 257, 130])]


@pytest.fixture(scope="module")
def model_of_this(keen: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of this module: the weights are those of `keen`, until a test changes them."""
    return make_keen(tiny, tmp_path_factory.mktemp("mine") / "model")


@pytest.fixture(scope="module")
def stored(model_of_this: Path, asks: list[Ask], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an engine left on disk that was stopped in order."""
    folder = tmp_path_factory.mktemp("stored") / "disk"
    with Engine(model_of_this, kvbm={}, env=settings(folder), **SMALL) as engine:
        assert engine.call(disk.store, asks).disk_after.recovered == 0
    return folder


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(stored, tmp_path / "disk")


def test_restarts(
    model_of_this: Path,
    folder: Path,
    tmp_path: Path,
    asks: list[Ask],
    expect_keen: Expect,
    prompts: Prompts,
) -> None:
    """After a clean stop, after kill -9 of everything while blocks are written, and after a reset."""
    want = expect_keen(asks)
    other = [Ask(prompt, 12) for prompt in prompts.batch(710, [300, 290, 310, 280])]
    want_other = expect_keen(other)
    slow = SlowIo(tmp_path)
    # Twice what lies on disk: the warm-up takes half of the host tier, and with it the right to fetch.
    env = settings(folder, host=128, more=slow.env)

    with Engine(model_of_this, kvbm={}, env=env, **SMALL) as engine:
        first = engine.call(disk.run, asks)  # the very first call: the requests wait for what is found
        assert first.tokens == want()
        assert first.disk_after.recovered == BLOCKS
        assert first.onboarded == first.read == BLOCKS
        assert first.cached == [96, 160, 256, 128]
        assert (first.written, first.at_rest) == (0, True)
        slow.set(write_s=0.1)
        assert engine.call(disk.begin_writes, other) > 20
        time.sleep(0.35)
        assert disk.io_processes(engine)
        engine.kill()
        assert not disk.io_processes(engine)

    slow.set()
    with Engine(model_of_this, kvbm={}, env=env, **SMALL) as engine:
        first = engine.call(disk.run, asks)
        assert first.tokens == want()
        assert first.cached == [96, 160, 256, 128]
        written = first.disk_after.recovered - BLOCKS
        assert 0 < written < 9 + 9 + 9 + 8  # some, as it was killed in the midst of it
        second = engine.call(disk.from_disk, other)
        assert second.tokens == want_other()
        assert second.at_rest
        # What was being written is known to be half done: nothing is tried that turns out not to be there.
        assert second.disk_after.failures == {}
        # A reset forgets all; what is stored after it is of weights that only this run knows.
        engine.call(disk.store, other)
        assert engine.call(scenarios.reset, False, True)
        cold = engine.call(disk.run, asks)
        assert (cold.tokens, cold.cached) == (want(), [0] * 4)
        engine.call(scenarios.reset, False, True)
        engine.call(disk.store, asks[:1])

    with Engine(model_of_this, kvbm={}, env=env, **SMALL) as engine:
        found = engine.call(disk.wait_ready)
        assert found.recovered == 3
        last, gone = engine.call(disk.run, asks), engine.call(disk.run, other)
        assert [last.tokens, gone.tokens] == [want(), want_other()]
        assert (last.cached, last.onboarded) == ([0] * 4, 0)
        assert (gone.cached, gone.onboarded) == ([0] * 4, 0)
        # The engine is told to forget all, and stopped before anybody asks it for anything.
        assert sum(engine.call(disk.stored, other)) > 20
        assert engine.call(scenarios.reset, False, True)
        engine.call(scenarios.drain)
    index = np.fromfile(folder / "kvbm-0" / "rank-0" / "index.kvbm", ENTRY, offset=4096)
    assert (index["state"] == State.FREE).all()


def test_flipped_bits(model_of_this: Path, folder: Path, asks: list[Ask], expect_keen: Expect) -> None:
    """One bit in each of 12 records, in the fields of its header or in its data."""
    seed = int(os.environ.get("KVBM_TEST_SEED") or random.randrange(1 << 30))
    rng = random.Random(seed)
    want = expect_keen(asks)
    files = sorted((folder / "kvbm-0" / "rank-0").glob("records-*"))
    stride = 4096 + 32768
    used = [
        (path, offset)
        for path in files
        for offset in range(4096, path.stat().st_size, stride)
        if any(_read(path, offset, 64))
    ]
    assert len(used) == BLOCKS
    harmed = 12
    for path, offset in rng.sample(used, harmed):
        at = rng.choice([rng.randrange(100), 4096 + rng.randrange(32768)])
        _flip(path, offset + at, 1 << rng.randrange(8))
    with Engine(model_of_this, kvbm={}, env=settings(folder), **SMALL) as engine:
        first = engine.call(disk.run, asks)
        assert first.tokens == want(), f"seed {seed}"
        failed = first.disk_after.failures.get(("READ", "CORRUPT"), 0)
        assert failed == harmed, f"seed {seed}"  # all is read when the engine starts
        # What was damaged is gone, and stored anew.
        engine.call(disk.store, asks)
        again = engine.call(disk.from_disk, asks)
        assert again.tokens == want(), f"seed {seed}"
        assert again.cached == [96, 160, 256, 128], f"seed {seed}"
        assert again.disk_after.failures == again.disk_before.failures, f"seed {seed}"


@pytest.fixture
def changed(request: pytest.FixtureRequest, model_of_this: Path) -> tuple[Path, dict[str, Any]]:
    """Model and options of an engine that computes other bytes. The weights stay changed: they come last."""
    options: dict[str, Any] = {}
    if request.param == "weights":
        write_weights(model_of_this, seed=2)
    elif request.param == "dtype":
        options["dtype"] = "bfloat16"
    else:
        options["block_size"] = 64
    return model_of_this, options


@pytest.mark.parametrize("changed", ["dtype", "block size", "weights"], indirect=True)
def test_other_bytes_are_not_found(
    changed: tuple[Path, dict[str, Any]], folder: Path, asks: list[Ask], expect_keen: Expect
) -> None:
    path, options = changed
    with Engine(path, kvbm={}, env=settings(folder), **SMALL, **options) as engine:
        first = engine.call(disk.run, asks)
        assert (first.disk_after.ready, first.disk_after.recovered) == (True, 0)
        assert first.cached == [0] * 4
        assert first.tokens == engine.call(disk.compute, asks)
        # The tier works: what is stored now is found, and overwrites what was there.
        engine.call(disk.store, asks)
        again = engine.call(disk.from_disk, asks)
        assert again.read == again.onboarded > 0
        assert again.tokens == first.tokens
    if not options:
        assert first.tokens != expect_keen(asks)()


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _flip(path: Path, offset: int, bits: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ bits]))
