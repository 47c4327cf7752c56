"""KVBM in TensorRT-LLM's executor loop: what is said is the same, and really came from the host tier."""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbm.errors import LostLoadError, UnsupportedEngineError
from kvbm.logic.operations import Direction, Failure
from tests.trtllm import interface
from tests.trtllm.conftest import Make
from tests.trtllm.executor import BLOCK, LAYERS, Executor

PROMPT = list(range(100, 100 + 5 * BLOCK + 2))


def leader_of(engine: Executor) -> Any:
    leader = engine.leader.side.leader
    assert leader is not None
    return leader


def warmed(engine: Executor) -> Executor:
    """The leader has heard of all ranks, and what is being copied has been copied."""
    return settled(engine)


def stepped(engine: Executor, until: Callable[[], bool]) -> Executor:
    end = time.monotonic() + 30
    while not until():
        assert time.monotonic() < end
        engine.generate([1], 2)
    return engine


def settled(engine: Executor) -> Executor:
    def idle() -> bool:
        leader = engine.leader.side.leader
        return leader is not None and leader.ready and not leader.has_work

    return stepped(engine, until=idle)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(
    "mode", [{}, {"chunk": 6}, {"overlap": True}, {"grouped": True}, {"reuse": True}], ids=str
)
def test_served_from_the_host(make: Make, plain: Make, ranks: int, mode: dict[str, Any]) -> None:
    engine = warmed(make(ranks=ranks, **mode))
    expected = plain(ranks=ranks, **mode).generate(PROMPT, 9)
    assert engine.generate(PROMPT, 9) == expected
    settled(engine).forget()
    request = engine.add(PROMPT, 9)
    engine.run()
    assert request.output == expected
    assert request.matched == 5 * BLOCK
    assert leader_of(engine).stats.onboarded_blocks == 5


@pytest.mark.parametrize("overlap", [False, True])
def test_a_conversation_goes_on_with_blocks_of_the_reply(make: Make, plain: Make, overlap: bool) -> None:
    engine = warmed(make(overlap=overlap))
    reply = engine.generate(PROMPT, 12)
    settled(engine)
    turn = [*PROMPT, *reply, 7, 8]
    request = engine.add(turn, 4)
    engine.run()
    # All but the last token of the reply were computed.
    assert request.matched == (len(PROMPT) + len(reply) - 1) // BLOCK * BLOCK
    assert request.output == plain().generate(turn, 4)


def test_the_calls_are_those_that_tensorrt_llm_counts(make: Make) -> None:
    engine = warmed(make())
    before = engine.calls.copy()
    tokens = 8
    engine.add(PROMPT, tokens)
    steps = 0
    while engine.waiting or engine.running:
        engine.step()
        steps += 1
    calls = engine.calls - before
    assert steps == tokens
    assert calls["build_connector_meta"] == calls["start_load_kv"] == calls["wait_for_save"] == tokens
    assert calls["wait_for_layer_load"] == calls["save_kv_layer"] == LAYERS * tokens
    assert calls["get_num_new_matched_tokens"] == calls["request_finished"] == 1
    assert calls["get_finished"] == tokens


def test_beside_what_the_device_has(make: Make, plain: Make) -> None:
    """A shorter prompt is found on the device, what follows on the host."""
    engine = warmed(make(reuse=True))
    engine.generate(PROMPT, 3)
    settled(engine).forget()
    engine.generate(PROMPT[: 2 * BLOCK + 1], 1)
    request = engine.add(PROMPT, 3)
    engine.run()
    assert request.matched == 3 * BLOCK or request.matched == 5 * BLOCK - 2 * BLOCK
    assert request.output == plain().generate(PROMPT, 3)


def test_half_a_block_on_the_device_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = warmed(make())
    engine.generate(PROMPT, 3)
    settled(engine)
    request = engine.add(PROMPT)
    assert engine.leader.get_num_new_matched_tokens(request.handle, 2) == (0, False)
    assert engine.leader.get_num_new_matched_tokens(request.handle, 0) == (5 * BLOCK, True)


