"""An operation that the ranks are carrying out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.index import Slots
from kvbm.logic.operations import Completion, Failure, Operation


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
