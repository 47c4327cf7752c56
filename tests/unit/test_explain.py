"""Why a request missed: each reason, provoked in a leader by what causes it in an engine."""

from typing import Any

import pytest

from kvbm.logic.operations import Failure
from kvbm.observe.requests import Identity, Miss
from tests.unit.observed_engine import BLOCK, NO_RECORDS, OFFLOAD, TIMEOUT_S, WRITE, Engine, tokens_of

PROMPT = [*tokens_of(4), 7]  # a token to compute beyond four blocks


def test_a_hit() -> None:
    e = Engine()
    e.serve("a", PROMPT)
    record = e.serve("b", PROMPT)
    assert record.host_tokens == 4 * BLOCK
    assert e.why("b") == (None, "Nothing was missed: all blocks that could be of use were there.")
    e.serve("c", PROMPT, device=4)
    assert e.why("c")[0] is None


def test_a_prompt_of_less_than_a_block_misses_nothing() -> None:
    e = Engine()
    e.serve("a", [1, 2, 3])
    assert e.why("a")[0] is None


def test_never_seen() -> None:
    e = Engine()
    e.serve("a", PROMPT)
    assert e.why("a") == (
        Miss.NEVER_SEEN,
        "Block 0 was missed: these tokens were never seen, or too long ago.",
    )
    e.serve("longer", PROMPT + tokens_of(2, 900))
    assert e.why("longer")[0] == Miss.NEVER_SEEN
    assert e.why("longer")[1].startswith("Block 4 was missed")


def test_evicted() -> None:
    e = Engine(host=8)
    e.serve("a", PROMPT)
    e.step(seconds=3.0)
    e.serve("other", tokens_of(7, 500))  # three blocks need room, which the tail of the first gives
    e.step(seconds=2.5)
    e.serve("b", PROMPT)
    reason, text = e.why("b")
    assert reason == Miss.EVICTED
    assert (
        text
        == "Block 1 was missed: it was evicted from the host tier 2.5 s before, when 3 blocks needed room."
    )
    assert e.record("b").host_tokens == BLOCK


def test_given_up_as_the_tier_was_made_smaller() -> None:
    e = Engine()
    e.serve("a", PROMPT)
    e.admin.resize("host", 1)
    e.step(seconds=1.0)
    e.serve("b", PROMPT)
    reason, text = e.why("b")
    assert reason == Miss.EVICTED
    assert "given up 1.0 s before, when the host tier was made smaller" in text


def test_what_happens_after_the_answer_is_no_reason() -> None:
    e = Engine(host=8)
    e.serve("a", PROMPT)
    e.step(seconds=1.0)
    e.serve("other", tokens_of(8, 500))
    assert e.why("a")[0] == Miss.NEVER_SEEN


def test_not_admitted_to_disk() -> None:
    e = Engine(disk=32, disk__disable_filter=False)
    e.serve("a", PROMPT)
    e.step(seconds=4.0)
    e.lose_host()
    e.step(seconds=2.0)
    e.serve("b", PROMPT)
    reason, text = e.why("b")
    assert reason == Miss.NOT_ADMITTED
    assert "it was evicted from the host tier 2.0 s before, when" in text
    assert "it was not admitted to disk 6.0 s before" in text


def test_evicted_from_both_tiers_after_it_was_admitted() -> None:
    e = Engine(disk=4, disk__disable_filter=False)
    e.serve("a", PROMPT)
    e.serve("a again", PROMPT)
    assert e.on_disk(PROMPT) == 4
    for i in range(2):
        e.serve(f"other{i}", tokens_of(4, 500))
    e.lose_host()
    e.step(seconds=1.0)
    e.serve("b", PROMPT)
    assert e.why("b")[0] == Miss.EVICTED


