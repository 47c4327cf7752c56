"""What leader and workers say to each other beside operations and completions. Picklable, engine-neutral."""

from dataclasses import dataclass, field

from kvbm.logic.operations import Completion, Operation


@dataclass(slots=True)
class StepOrders:
    """Leader to all ranks, once an engine step."""

    operations: list[Operation] = field(default_factory=list)
    cancel: list[int] = field(default_factory=list)  # operations whose device blocks are being reused
    computes: bool = True  # this step runs the model: offloads wait for it


@dataclass(slots=True)
class WorkerReport:
    """One rank to the leader. A rank says how much of its memory is ready, or why nothing can be cached."""

    rank: int
    num_slots: int = 0
    ready_slots: int = 0  # the first so many can be used; it grows while memory is pinned
    loads_in_step: bool = False
    refused: str | None = None
    completions: list[Completion] = field(default_factory=list)
