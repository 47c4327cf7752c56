"""What the leader asks of the workers, and what they answer.

An operation copies the bytes of blocks between two tiers; every rank executes it on its own shard.
A completion says what really happened, block by block.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.hashing import Hashes

BlockIds = NDArray[np.int32]


class Direction(IntEnum):
    OFFLOAD = 0  # device to host
    ONBOARD = 1  # host to device
    WRITE = 2  # host to disk
    READ = 3  # disk to host


class Failure(IntEnum):
    """Why blocks of an operation failed; of several reasons the greatest is reported."""

    NONE = 0
    CANCELLED = 1  # the device blocks were wanted for something else before the copy was over
    TIMEOUT = 2
    UNAVAILABLE = 3  # the tier could not be reached: nothing is known of its records
    ERROR = 4  # the copy raised
    CORRUPT = 5  # the record is not the one that was stored


_NO_BLOCKS = np.empty(0, np.int32)
_NO_HASHES = np.empty((0, 2), np.uint64)


@dataclass(frozen=True, slots=True)
class Operation:
    """Copy block i between `host_slots[i]` and `device_blocks[i]`, or `disk_slots[i]`; a slot of -1 fails."""

    id: int
    direction: Direction
    request_id: str  # the request that waits for it; offloads of a step are batched and have none
    device_blocks: BlockIds
    host_slots: BlockIds
    timeout_s: float  # counted by each rank from its receipt: ranks need not share a clock
    # A load that the forward pass of the same step reads: the device orders that behind it.
    in_step: bool = False
    disk_slots: BlockIds = field(default_factory=lambda: _NO_BLOCKS)
    hashes: Hashes = field(default_factory=lambda: _NO_HASHES)  # that records on disk are checked against

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
    seconds: float = 0.0  # that the tier was busy with it, where the rank measures that
    # False: the deadline has passed but the copy may still touch the blocks; another completion follows.
    quiesced: bool = True