@pytest.mark.parametrize("what", [{"salt": "x"}, {"adapter": "x"}])
def test_other_salt_or_adapter(what: dict[str, Any]) -> None:
    e = Engine()
    e.serve("a", PROMPT)
    e.step(seconds=1.0)
    e.serve("b", PROMPT, **what)
    assert e.record("b").host_tokens == 0
    assert e.why("b")[0] == Miss.OTHER_IDENTITY
    assert e.why("a")[0] == Miss.NEVER_SEEN, "who came first had nobody to share with"
    e.serve("c", tokens_of(4, 500), **what)
    assert e.why("c")[0] == Miss.NEVER_SEEN
    e.serve("d", [*PROMPT, *tokens_of(2, 900)], **what)
    assert e.why("d")[0] == Miss.NEVER_SEEN, "its first blocks were there, so it is not that"


def test_other_namespace() -> None:
    e = Engine(disk=32, ready=False)
    e.find(NO_RECORDS, foreign_records=True)
    e.serve("a", PROMPT)
    assert e.why("a")[0] == Miss.OTHER_NAMESPACE
    e.serve("b", PROMPT)
    assert e.why("b")[0] is None


def test_a_record_that_fails_its_check_in_the_load() -> None:
    """The request that meets it is told so, and is computed from there on."""
    e = Engine()
    e.serve("a", PROMPT)
    e.arrive("b", PROMPT)
    assert e.admit("b") == 4
    (load,) = e.step().operations
    e.done(load, failed=[1, 2], reason=Failure.CORRUPT)
    reason, text = e.why("b")
    assert reason == Miss.FAILED_CHECK
    assert text.startswith("Block 1 was missed: its record failed its check")
    record = e.record("b")
    assert (record.host_tokens, record.failed_tokens) == (BLOCK, 2 * BLOCK)
    assert record.computed_tokens == len(PROMPT) - BLOCK

    # Who comes before it is stored anew learns the same from the history.
    e.serve("c", PROMPT)
    assert e.why("c")[0] == Miss.FAILED_CHECK
    assert "its record in the host tier failed its check" in e.why("c")[1]


def test_a_load_that_fails_behind_what_the_device_has() -> None:
    e = Engine()
    e.serve("a", PROMPT)
    e.arrive("b", PROMPT)
    assert e.admit("b", device=1) == 3
    (load,) = e.step().operations
    e.done(load, failed=[1], reason=Failure.CORRUPT)
    assert e.why("b")[1].startswith("Block 2 was missed: its record failed its check")


def test_a_disk_record_that_fails_its_check() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT)
    e.lose_host()
    e.arrive("b", PROMPT)
    assert e.admit("b") is None
    (read,) = e.step().operations
    e.done(read, failed=[2], reason=Failure.CORRUPT)
    assert e.admit("b") == 2
    reason, text = e.why("b")
    assert reason == Miss.FAILED_CHECK
    assert text.startswith("Block 2 was missed: its record in the disk tier failed its check 0.0 s before")
    e.settle()
    assert e.record("b").disk_tokens == 2 * BLOCK


def test_a_damage_that_is_found_when_it_is_written_to_disk() -> None:
    e = Engine(disk=32)
    e.arrive("a", PROMPT)
    e.admit("a")
    e.compute("a")
    e.done(*e.step().operations)
    e.end("a")
    (write,) = e.step().operations
    assert write.direction == WRITE
    e.done(write, failed=[0], reason=Failure.CORRUPT)
    e.serve("b", PROMPT)
    assert e.why("b")[0] == Miss.FAILED_CHECK
    assert "in the host tier" in e.why("b")[1]


def test_declined_as_slower() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT)
    e.lose_host()
    e.leader._estimate.computed(100_000, 0.001)
    e.leader._estimate.read(10, 1000.0, e.now)
    record = e.serve("b", PROMPT)
    assert record.disk_tokens == 0
    reason, text = e.why("b")
    assert reason == Miss.DECLINED
    assert text == "Block 0 was missed: it was on disk but not read: computing it is faster."


def test_no_room_for_the_read() -> None:
    e = Engine(host=4, disk=32)
    for i in range(2):  # two blocks at once are written
        e.serve(f"a{i}", PROMPT)
        e.lose_host()
    assert e.on_disk(PROMPT) == 4
    e.arrive("b", PROMPT)
    while e.admit("b") is None:  # two blocks are read: half of the host tier
        e.settle()
    assert e.record("b").answered
    assert e.why("b")[0] == Miss.TIER_FULL
    assert e.why("b")[1].startswith("Block 2 was missed: it was on disk but not read: others were reading")


