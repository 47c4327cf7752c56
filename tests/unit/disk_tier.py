"""A disk tier whose ranks are the test: what it orders is looked at, and answered as the test likes."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvbm.logic.admission import FrequencyFilter, WriteBudget
from kvbm.logic.disk import DiskLimits, DiskTier
from kvbm.logic.estimate import LoadEstimate
from kvbm.logic.groups import KvGroups
from kvbm.logic.hashing import Hashes
from kvbm.logic.history import Fate
from kvbm.logic.index import Slots
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.logic.policies import EvictionPolicy, Lru
from kvbm.logic.pool import BlockPool, BlockState

ALL_HASHES: Hashes = np.random.default_rng(11).integers(0, 2**64, (100_000, 2), np.uint64)
NO_HASHES: Hashes = np.empty((0, 2), np.uint64)
TIMEOUT_S = 10.0


def names(*numbers: int) -> Hashes:
    return ALL_HASHES[list(numbers)].reshape(-1, 2)


def numbers_of(hashes: Hashes) -> list[int]:
    number_of = {row.tobytes(): i for i, row in enumerate(ALL_HASHES[:1000])}
    return [number_of[row.tobytes()] for row in hashes]


class Tier:
    """Blocks are numbers; requests ask for lists of them. Time passes in `step` only."""

    def __init__(
        self,
        *,
        ranks: int = 2,
        host: int = 16,
        disk: int = 32,
        host_policy: type[EvictionPolicy] = Lru,
        disk_policy: type[EvictionPolicy] = Lru,
        admission: FrequencyFilter | None = None,
        budget: WriteBudget | None = None,
        estimate: LoadEstimate | None = None,
        groups: KvGroups | None = None,
        ready: bool = True,
        **limits: Any,
    ) -> None:
        self.ranks = ranks
        self.now = 100.0
        self.host = BlockPool(host, host_policy)
        self.pool = BlockPool(disk, disk_policy, tier="disk", usable=0)
        self.forgotten: list[int] = []
        self.tier = DiskTier(
            self.host,
            self.pool,
            ranks=ranks,
            ids=itertools.count(),
            drop=self.drop,
            groups=groups,
            limits=DiskLimits(**{"timeout_s": TIMEOUT_S, **limits}),
            admission=admission,
            budget=budget,
            estimate=estimate,
        )
        if ready:
            for rank in range(ranks):
                self.found(rank)
            self.step()
            assert self.tier.ready

    @property
    def stats(self) -> Any:
        return self.tier.stats

    def drop(self, slots: Slots, fate: Fate) -> None:
        self.host.withdraw(slots[self.host.states(slots) >= BlockState.COMPLETE], fate)

    def step(self, seconds: float = 0.0) -> list[Operation]:
        """Time passes; the orders of the step."""
        self.now += seconds
        self.tier.tick(self.now)
        operations, forget = self.tier.take_orders()
        self.forgotten += forget
        return operations

    def found(self, rank: int, records: Sequence[tuple[int, int]] = (), *, last: bool = True) -> None:
        """records: slot and block."""
        slots = np.array([slot for slot, _ in records], np.int32)
        self.tier.found(rank, slots, names(*(number for _, number in records)), last)

    # ---- the host tier ----

    def hold(self, *numbers: int) -> None:
        """The host tier has these, new or used again, and the disk tier is told."""
        slots, is_new = self.host.claim(names(*numbers), self.host.capacity)
        assert (slots >= 0).all()
        self.host.register(slots[is_new])
        self.tier.seen(slots)
        self.host.release(slots)

    def lose(self, *numbers: int) -> None:
        """The host tier has these no more."""
        slots = self.host.match(names(*numbers))
        assert len(slots) == len(numbers)
        self.host.withdraw(slots)

    def store(self, *numbers: int) -> list[int]:
        """Disk slots of these, which the disk tier alone has."""
        self.hold(*numbers)
        for operation in self.step():
            self.answer(operation)
        self.lose(*numbers)
        assert self.on_disk(*numbers) == list(numbers)
        return self.pool.find(names(*numbers)).tolist()

    def in_host(self, *numbers: int) -> list[int]:
        """Those of the blocks that can be matched."""
        return [number for number in numbers if len(self.host.match(names(number)))]

    def on_disk(self, *numbers: int) -> list[int]:
        return [number for number in numbers if len(self.pool.match(names(number)))]

    # ---- requests and ranks ----

    def fetch(self, request: str, *numbers: int) -> bool:
        return self.tier.fetch(request, names(*numbers))

    def answer(
        self,
        operation: Operation,
        *ranks: int,
        failed: Sequence[int] = (),
        reason: Failure = Failure.NONE,
        seconds: float = 0.0,
        quiesced: bool = True,
    ) -> None:
        """Of these ranks, or of all."""
        for rank in ranks or range(self.ranks):
            positions = np.array(failed, np.int32)
            self.tier.complete(rank, Completion(operation.id, positions, reason, seconds, quiesced))

    def fail(self, operation: Operation, reason: Failure = Failure.ERROR) -> None:
        self.answer(operation, failed=operation.positions.tolist(), reason=reason)

    def check_idle(self) -> None:
        """Nothing is under way, and nothing is in use."""
        for pool in (self.host, self.pool):
            assert not pool.pins(np.arange(pool.capacity)).any()
            assert pool.num_free + pool.num_registered == pool.capacity
            states = pool.states(np.arange(pool.capacity))
            registered = np.flatnonzero(states == BlockState.REGISTERED)
            assert pool.find(pool.hashes(registered)).tolist() == registered.tolist()
            assert set(states.tolist()) <= {BlockState.RESET, BlockState.REGISTERED}
            assert len(set(pool._free[: pool.num_free].tolist())) == pool.num_free
        tier = self.tier
        operations, forget = tier.take_orders()
        self.forgotten += forget
        assert not operations
        assert not tier.has_work
        assert not tier._in_flight
        assert not tier._fetches
        assert not tier._arriving.any()
        assert (tier._queued_reads, tier._queued_writes, tier._fetched) == (0, 0, 0)


def one(operations: list[Operation], direction: Direction, *numbers: int) -> Operation:
    """The only operation, which moves these blocks."""
    (operation,) = operations
    assert operation.direction == direction
    assert numbers_of(operation.hashes) == list(numbers)
    assert len(operation.host_slots) == len(operation.disk_slots) == len(numbers)
    return operation
