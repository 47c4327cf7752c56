"""The disk tier below TensorRT-LLM, which waits for no answer: what is read is for whoever comes next."""

from pathlib import Path

import pytest

from tests.trtllm.conftest import Make
from tests.trtllm.executor import BLOCK, Executor
from tests.trtllm.test_connector import PROMPT, leader_of, stepped


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "64",
        "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path / "disk"),
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "1",
        "KVBM_DISK_MIN_FREE_GB": "0",
    }


def with_disk(engine: Executor) -> Executor:
    """The disk tier is ready, and nothing is under way."""

    def idle() -> bool:
        leader = engine.leader.side.leader
        return leader is not None and leader.ready and leader.disk.ready and not leader.has_work

    return stepped(engine, until=idle)


@pytest.mark.parametrize("ranks", [1, 2])
def test_after_a_restart(make: Make, plain: Make, env: dict[str, str], ranks: int) -> None:
    first = with_disk(make(ranks=ranks, env=env))
    expected = first.generate(PROMPT, 3)
    assert expected == plain(ranks=ranks).generate(PROMPT, 3)
    with_disk(first)
    assert leader_of(first).disk.stats.written_blocks == 6
    first.close()
    second = with_disk(make(ranks=ranks, env=env))
    assert leader_of(second).disk.stats.recovered_blocks == 6
    request = second.add(PROMPT, 3)
    second.run()
    assert request.output == expected
    with_disk(second)
    again = second.add(PROMPT, 3)
    second.run()
    assert again.matched == 5 * BLOCK
    assert again.output == expected
    assert leader_of(second).pool.num_registered >= 5


def test_what_only_the_disk_has_is_read_for_the_next_request(make: Make, env: dict[str, str]) -> None:
    engine = with_disk(make(env=env))
    expected = engine.generate(PROMPT, 3)
    with_disk(engine)
    leader_of(engine).administer(lambda upkeep, _: upkeep.clear("host", None))
    request = engine.add(PROMPT, 3)
    # Its own offloads would fill the host tier as well.
    engine.leader.side.match(request.handle, 0)
    engine.waiting.clear()
    with_disk(engine)
    assert leader_of(engine).disk.stats.read_blocks == 5
    again = engine.add(PROMPT, 3)
    engine.run()
    assert (again.matched, again.output) == (5 * BLOCK, expected)


def test_another_model_s_weights_are_not_served(make: Make, llm_args: object, env: dict[str, str]) -> None:
    first = with_disk(make(env=env))
    first.generate(PROMPT, 3)
    with_disk(first)
    assert leader_of(first).disk.stats.written_blocks == 6
    first.close()
    Path(llm_args.model, "model.safetensors").write_bytes(b"other")  # type: ignore[attr-defined]
    other = with_disk(make(env=env))
    assert leader_of(other).disk.stats.recovered_blocks == 0
