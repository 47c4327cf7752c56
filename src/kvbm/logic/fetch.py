"""What a request has on disk, and what of it is brought to the host tier."""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.groups import KvGroups
from kvbm.logic.hashing import Hashes
from kvbm.logic.index import Slots
from kvbm.logic.pool import BlockPool, BlockState

NO_SLOTS = np.empty(0, np.int64)
# Reading a member of an IntEnum costs a microsecond in Python 3.11.
_REGISTERED = np.uint8(BlockState.REGISTERED)


class FetchEnd(Enum):
    """Why a request does not get all that it has on disk."""

    SLOWER = "computing it is faster"
    NO_ROOM = "others were reading"
    PAUSED = "the disk had failed"
    LATE = "reading took too long"


@dataclass(slots=True)
class Fetch:
    """A request's blocks on their way to the host tier, and kept there until it has used them."""

    slots: Slots = field(default_factory=lambda: NO_SLOTS)
    deadline: float = 0.0
    from_disk: Slots = field(default_factory=lambda: NO_SLOTS)  # those of them that are read for it
    ends: FetchEnd | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """Where the blocks of a sequence are, for each group: host slots, and disk slots of what is registered.

    reads: of the first 1 .. n blocks together, see `KvGroups.cost`.
    """

    host: list[Slots]
    disk: list[Slots]
    reads: NDArray[np.int64]


def survey(groups: KvGroups, host: BlockPool, disk: BlockPool, hashes: Hashes) -> Survey:
    """Of a sequence's blocks."""
    in_host = groups.lookup(host.find, hashes)
    on_disk = groups.lookup(disk.registered, hashes)
    here = [slots >= 0 for slots in in_host]
    below = [(slots >= 0) & ~near for slots, near in zip(on_disk, here, strict=True)]
    there = [near | far for near, far in zip(here, below, strict=True)]
    return Survey(in_host, on_disk, groups.cost(below, there))