@pytest.mark.parametrize(
    "other",
    [{"salt": "b"}, {"salt": None}, {"salt": "a", "adapter": 1}, {"salt": "a", "adapter": 2}],
    ids=str,
)
def test_salts_and_adapters_are_apart(make: Make, plain: Make, other: dict[str, Any]) -> None:
    engine = warmed(make())
    engine.generate(PROMPT, 3, salt="a")
    settled(engine)
    request = engine.add(PROMPT, 3, **other)
    engine.run()
    assert request.matched == 0
    assert request.output == plain().generate(PROMPT, 3, **other)
    settled(engine)
    again = engine.add(PROMPT, 3, **other)
    engine.run()
    assert again.matched == 5 * BLOCK
    assert again.output == request.output


def test_a_salt_of_which_only_the_number_is_known(make: Make) -> None:
    engine = warmed(make())
    engine.generate(PROMPT, 3)
    settled(engine)
    handle = engine.add(PROMPT).handle
    del handle.cache_salt
    handle.cache_salt_id = 17
    assert engine.leader.get_num_new_matched_tokens(handle, 0) == (0, False)


def test_a_multimodal_request_is_refused_and_counted(make: Make) -> None:
    engine = warmed(make())
    handle = engine.add(PROMPT).handle
    handle.multimodal_hashes = [[1] * 8]
    assert engine.leader.get_num_new_matched_tokens(handle, 0) == (0, False)
    assert leader_of(engine).not_cached == {"multimodal request": 1}


@pytest.mark.parametrize(
    ("minimum", "priority", "stored"), [(36, None, 0), (35, 40, 5), (50, 40, 0), (0, 0, 5), (35, None, 5)]
)
def test_priorities(make: Make, minimum: int, priority: int | None, stored: int) -> None:
    env = {"DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": str(minimum)}
    engine = warmed(make(env=env))
    engine.generate(PROMPT, 1, priority=priority)
    assert leader_of(settled(engine)).pool.num_registered == stored


def test_what_comes_after_a_block_of_low_priority_is_not_offloaded(make: Make) -> None:
    engine = warmed(make(env={"DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY": "20"}))
    build = engine.leader.build_connector_meta

    def with_priorities(output: Any) -> Any:
        for data in output.new_requests:
            data.priorities = [50, 20, 19, 50, 50, 50][: len(data.new_block_ids)]
        return build(output)

    engine.leader.build_connector_meta = with_priorities
    engine.generate(PROMPT, 9)
    assert leader_of(settled(engine)).pool.num_registered == 2


def test_blocks_without_page_are_skipped(make: Make) -> None:
    """-1 is a valid index of a tensor: its last block, which is another request's."""
    engine = warmed(make())
    build = engine.leader.build_connector_meta

    def without_page(output: Any) -> Any:
        for data in output.new_requests:
            data.new_block_ids[2:3] = [-1]
        metadata = build(output)
        for operation in metadata.orders.operations:
            assert (operation.device_blocks >= 0).all()
        return metadata

    engine.leader.build_connector_meta = without_page
    engine.generate(PROMPT, 9)
    assert leader_of(settled(engine)).pool.num_registered == 2


def test_a_load_skips_blocks_without_page(make: Make) -> None:
    engine = warmed(make())
    engine.generate(PROMPT, 3)
    settled(engine)
    request = engine.add(PROMPT)
    side = engine.leader.side
    assert side.match(request.handle, 0) == 5 * BLOCK
    side.allocated(request.handle, [9, -1, 11, 12, -1, 14])
    metadata = side.build(interface.SchedulerOutput())
    loads = [op for op in metadata.orders.operations if op.direction == Direction.ONBOARD]
    assert sorted(np.concatenate([op.device_blocks for op in loads]).tolist()) == [9, 11, 12]
    assert all((op.host_slots >= 0).all() for op in loads)
    assert metadata.loading == [str(request.request_id)]


