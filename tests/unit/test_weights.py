"""Weights that change under a running engine: nothing of the old ones is used for the new ones."""

import pytest

from kvbm.observe.requests import Miss
from tests.unit.observed_engine import Engine, tokens_of

A = tokens_of(4)
PROMPT_A = [*A, 7]


@pytest.fixture
def e() -> Engine:
    engine = Engine(disk=32)
    engine.serve("a", PROMPT_A)
    assert (engine.in_host(A), engine.on_disk(A)) == (4, 4)
    return engine


def test_blocks_of_the_old_weights_are_misses(e: Engine) -> None:
    assert e.admin.new_weights("step 1") == "step 1"
    assert (e.in_host(A), e.on_disk(A)) == (0, 0)
    record = e.serve("b", PROMPT_A)
    assert (record.host_tokens, record.disk_tokens) == (0, 0)
    assert e.serve("c", PROMPT_A).host_tokens == 16
    e.check_idle()


def test_the_name_of_the_weights_finds_their_blocks_again(e: Engine) -> None:
    e.admin.new_weights("step 1")
    e.serve("b", PROMPT_A)
    e.admin.new_weights("step 2")
    assert e.in_host(A) == 0
    e.admin.new_weights("step 1")
    assert (e.in_host(A), e.on_disk(A)) == (4, 4)
    other = e.restart()
    assert other.on_disk(A) == 4  # of the weights that it starts with
    other.admin.new_weights("step 1")
    assert other.on_disk(A) == 4
    other.admin.new_weights("step 2")
    assert other.on_disk(A) == 0


def test_weights_without_a_name_are_like_no_others(e: Engine) -> None:
    names = {e.admin.new_weights() for _ in range(3)}
    assert len(names) == 3
    e.serve("b", PROMPT_A)
    assert e.in_host(A) == 4
    assert e.restart().on_disk(A) == 4  # those of its own weights: not of these
    e.admin.new_weights()
    assert e.in_host(A) == 0


def test_a_reset_by_the_engine_is_a_change_of_weights(e: Engine) -> None:
    """It forgets everything at once, and what is stored from then on is not taken for the first weights'."""
    assert e.leader.reset()
    e.settle()
    e.serve("b", PROMPT_A)
    assert (e.in_host(A), e.on_disk(A)) == (4, 4)
    assert e.restart().on_disk(A) == 0


def test_the_explanation_says_so(e: Engine) -> None:
    e.now += 5
    e.admin.new_weights("step 1")
    e.now += 2
    e.serve("b", PROMPT_A)
    words = "the model's weights had changed, or all caches were reset, 2.0 s before"
    assert e.why("b") == (Miss.CLEARED, f"Block 0 was missed: {words}.")
    e.serve("other", [*tokens_of(4, 900), 7])
    assert e.why("other")[0] == Miss.NEVER_SEEN


def test_blocks_on_their_way_are_never_registered(e: Engine) -> None:
    prompt = [*tokens_of(4, 500), 7]
    old = e.hashes(prompt)
    e.arrive("b", prompt)
    e.admit("b")
    e.compute("b")
    (offload,) = e.step().operations
    e.admin.new_weights("step 1")
    e.done(offload)
    e.settle()
    assert (e.pool.find(old) < 0).all()
    e.end("b")
    e.settle()
    assert (e.pool.find(old) < 0).all(), "what it computed since is of both weights"
    assert e.in_host(prompt) == 0
    e.check_idle()


def test_who_waits_meanwhile_gets_nothing_of_the_old_weights(e: Engine) -> None:
    e.arrive("b", PROMPT_A)
    e.admin.new_weights("step 1")
    assert e.admit("b") == 0
    e.compute("b")
    e.end("b")
    e.settle()
    assert (e.in_host(A), e.on_disk(A)) == (0, 0)
    e.check_idle()


def test_no_block_that_is_stored_is_looked_at(e: Engine) -> None:
    """So that it takes no longer for more of them."""
    version, registered = e.pool.version, e.pool.num_registered
    e.admin.new_weights("step 1")
    assert (e.pool.version, e.pool.num_registered) == (version, registered)
