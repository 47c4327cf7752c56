"""What the leader asks of the workers, and what they answer.

An operation copies the bytes of blocks between device and host; every rank executes it on its own shard.
A completion says what really happened, block by block.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

BlockIds = NDArray[np.int32]


class Direction(IntEnum):
    OFFLOAD = 0  # device to host
    ONBOARD = 1  # host to device


class Failure(IntEnum):
    """Why blocks of an operation failed; of several reasons the greatest is reported."""

    NONE = 0
    CANCELLED = 1  # the device blocks were wanted for something else before the copy was over
    TIMEOUT = 2
    ERROR = 3  # the copy raised
    CORRUPT = 4  # the record does not have the checksum it was stored with


@dataclass(frozen=True, slots=True)
class Operation:
    """Copy block i between `device_blocks[i]` and `host_slots[i]`; a slot of -1 fails."""

    id: int
    direction: Direction
    request_id: str  # the request that waits for it; offloads of a step are batched and have none
    device_blocks: BlockIds
    host_slots: BlockIds
    timeout_s: float  # counted by each rank from its receipt: ranks need not share a clock
    # A load that the forward pass of the same step reads: the device orders that behind it.
    in_step: bool = False

    @property
    def positions(self) -> BlockIds:
        """Every position: what a `Completion` names when the operation failed as a whole."""
        return np.arange(len(self.host_slots), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Completion:
    """One rank's answer to one operation."""

    operation_id: int
    failed: BlockIds  # positions within the operation whose bytes did not arrive
    reason: Failure = Failure.NONE
    # False: the deadline has passed but the copy may still touch the blocks; another completion follows.
    quiesced: bool = True