def test_a_request_is_kept_until_the_slowest_rank_has_copied(make: Make, slow: Any) -> None:
    engine = warmed(make(ranks=2))
    gate = slow(engine.workers[1])
    request = engine.add(PROMPT, 2)
    for _ in range(6):
        engine.step()
    assert request in engine.finished
    assert request.request_id in engine._saving
    gate.set()
    engine.run()
    assert not engine._saving


def test_a_request_waits_for_the_slowest_rank_s_load(make: Make, plain: Make, slow: Any) -> None:
    engine = warmed(make(ranks=2))
    engine.generate(PROMPT, 3)
    settled(engine)
    gate = slow(engine.workers[1])
    request = engine.add(PROMPT, 3)
    other = engine.add([5, 6, 7], 3)
    for _ in range(50):
        engine.step()
    assert request.request_id in engine._loading
    assert len(other.output) == 3  # others go on
    gate.set()
    engine.run()
    assert request.matched == 5 * BLOCK
    assert request.output == plain(ranks=2).generate(PROMPT, 3)


def test_an_aborted_load_keeps_its_blocks_until_it_is_over(make: Make, plain: Make, slow: Any) -> None:
    engine = warmed(make(ranks=2))
    engine.generate(PROMPT, 3)
    settled(engine)
    gate = slow(engine.workers[1])
    request = engine.add(PROMPT, 3)
    engine.step()
    engine.cancel(request)
    for _ in range(5):
        engine.step()
    blocks = set(request.blocks)
    assert blocks
    assert not blocks & set(engine.free)
    gate.set()
    engine.run()
    assert blocks <= set(engine.free)
    assert engine.generate(PROMPT, 3) == plain(ranks=2).generate(PROMPT, 3)


def test_offloads_of_a_request_that_is_not_in_the_step_are_not_believed(make: Make, slow: Any) -> None:
    """It may have been paused, and its blocks given to others: the interface does not tell."""
    engine = warmed(make())
    gate = slow(engine.workers[0])
    request = engine.add(PROMPT, 9)
    engine.step()
    engine.running.remove(request)
    engine.add([3, 4, 5, 6], 2)
    engine.step()
    gate.set()
    settled(engine)
    assert leader_of(engine).pool.num_registered == 1  # of the other request
    assert leader_of(engine).stats.failures[Direction.OFFLOAD, Failure.CANCELLED] == 5


def test_a_request_that_begins_again(make: Make, plain: Make) -> None:
    """TensorRT-LLM's second scheduler pauses requests: their blocks go, and the connector is asked again."""
    engine = warmed(make(chunk=6))
    request = engine.add(PROMPT, 9)
    for _ in range(3):
        engine.step()
    engine.free += request.blocks
    request.blocks, request.reported, request.reported_blocks, request.reported_tokens = [], False, 0, 0
    request.computed = 0
    engine.run()
    assert request.output == plain().generate(PROMPT, 9)
    # Blocks that were given up may not have been offloaded again.
    assert settled(engine).generate(PROMPT, 9) == request.output
    again = settled(engine).add(PROMPT, 9)
    engine.run()
    assert (again.matched, again.output) == (5 * BLOCK, request.output)


def test_what_reads_the_blocks_of_a_request_that_begins_again_is_not_believed(make: Make, slow: Any) -> None:
    engine = warmed(make())
    gate = slow(engine.workers[0])
    request = engine.add(PROMPT, 9)
    engine.step()
    engine.leader.side.match(request.handle, 0)
    assert engine.leader.side.build(interface.SchedulerOutput()).orders.cancel
    gate.set()


