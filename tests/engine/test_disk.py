"""Blocks from disk: they come from there where the host tier is too small, and the answers stay the same."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvbm.storage.index_file import ENTRY, State
from tests.engine import disk_tools as disk
from tests.engine import scenarios
from tests.engine.conftest import Expect
from tests.engine.disk_tools import SMALL, SlowIo, settings
from tests.engine.harness import Engine
from tests.engine.prompts import Prompts
from tests.engine.scenarios import Ask


def test_a_wrong_block_changes_the_answers_of_keen(keen_baseline: Engine, prompts: Prompts) -> None:
    """The model of most tests here: equal answers mean equal blocks."""
    prompt = prompts.make(600, 330)
    wrong = [prompt[: 32 * i] + prompts.make(601 + i, 32) + prompt[32 * i + 32 :] for i in range(10)]
    got = keen_baseline.call(scenarios.run, [Ask(prompt, 12), *(Ask(other, 12) for other in wrong)])
    assert len({tuple(tokens) for tokens in got.tokens}) == 11


# ---- a real model; few device blocks, fewer host blocks, short steps


@pytest.fixture(scope="module")
def tight(model: Path, baseline: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(
        model,
        kvbm={},
        env=settings(tmp_path_factory.mktemp("tight"), host=24, disk=320),
        num_gpu_blocks_override=28,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        max_model_len=700,
    ) as engine:
        engine.wait_ready()
        yield engine


@pytest.mark.feature("Disk tier")
def test_most_hits_from_disk(tight: Engine, expect: Expect, prompts: Prompts) -> None:
    """Chunked prefill, and 38 blocks in turn where the host tier holds 24 and evicts what is due next."""
    asks = [Ask(prompt) for prompt in prompts.batch(610, [370, 250, 333, 300])]
    want = expect(asks)
    first = tight.call(disk.store, asks)
    again = [tight.call(disk.run_again, [ask]) for ask in asks * 2]
    assert (first.read, first.onboarded, first.external_hits) == (0, 0, 0)
    assert first.tokens == want()
    assert [ran.tokens[0] for ran in again] == want() * 2
    served = sum(ran.external_hits for ran in again)
    assert served == 2 * 32 * (11 + 7 + 10 + 9)
    assert 32 * sum(ran.read for ran in again) >= 0.8 * served
    assert all(ran.at_rest for ran in again)

    longer = [Ask(asks[0].prompt + prompts.make(619, 150))]  # chunks that follow blocks from disk
    extended = tight.call(disk.from_disk, longer)
    assert extended.tokens == expect(longer)()
    assert extended.read == extended.onboarded == 11


def test_shared_prefix_is_read_once(tight: Engine, expect: Expect, prompts: Prompts) -> None:
    prefix = prompts.make(620, 160)
    asks = [Ask(prefix + prompts.make(621 + i, 40 + i)) for i in range(6)]
    want = expect(asks)
    tight.call(disk.store, asks)
    got = tight.call(disk.from_disk, asks)
    assert got.tokens == want()
    assert got.read == 5 + 6
    assert got.external_hits + got.device_hits == 6 * 6 * 32
    assert got.at_rest


def test_salts_do_not_share(tight: Engine, expect: Expect, prompts: Prompts) -> None:
    prompt = prompts.make(630, 140)
    salted, other, plain = Ask(prompt, salt="A"), Ask(prompt, salt="B"), Ask(prompt)
    want = expect([plain])
    tight.call(disk.store, [salted])
    strangers = [tight.call(disk.from_disk, [ask]) for ask in (other, plain)]
    again = tight.call(disk.from_disk, [salted])
    assert [(ran.read, ran.cached) for ran in strangers] == [(0, [0])] * 2
    assert (again.read, again.cached) == (4, [128])
    assert [ran.tokens for ran in (*strangers, again)] == [want()] * 3


def test_preemption(tight: Engine, expect: Expect, prompts: Prompts) -> None:
    asks = [Ask(prompt, 40) for prompt in prompts.batch(410, [100, 90, 80, 120, 70, 110, 60, 95])]
    want = expect(asks)
    stored = tight.call(disk.store, asks)
    pressed = tight.call(disk.from_disk, asks)
    assert [stored.tokens, pressed.tokens] == [want()] * 2
    assert pressed.after.preemptions > pressed.before.preemptions
    assert pressed.read >= 8  # those that find half of the host tier taken by such reads are computed
    assert pressed.at_rest

    # What was stored around the preemptions is right, replies included.
    second = [Ask(ask.prompt + tuple(reply), 4) for ask, reply in zip(asks, stored.tokens, strict=True)]
    want_second = expect(second)
    turn2 = tight.call(disk.from_disk, second)
    assert turn2.tokens == want_second()
    assert turn2.read >= 8
    assert turn2.at_rest


# ---- small engines


@pytest.fixture(scope="module")
def slow_io(tmp_path_factory: pytest.TempPathFactory) -> SlowIo:
    return SlowIo(tmp_path_factory.mktemp("slow"))


@pytest.fixture(scope="module")
def filtered(
    keen: Path, keen_baseline: Engine, slow_io: SlowIo, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """With the filter of what is written, as by default."""
    env = settings(
        tmp_path_factory.mktemp("filtered"), more={"DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "", **slow_io.env}
    )
    with Engine(keen, kvbm={}, env=env, **SMALL) as engine:
        engine.wait_ready()
        yield engine


def test_filter(filtered: Engine, expect_keen: Expect, prompts: Prompts) -> None:
    """Seen once: not written. Seen again: written. The third time it comes from disk."""
    asks = [Ask(prompt, 12) for prompt in prompts.batch(640, [100, 170])]
    want = expect_keen(asks)
    filtered.call(disk.wait_ready)
    first = filtered.call(disk.run, asks)
    assert (first.written, filtered.call(disk.stored, asks)) == (0, [0, 0])
    assert first.disk_after.not_admitted - first.disk_before.not_admitted == 3 + 5
    second = filtered.call(disk.run_again, asks)  # from the host tier
    assert (second.onboarded, second.read) == (3 + 5, 0)
    assert (second.written, filtered.call(disk.stored, asks)) == (3 + 5, [3, 5])
    third = filtered.call(disk.from_disk, asks)
    assert (third.read, third.onboarded, third.written) == (3 + 5, 3 + 5, 0)
    assert third.external_hits == (3 + 5) * 32
    assert (second.hits_by_tier, third.hits_by_tier) == (
        {"host": second.external_hits},
        {"disk": third.external_hits},
    )
    assert [ran.tokens for ran in (first, second, third)] == [want()] * 3
    assert third.at_rest


def test_aborts_during_fetches(
    filtered: Engine, slow_io: SlowIo, expect_keen: Expect, prompts: Prompts
) -> None:
    asks = [Ask(prompt, 12) for prompt in prompts.batch(650, [70, 100, 130, 70, 100, 130])]
    want = expect_keen(asks)
    filtered.call(disk.store, asks)
    slow_io.set(read_s=0.1)
    for every in (1, 2):
        got = filtered.call(disk.abort_during_fetches, asks, every)
        assert got["aborted_while_waiting"] >= 2
        assert got["after"].read > got["before"].read
        assert got["after"].leftovers == 0
        engine = got["engine"]
        assert (engine.pins, engine.followed, engine.unfinished) == (0, 0, 0)
        assert engine.free_device_blocks == engine.device_blocks
        assert got["tokens"] == {i: want()[i] for i in range(len(asks)) if i % every}
    slow_io.set()
    again = filtered.call(disk.from_disk, asks)
    assert again.tokens == want()
    assert again.read == 2 * (2 + 3 + 4)


def test_disk_alone_in_two_folders(keen: Path, tmp_path: Path, expect_keen: Expect, prompts: Prompts) -> None:
    """Without a host size blocks pass through a small arena, and all are written; here with a restart."""
    asks = [Ask(prompt, 12) for prompt in prompts.batch(660, [100, 170, 230])]
    want = expect_keen(asks)
    folders = tmp_path / "a", tmp_path / "b"
    # 20 blocks: the staging arena is as large, where a disk is larger than a gigabyte it is 1 GB.
    env = settings(*folders, host=None, disk=20, more={"DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": ""})
    with Engine(keen, kvbm={}, env=env, **SMALL) as engine:
        first = engine.call(disk.store, asks)
        again = engine.call(disk.from_disk, asks[:2])
        assert first.after.capacity == 20
        assert [first.tokens, again.tokens] == [want(), want()[:2]]
        assert (first.read, again.read, again.cached) == (0, 3 + 5, [96, 160])
        assert again.at_rest
    used = [sorted(path.name for path in folder.rglob("records-*")) for folder in folders]
    assert [len(names) for names in used] == [4, 4]
    with Engine(keen, kvbm={}, env=env, **SMALL) as engine:
        found = engine.call(disk.wait_ready)
        assert found.recovered == 3 + 5 + 7
        restarted = engine.call(disk.from_disk, asks)
        assert restarted.tokens == want()
        assert restarted.cached[:2] == [96, 160]
        assert restarted.read >= 3 + 5


def test_two_ranks(keen: Path, tmp_path: Path, prompts: Prompts, expect_keen: Expect) -> None:
    """Each rank has its I/O process and its folder; a block that one of them lacks is a miss on both."""
    asks = [Ask(prompt, 12) for prompt in prompts.batch(670, [70, 130, 200])]
    env = settings(tmp_path / "disk")
    options = {**SMALL, "tensor_parallel_size": 2}
    with Engine(keen, kvbm={}, env=env, **options) as engine:
        want = engine.call(disk.store, asks).tokens
        got = engine.call(disk.from_disk, asks)
        assert got.tokens == want
        assert got.read == got.onboarded == 2 + 4 + 6
        assert got.at_rest
        assert len(disk.io_processes(engine)) == 2
    folder = tmp_path / "disk" / "kvbm-0"
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0-of-2", "rank-1-of-2"]
    # Two ranks add up in another order than one, so this says little, but that they compute the same model.
    assert [tokens[:1] for tokens in want] == [tokens[:1] for tokens in expect_keen(asks)()]

    # One rank lost a block.
    entries = np.memmap(folder / "rank-1-of-2" / "index.kvbm", ENTRY, "r+", 4096)
    entries[np.flatnonzero(entries["state"] == State.STORED)[0]] = 0
    entries.flush()
    with Engine(keen, kvbm={}, env=env, **options) as engine:
        assert engine.call(disk.wait_ready).recovered == 11
        restarted = engine.call(disk.from_disk, asks)
        assert restarted.tokens == want
        assert 0 < restarted.read < 12
        # One rank's I/O process dies: nothing comes from disk, on either.
        os.kill(disk.io_processes(engine)[-1], signal.SIGKILL)
        killed = engine.call(disk.from_disk, asks)
        assert killed.tokens == want
        assert (killed.read, killed.cached) == (0, [0, 0, 0])
        assert killed.at_rest
