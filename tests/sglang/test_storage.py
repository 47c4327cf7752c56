"""KVBM as a storage backend of a real SGLang engine: outputs, and where the KV of the prompts came from."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.disk_tools import io_processes, kill_io
from tests.sglang.conftest import Expect
from tests.sglang.harness import Engine, Ran, storage
from tests.sglang.prompts import TP2, Prompt, disk, prompts, whole_pages

ASKS = prompts(1, 600, 333, 47, 17, 5)


def stored(engine: Engine, asks: list[Prompt], want: list[list[int]]) -> Ran:
    """Ask until all that can be is served by the backend; outputs are right all the time."""
    end = time.monotonic() + 60
    while (ran := engine.run_anew(asks)).storage != whole_pages(asks):
        assert ran.tokens == want
        assert time.monotonic() < end, ran
    assert ran.tokens == want
    return ran


def test_two_ranks_and_a_restart(keen: Path, expect: Expect, tmp_path: Path) -> None:
    options = {**TP2, **storage(disk(tmp_path), "layer_first", "kernel")}
    want = expect(ASKS)
    with Engine(keen, **options) as engine:
        assert engine.run(ASKS).tokens == want
        stored(engine, ASKS, want)
        assert len(io_processes(engine)) == 2
    with Engine(keen, **options) as engine:
        ran = stored(engine, ASKS, want)
    assert ran.host == [0] * len(ASKS)


def test_a_backend_that_fails_and_is_slow(keen: Path, expect: Expect, tmp_path: Path) -> None:
    """SGLang's injector in between, and a backend whose I/O process is killed now and then."""
    asks = prompts(5, 400, 300, 200, 100, 333, 222)
    want = expect(asks)
    served = killed = 0
    env = {
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.3",
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.02",
    }
    with Engine(keen, env=env, **storage(disk(tmp_path, num_blocks=60))) as engine:
        for _ in range(8):
            ran = engine.run_anew(asks)
            assert ran.tokens == want
            served += sum(ran.storage)
            killed += kill_io(engine)
    assert served > 0
    assert killed > 0


# ---- one engine for all of these, last: an idle one keeps a core busy


@pytest.fixture(
    scope="module",
    params=[("page_first", "kernel", True), ("layer_first", "direct", False)],
    ids=["page_first-zero_copy", "layer_first-generic"],
)
def engine(request: pytest.FixtureRequest, keen: Path) -> Iterator[Engine]:
    layout, io, zero_copy = request.param
    with Engine(keen, **storage({"host": {"num_blocks": 400}}, layout, io, zero_copy=zero_copy)) as engine:
        yield engine


def test_outputs_are_the_same_from_storage(engine: Engine, expect: Expect) -> None:
    want = expect(ASKS)
    first = engine.run(ASKS)
    assert first.tokens == want
    assert not any(first.storage)
    assert stored(engine, ASKS, want).device == [0] * len(ASKS)
    again = engine.run(ASKS)
    assert (again.tokens, again.device) == (want, whole_pages(ASKS))


def test_a_longer_prompt_goes_on_where_the_stored_one_ends(engine: Engine, expect: Expect) -> None:
    (stem,) = prompts(2, 400)
    stored(engine, [stem], expect([stem]))
    asks = [stem + tail for tail in prompts(3, 100, 1, 250)]
    ran = engine.run_anew(asks)
    assert ran.tokens == expect(asks)
    assert ran.storage[0] == 400
    assert all(served >= 400 for served in map(sum, zip(ran.storage, ran.host, ran.device, strict=True)))


def test_salts_keep_requests_apart(engine: Engine, expect: Expect) -> None:
    asks = prompts(4, 300)
    want = expect(asks)
    stored(engine, asks, want)
    other = engine.run_anew(asks, cache_salt=["another"])
    assert (other.tokens, other.storage) == (want, [0])
