"""An engine as the leader sees it, watched by an observer: requests, steps, obedient ranks.

Requests are driven as the connector drives them. Time passes where a test says so,
and for a millisecond after each answer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvbm.config import load_config
from kvbm.logic.disk import DiskTier
from kvbm.logic.followed import Passing
from kvbm.logic.groups import KvGroups
from kvbm.logic.hashing import Hashes
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.logic.pool import BlockPool, BlockState
from kvbm.observe.requests import RequestRecord
from kvbm.runtime.admin import Admin
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.runtime.observer import Observer

BLOCK = 4
TIMEOUT_S = 10.0
BLOCK_BYTES, DISK_BLOCK_BYTES = 1000, 8192
OFFLOAD, ONBOARD, WRITE, READ = Direction.OFFLOAD, Direction.ONBOARD, Direction.WRITE, Direction.READ
NO_RECORDS = (np.empty(0, np.int32), np.empty((0, 2), np.uint64))


def tokens_of(blocks: int, first: int = 0) -> list[int]:
    return list(range(first, first + blocks * BLOCK))


class Engine:
    """host, disk: blocks; disk = 0: no disk tier. ready: the disk tier knows that it has nothing."""

    def __init__(
        self,
        *,
        ranks: int = 2,
        host: int = 16,
        disk: int = 0,
        ready: bool = True,
        groups: KvGroups | None = None,
        **settings: Any,
    ) -> None:
        self.now = 5000.0
        self.ranks = ranks
        self.host_slots = host
        tier = {"disk__num_blocks": disk, "disk__disable_filter": True} if disk else {}
        config = load_config(
            environ={},
            **{
                "host__num_blocks": host,
                "disk__timeout_s": TIMEOUT_S,
                "transfer__timeout_s": TIMEOUT_S,
                "observe__metrics": True,
                **tier,
                **settings,
            },
        )
        self.observer = Observer(config.observe, BLOCK, engine="e1", wall=lambda: 1e9 + self.now)
        self.leader = Leader(
            config,
            namespace=b"n" * 16,
            block_size=BLOCK,
            num_slots=host,
            ranks=ranks,
            groups=groups,
            disk_slots=disk,
            disk_record_bytes=DISK_BLOCK_BYTES,
            observer=self.observer,
            clock=lambda: self.now,
        )
        self.admin = Admin(
            self.leader, self.observer, block_bytes=BLOCK_BYTES, disk_block_bytes=DISK_BLOCK_BYTES
        )
        self.store: dict[int, Any] = {}  # disk slots and the hashes of what the ranks have there
        self.forgotten: list[int] = []
        self.forgot_all = 0
        self.groups = len(groups or KvGroups())
        self._tables: dict[str, list[list[int]]] = {}
        self._prompts: dict[str, int] = {}
        self._next_block = 0
        for rank in range(ranks):
            self.report(rank)
        if disk and ready:
            self.find()
            assert self.disk.ready

    @property
    def disk(self) -> DiskTier:
        assert self.leader.disk is not None
        return self.leader.disk

    @property
    def pool(self) -> BlockPool:
        return self.leader.pool

    # ---- ranks ----

    def report(self, rank: int, completions: Sequence[Completion] = (), **more: Any) -> None:
        self.leader.receive(
            [WorkerReport(rank, self.host_slots, self.host_slots, completions=list(completions), **more)]
        )

    def find(self, records: tuple[Any, Hashes] = NO_RECORDS, **more: Any) -> None:
        """All ranks have found these on disk."""
        for rank in range(self.ranks):
            self.report(rank, found=records, found_all=True, **more)
        for _ in range(3):  # it is entered piece by piece
            self.done(*self.step().operations)

    def restart(self) -> "Engine":
        """Another engine on what the disk has; all of that is there when it asks."""
        other = Engine(ranks=self.ranks, host=self.host_slots, disk=self.disk.pool.capacity, ready=False)
        slots = np.array(list(self.store), np.int32)
        other.store = dict(self.store)
        other.find((slots, np.array(list(self.store.values()), np.uint64).reshape(-1, 2)))
        other.settle()
        return other

    def done(
        self, *operations: Operation, failed: Sequence[int] = (), reason: Failure = Failure.NONE
    ) -> None:
        """failed: positions, on the last rank."""
        for operation in operations:
            for rank in range(self.ranks):
                bad = failed if rank == self.ranks - 1 else ()
                why = reason if len(bad) else Failure.NONE
                if operation.direction == WRITE:
                    written = zip(operation.disk_slots.tolist(), operation.hashes, strict=True)
                    self.store |= {slot: key for i, (slot, key) in enumerate(written) if i not in failed}
                self.report(rank, [Completion(operation.id, np.array(bad, np.int32), why)])

    def step(self, seconds: float = 0.0, tokens: int = 0) -> StepOrders:
        self.now += seconds
        self.leader.tick()
        orders = self.leader.take_orders(tokens)
        self.forgotten += orders.forget
        self.forgot_all += orders.forget_all
        for slot in list(self.store) if orders.forget_all else orders.forget:
            self.store.pop(slot, None)
        return orders

    def settle(self) -> list[Operation]:
        """Step until nothing is ordered; everything goes well."""
        ordered: list[Operation] = []
        while operations := self.step().operations:
            ordered += operations
            self.done(*operations)
        return ordered

    # ---- requests ----

    def arrive(
        self, id_: str, tokens: Sequence[int], *, salt: str | None = None, adapter: str | None = None
    ) -> None:
        self.leader.start(
            id_,
            salt=salt,
            adapter=adapter,
            prompt_tokens=len(tokens),
            first_block=hash(tuple(tokens[:BLOCK])),
        )
        hasher = self.leader.hasher(id_)
        assert hasher is not None
        hasher.extend(tokens)
        self._prompts[id_] = len(tokens)

    def admit(self, id_: str, device: int = 0) -> int | None:
        """Ask for its blocks and start it; how many are loaded. None: it waits. device: blocks there."""
        useful = max(0, (self._prompts[id_] - 1) // BLOCK - device)
        loaded = self.leader.match(id_, device, useful)
        if loaded is None:
            return None
        blocks = -(-self._prompts[id_] // BLOCK)
        table = list(range(self._next_block, self._next_block + blocks))
        self._next_block += blocks
        tables = [table] * self.groups
        self._tables[id_] = tables
        self.leader.answered(id_, device, loaded, useful)
        self.now += 0.001
        if loaded:
            self.leader.load(id_, device, loaded, *tables)
        else:
            self.leader.set_table(id_, *tables)
        return loaded

    def compute(self, id_: str) -> None:
        """All its full blocks are computed."""
        passing = {id_: Passing(0)} if self.groups > 1 else None
        self.leader.store([(id_, self._prompts[id_] // BLOCK)], passing)

    def end(self, id_: str, computed: int | None = None) -> None:
        full = self._prompts.pop(id_) // BLOCK
        tables = self._tables.pop(id_, [[]] * self.groups)
        self.leader.finish(id_, full if computed is None else computed, *tables)
        self.leader.ended(id_)

    def serve(self, id_: str, tokens: Sequence[int], device: int = 0, **identity: Any) -> RequestRecord:
        """A request from its arrival to its end; everything goes well."""
        self.arrive(id_, tokens, **identity)
        for _ in range(3):
            if self.admit(id_, device) is not None:
                break
            self.settle()
        else:
            raise AssertionError("it waits for ever")
        self.settle()
        self.compute(id_)
        self.settle()
        self.end(id_)
        self.settle()
        return self.record(id_)

    # ---- what is to be seen ----

    def record(self, id_: str) -> RequestRecord:
        record = self.observer.log.find(id_)
        assert record is not None
        return record

    def why(self, id_: str) -> tuple[str | None, str]:
        told = self.admin.request(id_)
        assert told is not None
        return told["reason"], told["explanation"]

    def hashes(self, tokens: Sequence[int], salt: str | None = None) -> Hashes:
        return self.leader.hashes_of(tokens, salt)

    def in_host(self, tokens: Sequence[int], salt: str | None = None) -> int:
        return len(self.pool.match(self.hashes(tokens, salt)))

    def on_disk(self, tokens: Sequence[int], salt: str | None = None) -> int:
        return len(self.disk.pool.match(self.hashes(tokens, salt)))

    def lose_host(self) -> None:
        """The host tier gives up all that nobody uses, as if much else had passed through it."""
        everything = np.arange(self.pool.capacity)
        idle = (self.pool.states(everything) == BlockState.REGISTERED) & (self.pool.pins(everything) == 0)
        self.pool.release(self.pool.allocate(self.pool.num_free + int(np.count_nonzero(idle))))

    def check_idle(self) -> None:
        """Nothing is in use, and every slot is in one place."""
        pools = [self.pool] + ([self.disk.pool] if self.leader.disk is not None else [])
        for pool in pools:
            check_pool(pool)
            assert not pool.pins(np.arange(pool.capacity)).any()
            assert pool.num_free + pool.num_registered == pool.usable
        assert not self.leader.has_work
        assert self.leader.off_reason is None


def check_pool(pool: BlockPool) -> None:
    everything = np.arange(pool.capacity)
    states, pins = pool.states(everything), pool.pins(everything)
    free = pool._free[: pool.num_free].tolist()
    assert len(set(free)) == len(free)
    expected = np.flatnonzero((states == BlockState.RESET) & (pins == 0) & (everything < pool.usable))
    assert sorted(free) == expected.tolist()
    registered = np.flatnonzero(states == BlockState.REGISTERED)
    assert len(registered) == pool.num_registered
    assert pool.find(pool.hashes(registered)).tolist() == registered.tolist()
    assert (pins >= 0).all()
