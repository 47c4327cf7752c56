"""What the tests of this folder do to an engine beside `tests.engine.scenarios`, executed in its process."""

from typing import Any

from tests.engine import features
from tests.engine.lazy_loads import in_forward_pass
from tests.engine.scenarios import copy_engine

_COUNTS = {"in step": 0, "early": 0}


def count_in_step_loads(llm: Any) -> None:
    engine = copy_engine(llm)
    original = engine.start_in_step

    def counted(*args: Any) -> Any:
        _COUNTS["in step"] += 1
        _COUNTS["early"] += not in_forward_pass()
        return original(*args)

    engine.start_in_step = counted


def in_step_loads(llm: Any) -> tuple[int, int]:
    """All, and those that were started while the step was planned."""
    return _COUNTS["in step"], _COUNTS["early"]


def blocks_are_contiguous(llm: Any) -> bool:
    return copy_engine(llm)._pieces.copies == 1


def seed_weights() -> None:
    """Before the start: made-up weights with which an answer depends on its prompt."""
    features._seed_weights(3)