def test_a_read_that_fails() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT)
    e.lose_host()
    e.arrive("b", PROMPT)
    assert e.admit("b") is None
    (read,) = e.step().operations
    e.done(read, failed=[0, 1, 2, 3], reason=Failure.UNAVAILABLE)
    assert e.admit("b") == 0
    assert e.why("b")[0] == Miss.COPY_FAILED


def test_a_read_that_takes_too_long() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT)
    e.lose_host()
    e.arrive("b", PROMPT)
    assert e.admit("b") is None
    e.step(seconds=2 * TIMEOUT_S - 0.1)
    e.now += 0.2
    assert e.admit("b") == 0
    assert e.why("b")[0] == Miss.COPY_FAILED


def test_a_load_that_fails() -> None:
    e = Engine()
    e.serve("a", PROMPT)
    e.arrive("b", PROMPT)
    assert e.admit("b") == 4
    (load,) = e.step().operations
    e.done(load, failed=[0, 1, 2, 3], reason=Failure.TIMEOUT)
    reason, text = e.why("b")
    assert reason == Miss.COPY_FAILED
    assert text == "Block 0 was missed: its load failed or was given up (timeout)."
    assert e.record("b").host_tokens == 0


def test_tier_full() -> None:
    """All slots are in use by a request that runs: what it computes beyond them is not stored."""
    e = Engine(host=4)
    e.arrive("big", tokens_of(6))
    e.admit("big")
    e.compute("big")
    e.settle()
    e.now += 1.0
    e.serve("b", [*tokens_of(6), 7], device=0)
    assert e.why("b")[0] == Miss.TIER_FULL
    assert e.why("b")[1] == "Block 4 was missed: the host tier had no room for it 1.0 s before."


def test_a_block_that_finds_no_room_is_told_of_once() -> None:
    """It is wanted again in every step: the history would soon know nothing else."""
    e = Engine(host=4)
    e.arrive("big", tokens_of(6))
    e.admit("big")
    for _ in range(50):
        e.compute("big")
        e.settle()
    assert len(e.observer.history.find(int(e.hashes(tokens_of(6))[5, 0]))) == 1
    e.end("big")
    e.serve("b", tokens_of(6))
    e.lose_host()
    e.step(seconds=1.0)
    e.serve("c", tokens_of(6))
    assert e.why("c")[0] == Miss.EVICTED


def test_no_room_on_disk() -> None:
    e = Engine(disk=32, disk__max_queued_blocks=1)
    e.serve("a", PROMPT)
    e.lose_host()
    e.step(seconds=1.0)
    e.serve("b", PROMPT)
    reason, text = e.why("b")
    assert reason == Miss.TIER_FULL
    assert text.startswith("Block 1 was missed: it was evicted from the host tier 1.0 s before, when")
    assert "and the disk tier had no room for it" in text


def test_a_write_to_disk_that_failed() -> None:
    e = Engine(disk=32)
    e.arrive("a", PROMPT)
    e.admit("a")
    e.compute("a")
    e.done(*e.step().operations)
    e.end("a")
    (write,) = e.step().operations
    e.done(write, failed=[0, 1, 2, 3], reason=Failure.ERROR)
    e.settle()
    e.lose_host()
    e.serve("b", PROMPT)
    reason, text = e.why("b")
    assert reason == Miss.COPY_FAILED
    assert "evicted from the host tier" in text
    assert "to or from the disk tier failed" in text


def test_feature_not_supported() -> None:
    e = Engine()
    e.leader.refuse("pooling request", "a", 40)
    assert e.why("a") == (Miss.UNSUPPORTED, "KVBM was not asked: pooling request.")
    e.leader.ended("a")
    e.serve("stored", PROMPT)
    e.arrive("b", PROMPT)
    e.leader.answered("b", 0, 0, 0, "the request asks not to read the cache")
    e.end("b")
    assert e.why("b") == (
        Miss.UNSUPPORTED,
        "KVBM was not asked: the request asks not to read the cache.",
    )
    assert e.observer.log.host_rate.wanted == 4, "such requests are no part of the rate"


