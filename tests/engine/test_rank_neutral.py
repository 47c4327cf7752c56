"""Records on disk that another number of ranks has stored: each rank makes its own of them at start."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.storage.index_file import ENTRY, State
from tests.engine import disk_tools as disk
from tests.engine.disk_tools import SMALL, settings
from tests.engine.harness import Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask

TWO: dict[str, Any] = {**SMALL, "tensor_parallel_size": 2}


@pytest.mark.feature("Records on disk for any number of ranks (MHA, GQA)")
def test_what_one_stores_two_load_and_back(keen: Path, tmp_path: Path, prompts: Prompts) -> None:
    asks = [Ask(prompt, 8) for prompt in prompts.batch(1600, [100, 170, 257])]
    later = [Ask(prompt, 8) for prompt in prompts.batch(1610, [140, 200])]
    env = settings(tmp_path / "disk")
    folder = tmp_path / "disk" / "kvbm-0"

    with Engine(keen, kvbm={}, env=env, **SMALL) as one:
        by_one = one.call(disk.store, asks).tokens
    assert len({tuple(tokens) for tokens in by_one}) == len(asks)  # the answers depend on the prompt
    damage(folder / "rank-0")
    with Engine(keen, kvbm={}, env=env, **TWO) as two:
        found = two.call(disk.wait_ready)
        assert (found.recovered, found.written) == (3 + 5 + 8 - 1, 0)
        got = two.call(disk.from_disk, asks)
        assert got.tokens == two.call(disk.compute, asks)
        # Of the prompt with the damaged block what comes before it is a hit, of the others all is.
        lost = 3 + 5 + 8 - got.onboarded
        assert 1 <= lost <= 8
        assert got.read == got.onboarded
        assert got.disk_after.failures == {}
        two.call(disk.store, later)
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0", "rank-0-of-2", "rank-1-of-2"]
    with Engine(keen, kvbm={}, env=env, **SMALL) as one:
        assert one.call(disk.wait_ready).recovered == 3 + 5 + 8 + 4 + 6
        got = one.call(disk.from_disk, later)
        assert got.tokens == one.call(disk.compute, later)
        assert got.read == got.onboarded == 4 + 6


def damage(folder: Path) -> None:
    """The first stored record, in the midst of its data."""
    entries = np.fromfile(folder / "index.kvbm", ENTRY, offset=4096)
    slot = int(np.flatnonzero(entries["state"] == State.STORED)[0])
    with (folder / f"records-{slot % 4:02d}.kvbm").open("r+b") as file:
        file.seek(4096 + slot // 4 * (4096 + 32768) + 4096 + 20_000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
