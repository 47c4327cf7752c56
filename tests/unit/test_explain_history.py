"""Explanations from what is remembered of a block, and their form."""

import numpy as np
import pytest

from kvbm.logic.history import BlockHistory, Fate
from kvbm.logic.operations import Completion
from kvbm.observe.explain import describe, explain
from kvbm.observe.requests import FirstMiss, Identity, Miss, RequestLog
from tests.unit.observed_engine import BLOCK, READ, Engine, tokens_of

PROMPT = [*tokens_of(4), 7]


def explained(history: BlockHistory, *, at: float = 10.0, word: int = 5) -> tuple[Miss | None, str]:
    log = RequestLog(4, BLOCK)
    log.arrived("a", 1.0, 40, Identity())
    log.answered("a", at, 0, 4, FirstMiss(2, word))
    record = log.find("a")
    assert record is not None
    explanation = explain(record, log.newest(), history)
    return explanation.miss, explanation.text


def of(*entries: tuple[str, Fate, float]) -> BlockHistory:
    history = BlockHistory(100)
    for tier, fate, at in entries:
        history.add(np.array([[5, 9]], np.uint64), tier, fate, at, wanted=1)
    return history


@pytest.mark.parametrize("fate", list(Fate))
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_every_fate_has_words(fate: Fate, tier: str) -> None:
    miss, text = explained(of((tier, fate, 7.5)))
    assert miss is not None
    assert text.startswith("Block 2 was missed: ")
    assert "2.5 s before" in text
    assert tier in text or fate == Fate.NOT_ADMITTED


@pytest.mark.parametrize(
    ("entries", "miss"),
    [
        # Refused once, written later: what became of it then counts.
        ("disk NOT_ADMITTED, disk EVICTED, host EVICTED", Miss.EVICTED),
        ("disk NOT_ADMITTED, disk CLEARED, host EVICTED", Miss.EVICTED),
        ("disk NOT_ADMITTED, disk DAMAGED, host EVICTED", Miss.EVICTED),
        ("disk NOT_ADMITTED, disk LOST, host EVICTED", Miss.COPY_FAILED),
        ("disk EVICTED, disk NOT_ADMITTED, host EVICTED", Miss.NOT_ADMITTED),
        ("disk NOT_ADMITTED, host CLEARED", Miss.CLEARED),
        ("disk NOT_ADMITTED, host DAMAGED", Miss.FAILED_CHECK),
        ("host EVICTED, disk EVICTED", Miss.EVICTED),
        ("host LOST, disk DAMAGED", Miss.FAILED_CHECK),
    ],
)
def test_what_counts_when_much_befell_it(entries: str, miss: Miss) -> None:
    pairs = [entry.split() for entry in entries.split(", ")]
    history = of(*((tier, Fate[fate], float(at)) for at, (tier, fate) in enumerate(pairs)))
    assert explained(history)[0] == miss


def test_of_an_explanation_the_first_word_counts() -> None:
    """The history forgets; what a finished request was told once, it is told again."""
    e = Engine(host=8, observe__history_blocks=16)
    e.serve("a", PROMPT)
    e.lose_host()
    e.serve("b", PROMPT)
    told = e.why("b")
    assert told[0] == Miss.EVICTED
    for i in range(20):
        e.serve(str(i), tokens_of(8, 1000 * (i + 1)))
    assert e.why("b") == told


def test_as_json() -> None:
    e = Engine()
    e.serve("a", PROMPT)
    told = e.admin.request("a")
    record = e.record("a")
    assert told == describe(record, e.admin._explain(record, [record]))
    assert told == {
        "id": "a",
        "at": 1e9 + 5000.0,
        "finished": True,
        "prompt_tokens": 17,
        "device_tokens": 0,
        "host_tokens": 0,
        "disk_tokens": 0,
        "failed_tokens": 0,
        "computed_tokens": 17,
        "saved_seconds": 0.0,
        "missed_block": 0,
        "reason": "never seen",
        "explanation": "Block 0 was missed: these tokens were never seen, or too long ago.",
    }


def test_without_metrics_fates_are_not_remembered() -> None:
    e = Engine(host=8, observe__metrics=False)
    e.serve("a", PROMPT)
    e.lose_host()
    assert len(e.observer.history._words) == 1
    assert e.observer.history._next == 0


def test_reads_in_flight_explain_nothing_to_others() -> None:
    """A second request for the same blocks waits for the same read, and hits."""
    e = Engine(disk=32)
    e.serve("a", PROMPT)
    e.lose_host()
    e.arrive("b", PROMPT)
    e.arrive("c", PROMPT)
    assert e.admit("b") is None
    assert e.admit("c") is None
    (read,) = e.step().operations
    assert read.direction == READ
    e.report(0, [Completion(read.id, np.empty(0, np.int32))])
    assert e.admit("c") is None
    e.report(1, [Completion(read.id, np.empty(0, np.int32))])
    assert (e.admit("b"), e.admit("c")) == (4, 4)
    e.settle()
    assert (e.why("b")[0], e.why("c")[0]) == (None, None)
    assert (e.record("b").disk_tokens, e.record("c").host_tokens) == (4 * BLOCK, 4 * BLOCK)