@pytest.mark.parametrize("error", ["off", "raises"])
def test_blocks_are_kept_where_an_error_forgot_who_reads_them(
    make: Make, slow: Any, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    engine = warmed(make())
    gate = slow(engine.workers[0])
    request = engine.add(PROMPT, 2)
    engine.step()
    if error == "off":
        leader_of(engine).off_reason = "a bug"
    else:
        monkeypatch.setattr(engine.leader.side, "finish", None)
    for _ in range(4):
        engine.step()
    assert request in engine.finished
    assert request.request_id in engine._saving
    gate.set()
    engine.run()


def test_metadata_are_carried_out_once(make: Make, slow: Any) -> None:
    """A step without requests has none, and is begun with those of the step before."""
    engine = warmed(make())
    engine.generate(PROMPT, 3)
    settled(engine)
    gate = slow(engine.workers[0])
    engine.add(PROMPT, 3)
    engine.step()
    engine.workers[0].start_load_kv(None)
    gate.set()
    engine.run()
    assert leader_of(settled(engine)).stats.onboarded_blocks == 5


def test_news_of_a_request_that_begins_again_are_not_guessed_at(make: Make) -> None:
    """Versions that don't say that it begins again count its new blocks from those that it had."""
    engine = warmed(make())
    side, request = engine.leader.side, engine.add(PROMPT)
    side.match(request.handle, 0)
    side.allocated(request.handle, [0, 1, 2, 3, 4, 5])
    stale = interface.RequestData(request.request_id, PROMPT[:4], [9], 0, len(PROMPT))
    metadata = side.build(interface.SchedulerOutput(cached_requests=[stale]))
    assert not metadata.orders.operations


def test_a_damaged_record_stops_the_engine(make: Make) -> None:
    """There is no way to take an answer back, and never is a wrong token said."""
    engine = warmed(make())
    engine.generate(PROMPT, 3)
    settled(engine)
    records = engine.workers[0].side._worker._records
    records.arena.records()[leader_of(engine).pool.tagged(np.uint32(0))] ^= 1
    engine.add(PROMPT, 3)
    with pytest.raises(LostLoadError, match="corrupt"):
        engine.run()


def test_a_load_that_was_never_ordered_stops_the_engine(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = warmed(make())
    engine.generate(PROMPT, 3)
    settled(engine)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.leader.side, "allocated", fail)
    engine.add(PROMPT, 3)
    with pytest.raises(LostLoadError, match="never ordered"):
        engine.run()


def test_clearing_between_promise_and_order_waits(make: Make) -> None:
    """What was promised is not lost to an administrator."""
    engine = warmed(make())
    engine.generate(PROMPT, 3)
    settled(engine)
    leader = leader_of(engine)
    request, second = engine.add(PROMPT), engine.add(PROMPT)
    for asked in (request, second):
        assert engine.leader.side.match(asked.handle, 0) == 5 * BLOCK
    clearing = threading.Thread(target=lambda: leader.administer(lambda upkeep, _: upkeep.clear(None, None)))
    clearing.start()
    clearing.join(0.1)
    assert clearing.is_alive()
    engine.leader.side.allocated(request.handle, [10, 11, 12, 13, 14, 15])
    clearing.join(0.1)
    assert clearing.is_alive()
    engine.leader.side.allocated(second.handle, [20, 21, 22, 23, 24, 25])
    clearing.join()
    metadata = engine.leader.side.build(interface.SchedulerOutput())
    loads = [op for op in metadata.orders.operations if op.direction == Direction.ONBOARD]
    assert len(loads) == 2
    assert all((load.host_slots >= 0).all() for load in loads)


@pytest.mark.parametrize("hook", ["match", "allocated", "build", "finish"])
def test_an_error_of_ours_turns_caching_off(
    make: Make, plain: Make, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    engine = warmed(make())

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.leader.side, hook, fail)
    expected = plain().generate(PROMPT, 3)
    assert engine.generate(PROMPT, 3) == expected
    assert engine.leader.side.refused.startswith("internal error")
    monkeypatch.undo()
    assert engine.generate(PROMPT, 3) == expected
    assert leader_of(engine).off_reason is not None


def test_an_error_on_a_rank_turns_caching_off(
    make: Make, plain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = warmed(make(ranks=2))

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.workers[1].side, "start_offloads", fail)
    assert engine.generate(PROMPT, 3) == plain(ranks=2).generate(PROMPT, 3)
    assert "internal error" in engine.leader.side.refused


def test_a_rank_that_dies(make: Make, plain: Make) -> None:
    engine = warmed(make(ranks=2))
    engine.generate(PROMPT, 3)
    settled(engine)
    engine.workers[1].side._sender.close()
    request = engine.add(PROMPT, 3)
    engine.run()
    assert request.matched == 0
    assert request.output == plain(ranks=2).generate(PROMPT, 3)
    assert engine.leader.side.refused == "rank 1 is gone"


def test_a_full_tier(make: Make, plain: Make) -> None:
    engine = warmed(make(env={"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "3"}))
    expected = plain().generate(PROMPT, 6)
    for _ in range(2):
        assert engine.generate(PROMPT, 6) == expected
        settled(engine)
    request = engine.add(PROMPT, 6)
    engine.run()
    assert (request.matched, request.output) == (3 * BLOCK, expected)
    assert leader_of(engine).stats.deferred_blocks > 0


@pytest.mark.parametrize("seed", range(6))
def test_random_histories(make: Make, plain: Make, seed: int) -> None:
    rng = random.Random(seed)
    mode = {
        "ranks": rng.choice([1, 2]),
        "chunk": rng.choice([5, 1000]),
        "reuse": rng.random() < 0.5,
        "overlap": rng.random() < 0.5,
        "grouped": rng.random() < 0.5,
        "num_blocks": rng.choice([24, 40]),
    }
    slots = rng.choice([6, 20, 64])
    engine = warmed(make(env={"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(slots)}, **mode))
    asked: list[Any] = []
    texts = [[rng.randrange(900) for _ in range(40)] for _ in range(3)]
    for _ in range(60):
        if rng.random() < 0.4:
            text = rng.choice(texts)
            prompt = text[: rng.randrange(1, len(text))]
            finished = [request for request in asked if request in engine.finished and not request.cancelled]
            if finished and rng.random() < 0.4:
                prompt = rng.choice(finished).tokens[:40]
            salt, adapter = rng.choice([None, "x"]), rng.choice([None, None, 3])
            asked.append(engine.add(prompt, rng.randrange(1, 9), salt=salt, adapter=adapter))
        if asked and rng.random() < 0.03:
            engine.cancel(rng.choice(asked))
        engine.step()
    engine.run()
    # Whatever has happened, the cache still works.
    asked.append(engine.add(texts[0][:30], 3))
    engine.run()
    settled(engine).forget()
    asked.append(engine.add(texts[0][:30], 3))
    engine.run()
    assert asked[-1].matched > 0, f"seed {seed}"
    assert sorted(engine.free) == list(range(mode["num_blocks"]))
    reference = plain(**{**mode, "overlap": False, "reuse": False})
    for request in asked:
        if not request.cancelled:
            again = reference.generate(
                request.tokens[: request.prompt], request.max_new, salt=request.salt, adapter=request.adapter
            )
            assert request.output == again, f"seed {seed}, request {request.request_id}"
    assert engine.leader.side.refused is None
    assert not leader_of(engine).stats.failures[Direction.ONBOARD, Failure.CORRUPT]


@pytest.mark.skipif(interface.INSTALLED, reason="the installed version has one location")
def test_the_older_location() -> None:
    with interface.provided(interface.OLD, "1.2.1"):
        from kvbm.trtllm_integration import connector

        assert connector._interface.__name__ == interface.OLD


@pytest.mark.skipif(interface.INSTALLED, reason="the installed version is what it is")
def test_an_untested_version(llm_args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with interface.provided(version="1.5.0"):
        from kvbm.trtllm_integration.connector import DynamoKVBMConnectorLeader

        with pytest.raises(UnsupportedEngineError, match="KVBM_ALLOW_UNTESTED_ENGINE"):
            DynamoKVBMConnectorLeader(llm_args)
        monkeypatch.setenv("KVBM_ALLOW_UNTESTED_ENGINE", "1")
        DynamoKVBMConnectorLeader(llm_args).side.close()
