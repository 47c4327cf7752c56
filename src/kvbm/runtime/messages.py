"""What leader and workers say to each other beside operations and completions. Picklable, engine-neutral."""

from dataclasses import dataclass, field

from kvbm.logic.hashing import Hashes
from kvbm.logic.operations import BlockIds, Completion, Operation


@dataclass(slots=True)
class StepOrders:
    """Leader to all ranks, once an engine step."""

    operations: list[Operation] = field(default_factory=list)
    cancel: list[int] = field(default_factory=list)  # operations whose device blocks are being reused
    tokens: int = 0  # that the model computes in this step
    timed: bool = False  # how long that takes is of interest: rank 0 tells when it is over
    forget: list[int] = field(default_factory=list)  # disk slots whose records must not be found again
    forget_all: bool = False


@dataclass(slots=True)
class WorkerReport:
    """One rank to the leader. A rank says how much of its memory is ready, or why nothing can be cached."""

    rank: int
    num_slots: int = 0
    ready_slots: int = 0  # the first so many can be used; it grows while memory is pinned
    loads_in_step: bool = False
    refused: str | None = None
    completions: list[Completion] = field(default_factory=list)
    timed: bool = False  # on a step that was to be timed
    # What an earlier run left on disk, piece by piece: slots (n,), hashes (n, 2).
    found: tuple[BlockIds, Hashes] | None = None
    found_all: bool = False  # that was the last piece
    foreign_records: bool = False  # what was there is of another model or geometry
    disk_refused: str | None = None