def test_still_being_written() -> None:
    e = Engine()
    e.arrive("a", PROMPT)
    e.admit("a")
    e.compute("a")
    (offload,) = e.step().operations
    assert offload.direction == OFFLOAD
    e.arrive("b", PROMPT)
    assert e.admit("b") == 0
    assert e.why("b") == (
        Miss.BEING_WRITTEN,
        "Block 0 was missed: its bytes were still on their way to the host tier.",
    )


def test_still_being_written_to_disk() -> None:
    e = Engine(disk=32)
    e.arrive("a", PROMPT)
    e.admit("a")
    e.compute("a")
    e.done(*e.step().operations)
    e.end("a")
    (write,) = e.step().operations
    e.admin.clear("host")
    e.arrive("b", PROMPT)
    assert e.admit("b") == 0
    assert e.why("b") == (
        Miss.BEING_WRITTEN,
        "Block 0 was missed: it was still being written to disk.",
    )
    e.done(write)


@pytest.mark.parametrize("how", ["all", "host", "salt", "engine"])
def test_cleared(how: str) -> None:
    e = Engine()
    e.serve("a", PROMPT, salt="x")
    match how:
        case "all":
            e.admin.clear()
        case "host":
            e.admin.clear("host")
        case "salt":
            e.admin.clear(salt="x")
        case _:
            e.leader.reset()
    e.step(seconds=9.0)
    e.serve("b", PROMPT, salt="x")
    words = "the host tier was cleared 9.0 s before"
    if how == "engine":
        words = "the model's weights had changed, or all caches were reset, 9.0 s before"
    assert e.why("b") == (Miss.CLEARED, f"Block 0 was missed: {words}.")


def test_an_offload_that_was_cut_off() -> None:
    e = Engine()
    e.arrive("a", PROMPT)
    e.admit("a")
    e.compute("a")
    orders = e.step()
    e.leader.preempt("a")
    e.step()
    e.done(*orders.operations, failed=[0, 1, 2, 3], reason=Failure.CANCELLED)
    e.end("a", computed=0)
    e.serve("b", PROMPT)
    assert e.why("b")[0] == Miss.COPY_FAILED


def test_before_the_cache_is_ready() -> None:
    e = Engine(disk=32)
    e.pool.usable, e.leader.upkeep._ready = 0, 0
    e.serve("a", PROMPT)
    assert e.why("a")[0] == Miss.NOT_READY


def test_before_it_is_known_what_lies_on_disk() -> None:
    e = Engine(disk=32, ready=False)
    e.step()
    e.arrive("a", PROMPT)
    assert e.admit("a") is None
    assert e.why("a") == (None, "The request waits: the engine has not started on it.")
    e.step(seconds=5.1)  # it waits no longer
    assert e.admit("a") == 0
    assert e.why("a") == (
        Miss.NOT_READY,
        "Block 0 was missed: what lies on disk was not known yet.",
    )


def test_when_caching_is_off() -> None:
    e = Engine()
    e.leader.off_reason = "ranks [1] did not report in time"
    e.observer.arrived("a", 16, Identity())
    e.leader.answered("a", 0, 0, 3)
    reason, text = e.why("a")
    assert reason == Miss.NOT_READY
    assert "ranks [1] did not report in time" in text


def test_on_a_disk_that_is_off() -> None:
    e = Engine(disk=32)
    e.serve("a", PROMPT)
    e.lose_host()
    e.report(0, disk_refused="the drive is gone")
    e.serve("b", PROMPT)
    reason, text = e.why("b")
    assert reason == Miss.COPY_FAILED
    assert "the drive is gone" in text


def test_a_request_that_ends_before_the_engine_starts_on_it() -> None:
    e = Engine()
    e.arrive("a", PROMPT)
    assert e.why("a") == (None, "The request waits: the engine has not started on it.")
    e.end("a", computed=0)
    assert e.why("a") == (None, "The request ended before the engine had started on it.")
