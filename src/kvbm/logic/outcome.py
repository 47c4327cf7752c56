"""What the planner tells: what follows from an event, and what happened so far."""

from collections import Counter
from dataclasses import dataclass, field

from kvbm.logic.edges import Edge
from kvbm.logic.operations import BlockIds, Direction, Failure


@dataclass(slots=True)
class Stats:
    """What happened, counted in blocks when it was complete."""

    matched_blocks: int = 0  # offered to the engine and accepted
    shared_blocks: int = 0  # full blocks that needed no copy because the host had them
    deferred_blocks: int = 0  # found no room, or the queue full; counted each time they were wanted
    failures: Counter[tuple[Direction, Failure]] = field(default_factory=Counter)  # in blocks
    offload: Edge = field(default_factory=Edge)
    onboard: Edge = field(default_factory=Edge)

    @property
    def offloaded_blocks(self) -> int:
        return self.offload.blocks

    @property
    def onboarded_blocks(self) -> int:
        return self.onboard.blocks


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load that is over. The engine computes from the first block that failed on."""

    operation_id: int
    request_id: str
    arrived: int  # blocks
    failed: int
    usable: int  # that arrived before the first that failed
    reason: Failure


@dataclass(slots=True)
class Outcome:
    """What follows from what was just planned or reported: device blocks to hold and release."""

    hold: list[BlockIds] = field(default_factory=list)  # must not be reused until released
    release: list[BlockIds] = field(default_factory=list)  # offloads no longer read them
    release_loaded: list[BlockIds] = field(default_factory=list)  # loads that had hung no longer write them
    loaded: Loaded | None = None
