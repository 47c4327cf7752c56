"""An operation that the ranks are carrying out."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.followed import NO_BLOCK, Followed
from kvbm.logic.index import Slots
from kvbm.logic.operations import BlockIds, Completion, Direction, Failure, Operation

_OFFLOAD = Direction.OFFLOAD  # reading a member of an IntEnum costs a microsecond in Python 3.11


@dataclass(slots=True, kw_only=True)
class InFlight:
    """What is known of one operation. slots: its host slots."""

    operation: Operation
    slots: Slots
    waiting_for: set[int]  # ranks
    started: float
    deadline: float
    failed: NDArray[np.bool_]
    reason: Failure = Failure.NONE
    expired: bool = False
    seconds: float = 0.0  # of the slowest rank

    def report(self, rank: int, completion: Completion) -> bool:
        """Take in a rank's word; whether it was waited for."""
        if rank not in self.waiting_for:
            return False
        self.fail(completion.failed, completion.reason)
        self.seconds = max(self.seconds, completion.seconds)
        if completion.quiesced:
            self.waiting_for.discard(rank)
        return True

    def fail(self, positions: NDArray[np.integer] | slice, reason: Failure) -> None:
        self.failed[positions] = True
        self.reason = max(self.reason, reason)

    @property
    def is_over(self) -> bool:
        """No rank touches its blocks any more."""
        return not self.waiting_for


@dataclass(slots=True, kw_only=True)
class DeviceCopy(InFlight):
    """An offload or a load."""

    members: list[tuple[Followed, BlockIds]]  # whose blocks these are, with their device blocks
    held: list[BlockIds] = field(default_factory=list)  # device blocks kept from reuse until it settles
    prefix: int = 0  # blocks of the sequence that a load covers

    @property
    def is_offload(self) -> bool:
        return self.operation.direction == _OFFLOAD

    @property
    def targets(self) -> BlockIds:
        """Device blocks that a load writes to."""
        blocks = self.operation.device_blocks
        return blocks[blocks != NO_BLOCK]

    @property
    def failed_slots(self) -> Slots:
        return self.slots[self.failed & (self.slots >= 0)]
