"""The leader over a host tier and a disk tier, on simulated ranks whose memory and disks tell what they hold.

Each rank has an arena (host slot to content, with the checksum that it was sealed with), a store (disk slot
to record) and device blocks, which are never used twice here: `test_planner_machine` is about those. Records
move one by one in any order between ranks and operations, and read and write what is there at that moment;
operations end well, badly, late or never; I/O processes die, engines are restarted, records rot. What must
hold is checked after every action. The seed of a failure is in the test's name.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest

from kvbm.config import load_config
from kvbm.logic import disk as disk_module
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.logic.pool import BlockPool, BlockState
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import WorkerReport
from kvbm.runtime.upkeep import Upkeep

RUNS = int(os.environ.get("PROPERTY_LONG_RUNS", "16"))
STEPS = int(os.environ.get("PROPERTY_STEPS", "2000"))

BLOCK = 2
MAX_BLOCKS = 6
TIMEOUT_S = 10.0
PATIENCE_S = 5.0
OFFLOAD, ONBOARD, WRITE, READ = Direction.OFFLOAD, Direction.ONBOARD, Direction.WRITE, Direction.READ
GARBAGE = b"garbage"
SALT, SALTED = "tenant", 3  # of the requests that begin with this symbol


@dataclass
class Record:
    key: bytes
    content: bytes
    serial: int


@dataclass
class Rank:
    arena: dict[int, bytes] = field(default_factory=dict)
    checksums: dict[int, bytes] = field(default_factory=dict)
    store: dict[int, Record] = field(default_factory=dict)
    device: dict[int, bytes] = field(default_factory=dict)
    found: list[tuple[int, bytes]] = field(default_factory=list)  # at start, not told yet
    told: bool = False


@dataclass
class Request:
    id: str
    blocks: list[bytes]  # hashes
    first: int = 0
    table: list[int] = field(default_factory=list)
    computed: int = 0
    state: str = "waiting"  # waiting, loading, running
    waits_since: float | None = None


@dataclass
class Copy:
    """One rank's share of an operation."""

    operation: Operation
    rank: int
    order: list[int]  # positions, as they are carried out
    done: int = 0
    cancelled: bool = False
    timed_out: bool = False
    cleared: bool = False
    over: bool = False
    bad: dict[int, Failure] = field(default_factory=dict)


class Simulation:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 1000.0
        self.serial = 0
        self.counts: Counter[str] = Counter()
        self.num_ranks = random.choice([1, 2, 2, 3])
        self.host_slots = random.randint(4, 12)
        self.disk_slots = random.choice([3, 10, 20, 40, 60])
        self.settings: dict[str, Any] = {
            "host__num_blocks": self.host_slots,
            "disk__num_blocks": self.disk_slots,
            "host__policy": random.choice(["lru", "segmented-lru"]),
            "disk__policy": random.choice(["lru", "segmented-lru"]),
            "disk__disable_filter": random.random() < 0.6,
            "disk__skip_slow_loads": random.random() < 0.5,
            "disk__max_queued_blocks": random.randint(1, 8),
            "disk__timeout_s": TIMEOUT_S,
            "transfer__timeout_s": TIMEOUT_S,
            "transfer__max_batch_blocks": random.randint(1, 4),
            "transfer__max_queued_blocks": random.randint(2, 12),
        }
        self.ranks = [Rank() for _ in range(self.num_ranks)]
        self.forgotten: set[bytes] = set()  # cleared by their salt, and not stored since
        self.salted: set[bytes] = set()  # all blocks that ever had it
        self.start()

    def start(self) -> None:
        """An engine, with the stores that an earlier one has left."""
        self.leader = Leader(
            load_config(environ={}, **self.settings),
            namespace=b"simulation......",
            block_size=BLOCK,
            num_slots=self.host_slots,
            ranks=self.num_ranks,
            disk_slots=self.disk_slots,
            disk_record_bytes=4096,
            clock=lambda: self.now,
        )
        assert self.leader.disk is not None
        self.disk = self.leader.disk
        self.requests: dict[str, Request] = {}
        self.copies: list[Copy] = []
        self.loads: dict[int, Request] = {}
        self.last_tick = self.first_tick = self.now
        self.damaged: set[tuple[str, int, int]] = set()  # tier, rank, slot
        for rank in range(self.num_ranks):
            self.report(rank)
        self.step()

    @property
    def host(self) -> BlockPool:
        return self.leader.pool

    # ---- what the engine does ----

    def step(self) -> None:
        self.leader.tick()
        self.last_tick = self.now
        orders = self.leader.take_orders(self.random.choice([0, 1, 500]))
        for copy in self.copies:
            copy.cancelled |= copy.operation.id in orders.cancel
        for rank in self.ranks:
            if orders.forget_all:
                rank.store.clear()
            for slot in orders.forget:
                rank.store.pop(slot, None)
        if orders.forget_all:
            for copy in self.copies:
                copy.cleared |= copy.operation.direction == WRITE
        for operation in orders.operations:
            self.check_order(operation)
            for rank in range(self.num_ranks):
                order = list(range(len(operation.host_slots)))
                self.random.shuffle(order)
                self.copies.append(Copy(operation, rank, order))
        if orders.timed:
            self.now += self.random.random()
            self.report(0, timed=True)

    def check_order(self, operation: Operation) -> None:
        """What it writes nobody else touches, what it reads nobody else writes."""
        assert len(operation.host_slots) > 0
        assert len(set(operation.host_slots.tolist())) == len(operation.host_slots) or (
            operation.direction == ONBOARD
        )
        assert len(set(operation.disk_slots.tolist())) == len(operation.disk_slots)
        for copy in self.copies:
            if copy.over:
                continue
            other = copy.operation
            both = set(operation.host_slots.tolist()) & set(other.host_slots.tolist()) - {-1}
            writes = {OFFLOAD, READ} & {operation.direction, other.direction}
            assert not (both and writes), f"host slots {both} of {operation} and {other}"
            both = set(operation.disk_slots.tolist()) & set(other.disk_slots.tolist())
            writes = WRITE in (operation.direction, other.direction)
            assert not (both and writes), f"disk slots {both} of {operation} and {other}"

    def arrive(self) -> None:
        if len(self.requests) >= 5:
            return
        self.serial += 1
        id_ = f"r{self.serial}"
        symbols = [self.random.randrange(4)]
        symbols += [self.random.choice([0, 0, 0, 1]) for _ in range(self.random.randint(0, MAX_BLOCKS - 1))]
        salt = SALT if symbols[0] == SALTED else None
        self.leader.start(id_, salt=salt)
        hasher = self.leader.hasher(id_)
        assert hasher is not None
        hasher.extend([token for symbol in symbols for token in (symbol, 7)])
        first = self.random.choice([0, 0, 0, 1]) if len(symbols) > 1 else 0
        blocks = [row.tobytes() for row in hasher.hashes]
        self.requests[id_] = Request(id_, blocks, first)
        if salt:
            self.salted.update(blocks)
            self.forgotten.difference_update(blocks)

    def some(self, *states: str) -> Request | None:
        chosen = [request for request in self.requests.values() if request.state in states]
        return self.random.choice(chosen) if chosen else None

    def ask(self) -> None:
        """A waiting request is asked about, and perhaps admitted."""
        request = self.some("waiting")
        if request is None:
            return
        found = self.leader.match(request.id, request.first, len(request.blocks) - request.first)
        if found is None:
            self.counts["waits"] += 1
            if self.disk.restoring:
                assert self.last_tick < self.first_tick + PATIENCE_S
            else:
                if request.waits_since is None:
                    request.waits_since = self.now
                assert self.now < request.waits_since + 2 * TIMEOUT_S, "waits for ever"
            return
        if self.random.random() < 0.2:  # no room on the device: it is asked again
            return
        count = len(request.blocks)
        request.table = list(range(self.serial * 100, self.serial * 100 + count))
        self.serial += 1
        for rank in self.ranks:
            rank.device.update(zip(request.table[: request.first], request.blocks, strict=False))
        request.computed = request.first
        if not found:
            self.leader.set_table(request.id, request.table)
            request.state = "running"
            return
        self.counts["loads"] += 1
        request.state = "loading"
        self.leader.load(request.id, request.first, found, request.table)
        self.loads[self.leader._orders.operations[-1].id] = request

    def compute(self) -> None:
        request = self.some("running")
        if request is None:
            return
        more = self.random.randint(0, 3)
        for i in range(request.computed, min(request.computed + more, len(request.blocks))):
            for rank in self.ranks:
                rank.device[request.table[i]] = request.blocks[i]
            request.computed = i + 1
        self.leader.store([(request.id, request.computed)])

    def preempt(self, request: Request | None = None) -> None:
        request = request or self.some("running")
        if request is not None:
            self.leader.preempt(request.id)
            request.state, request.table, request.computed = "waiting", [], 0

    def finish(self) -> None:
        request = self.some("running") if self.random.random() < 0.7 else self.some("waiting", "loading")
        if request is not None:
            computed = request.computed if request.state == "running" else 0
            self.leader.finish(request.id, computed, request.table)
            del self.requests[request.id]

    def serve(self) -> None:
        """The usual course of things, so that there is something to disturb."""
        self.arrive()
        for _ in range(3):
            self.ask()
        self.step()
        for _ in range(4):
            self.compute()
        self.step()
        for copy in self.under_way():
            if self.random.random() < 0.8:
                self.end(copy)
        self.finish()

    def clear(self) -> None:
        assert self.leader.reset()
        assert self.host.num_registered == self.disk.pool.num_registered == 0
        self.counts["clears"] += 1

    def upkeep(self, action: Callable[[Upkeep, float], Any]) -> Any:
        return self.leader.administer(lambda upkeep, now: (action(upkeep, now),))

    def clear_salt(self) -> None:
        self.upkeep(lambda upkeep, now: upkeep.clear(None, SALT))
        self.forgotten = set(self.salted)
        self.counts["clears of a salt"] += 1

    def resize(self) -> None:
        tier, size = self.random.choice([("host", self.host_slots), ("disk", self.disk_slots)])
        blocks = self.random.choice([size, self.random.randint(1, size)])
        self.upkeep(lambda upkeep, now: upkeep.resize(tier, blocks))
        if tier == "host" or self.disk.pool.usable:
            assert (self.host if tier == "host" else self.disk.pool).usable == blocks

    def pin(self) -> None:
        request = self.some("waiting", "loading", "running")
        if request is not None:
            self.serial += 1
            name, until = f"pin{self.serial}", self.now + self.random.uniform(0.0, 2 * TIMEOUT_S)
            hashes = np.array([np.frombuffer(key, np.uint64) for key in request.blocks])
            (pinned,) = self.upkeep(lambda upkeep, now: upkeep.pin(name, hashes, until))
            self.counts["pinned"] += pinned

    def prefetch(self) -> None:
        known = [record.key for rank in self.ranks for record in rank.store.values()]
        if known:
            self.serial += 1
            hashes = np.frombuffer(self.random.choice(known), np.uint64).reshape(1, 2)
            self.upkeep(lambda upkeep, now: upkeep.prefetch(f"prefetch{self.serial}", hashes))

    def crowd(self) -> None:
        """The host tier loses some of what nobody uses, as if much else had passed through it."""
        self.host.release(self.host.allocate(self.random.randint(1, self.host_slots)))

    # ---- what the ranks do ----

    def under_way(self, *directions: Direction) -> list[Copy]:
        return [
            copy
            for copy in self.copies
            if not copy.over and (not directions or copy.operation.direction in directions)
        ]

    def advance(self) -> None:
        copies = self.under_way()
        if copies:
            self.move(self.random.choice(copies))

    def move(self, copy: Copy) -> None:
        """One record, as the bytes are now."""
        if copy.done == len(copy.order):
            return
        operation, rank = copy.operation, self.ranks[copy.rank]
        i = copy.order[copy.done]
        copy.done += 1
        slot = int(operation.host_slots[i])
        if operation.direction == OFFLOAD:
            rank.arena[slot] = rank.checksums[slot] = rank.device[int(operation.device_blocks[i])]
            self.damaged.discard(("host", copy.rank, slot))
        elif operation.direction == ONBOARD:
            if slot < 0:
                copy.bad[i] = Failure.ERROR
            elif rank.arena[slot] != rank.checksums[slot]:
                copy.bad[i] = Failure.CORRUPT
            else:
                rank.device[int(operation.device_blocks[i])] = rank.arena[slot]
        elif operation.direction == WRITE:
            self.write(copy, i, slot, int(operation.disk_slots[i]))
        else:
            record = rank.store.get(int(operation.disk_slots[i]))
            if record is None or record.key != operation.hashes[i].tobytes() or record.content != record.key:
                copy.bad[i] = Failure.CORRUPT
                rank.arena[slot] = rank.checksums[slot] = GARBAGE
            else:
                rank.arena[slot] = rank.checksums[slot] = record.content
                self.damaged.discard(("host", copy.rank, slot))

    def write(self, copy: Copy, i: int, slot: int, disk_slot: int) -> None:
        rank = self.ranks[copy.rank]
        if copy.cleared:
            copy.bad[i] = Failure.ERROR
        elif rank.arena[slot] != rank.checksums[slot]:
            copy.bad[i] = Failure.CORRUPT
        else:
            self.serial += 1
            rank.store[disk_slot] = Record(copy.operation.hashes[i].tobytes(), rank.arena[slot], self.serial)
            self.damaged.discard(("disk", copy.rank, disk_slot))

    def end(self, copy: Copy | None = None, how: str | None = None) -> None:
        copies = self.under_way()
        if not copies:
            return
        copy = copy or self.random.choice(copies)
        how = how or self.random.choices(["well", "badly", "partly"], [50, 1, 1])[0]
        operation, size = copy.operation, len(copy.order)
        if how != "badly":
            while copy.done < size:
                self.move(copy)
        for i in range(size):
            if how == "badly" or (how == "partly" and self.random.random() < 0.3):
                on_disk = operation.direction in (WRITE, READ)
                reasons = [Failure.ERROR, *([Failure.UNAVAILABLE, Failure.TIMEOUT] if on_disk else [])]
                copy.bad[i] = max(copy.bad.get(i, Failure.NONE), self.random.choice(reasons))
                self.spoil(copy, i)
        failed, reason = set(copy.bad), max(copy.bad.values(), default=Failure.NONE)
        if copy.cancelled or copy.timed_out:
            failed = set(range(size))
            reason = max(reason, Failure.TIMEOUT if copy.timed_out else Failure.CANCELLED)
        copy.over = True
        self.complete(
            copy, Completion(operation.id, np.array(sorted(failed), np.int32), reason, self.random.random())
        )

    def spoil(self, copy: Copy, i: int) -> None:
        """What a failed record leaves behind."""
        operation, rank = copy.operation, self.ranks[copy.rank]
        slot = int(operation.host_slots[i])
        if operation.direction in (OFFLOAD, READ):
            rank.arena[slot] = self.random.choice([rank.arena.get(slot, GARBAGE), GARBAGE])
            rank.checksums[slot] = rank.arena[slot]
        elif operation.direction == WRITE and self.random.random() < 0.5:
            rank.store.pop(int(operation.disk_slots[i]), None)

    def time_out(self) -> None:
        """The rank gives up, but memory may still be written; it will report again."""
        copies = [copy for copy in self.under_way() if not copy.timed_out]
        if copies:
            copy = self.random.choice(copies)
            copy.timed_out = True
            self.counts["timeouts"] += 1
            positions = copy.operation.positions
            self.complete(copy, Completion(copy.operation.id, positions, Failure.TIMEOUT, quiesced=False))

    def kill_io_process(self) -> None:
        rank = self.random.randrange(self.num_ranks)
        for copy in self.under_way(WRITE, READ):
            if copy.rank == rank:
                copy.bad = dict.fromkeys(range(len(copy.order)), Failure.UNAVAILABLE)
                copy.done = len(copy.order)
                self.end(copy, "well")

    def complete(self, copy: Copy, completion: Completion) -> None:
        self.report(copy.rank, completions=[completion])
        operation = copy.operation
        same = [other for other in self.copies if other.operation is operation]
        request = self.loads.get(operation.id)
        if request is not None and all(other.over or other.timed_out for other in same):
            del self.loads[operation.id]
            self.loaded(request, operation, same)
        if all(other.over for other in same):
            self.copies = [other for other in self.copies if other.operation is not operation]

    def loaded(self, request: Request, operation: Operation, copies: list[Copy]) -> None:
        if self.requests.get(request.id) is not request:
            return
        failed = {i for copy in copies for i in copy.bad}
        if any(copy.timed_out for copy in copies):
            self.preempt(request)
            return
        for i in set(range(len(operation.host_slots))) - failed:
            for rank in self.ranks:
                content = rank.device[int(operation.device_blocks[i])]
                assert content == request.blocks[request.first + i], "wrong bytes"
                self.counts["good blocks"] += 1
        request.computed = request.first + min(failed, default=len(operation.host_slots))
        request.state = "running"

    def report(self, rank: int, **more: Any) -> None:
        self.leader.receive([WorkerReport(rank, self.host_slots, self.host_slots, **more)])

    # ---- what befalls them ----

    def rot(self) -> None:
        """A record goes bad where it lies: only its checksum tells."""
        number = self.random.randrange(self.num_ranks)
        rank = self.ranks[number]
        if self.random.random() < 0.5 and rank.store:
            slot = self.random.choice(list(rank.store))
            rank.store[slot].content = GARBAGE
            self.damaged.add(("disk", number, slot))
        elif rank.arena:
            slot = self.random.choice(list(rank.arena))
            rank.arena[slot] = GARBAGE
            self.damaged.add(("host", number, slot))

    def pass_time(self) -> None:
        self.now += self.random.uniform(0.0, 0.3 * TIMEOUT_S)

    def idle(self) -> None:
        """No requests, nothing to do: no steps."""
        while self.requests:
            self.finish()
        if not self.leader.has_work:
            self.now += self.random.uniform(0.0, 2000.0)
            self.counts["pauses"] += 1

    def restart(self) -> None:
        """The engine is killed; another one finds what is on the disks."""
        self.counts["restarts"] += 1
        if self.disk._forget or self.leader._orders.forget_all or self.under_way(WRITE):
            self.forgotten.clear()  # it is killed before the ranks know
        for copy in self.under_way(WRITE):
            for i in copy.order[copy.done :]:
                if self.random.random() < 0.3:  # torn
                    self.ranks[copy.rank].store.pop(int(copy.operation.disk_slots[i]), None)
        for rank in self.ranks:
            rank.arena, rank.checksums, rank.device = {}, {}, {}
            for slot in [slot for slot in rank.store if self.random.random() < 0.05]:
                del rank.store[slot]
            ordered = sorted(rank.store.items(), key=lambda item: item[1].serial)
            distinct = {record.key: slot for slot, record in reversed(ordered)}
            rank.found = [(slot, key) for key, slot in distinct.items()]
            rank.told = False
        damaged = {mark for mark in self.damaged if mark[0] == "disk"}
        self.now += self.random.uniform(0.0, 100.0)
        self.start()
        self.damaged = damaged
        if self.random.random() < 0.2:
            for _ in range(self.random.randint(0, 30)):
                self.random.choice([self.announce, self.announce, self.step])()
                self.check()
            self.clear()

    def announce(self) -> None:
        """A rank tells of some of the records that it has found."""
        untold = [number for number in range(self.num_ranks) if not self.ranks[number].told]
        if not untold:
            return
        number = self.random.choice(untold)
        rank = self.ranks[number]
        count = self.random.randint(0, 8)
        part, rank.found = rank.found[:count], rank.found[count:]
        rank.told = not rank.found
        slots = np.array([slot for slot, _ in part], np.int32)
        hashes = np.array([np.frombuffer(key, np.uint64) for _, key in part], np.uint64).reshape(-1, 2)
        self.report(number, found=(slots, hashes), found_all=rank.told)

    def refuse(self) -> None:
        self.report(self.random.randrange(self.num_ranks), disk_refused="the drive is gone")
        self.counts["refusals"] += 1

    # ---- what always holds ----

    def check(self) -> None:
        assert self.leader.off_reason is None
        self.bytes_are_those_of_the_hash()
        self.what_was_cleared_is_gone()
        self.pins_are_right()
        self.bounds_are_kept()

    def bytes_are_those_of_the_hash(self) -> None:
        for tier, pool in (("host", self.host), ("disk", self.disk.pool)):
            everything = np.arange(pool.capacity)
            registered = everything[pool.states(everything) == BlockState.REGISTERED]
            assert len(registered) == pool.num_registered
            hashes = pool.hashes(registered)
            assert pool.find(hashes).tolist() == registered.tolist()
            for slot, row in zip(registered.tolist(), hashes, strict=True):
                for number, rank in enumerate(self.ranks):
                    if (tier, number, slot) in self.damaged:
                        continue
                    if tier == "host":
                        assert rank.arena[slot] == row.tobytes(), "the host tier has wrong bytes"
                    elif self.disk.off_reason is None:
                        record = rank.store[slot]
                        assert record.key == record.content == row.tobytes(), "the disk has wrong bytes"

    def what_was_cleared_is_gone(self) -> None:
        if self.forgotten:
            hashes = np.array([np.frombuffer(key, np.uint64) for key in self.forgotten])
            for pool in (self.host, self.disk.pool):
                slots = pool.find(hashes)
                assert not (pool.states(slots[slots >= 0]) == BlockState.REGISTERED).any()

    def pins_are_right(self) -> None:
        host = np.zeros(self.host_slots, int)
        disk = np.zeros(self.disk_slots, int)
        operations = {copy.operation.id: copy.operation for copy in self.copies}
        pending = [*self.leader._orders.operations, *self.disk._orders]
        operations |= {operation.id: operation for operation in pending}
        for operation in operations.values():
            np.add.at(host, operation.host_slots[operation.host_slots >= 0], 1)
            np.add.at(disk, operation.disk_slots, 1)
        planner = self.leader._planner
        followed = {id(request): request for request in planner._requests.values()}
        for in_flight in planner._in_flight.values():
            followed |= {id(request): request for request, _ in in_flight.members}
        for request in followed.values():
            np.add.at(host, request.chains[0].rows, 1)
        for fetch in self.disk._fetches.values():
            np.add.at(host, fetch.slots, 1)
        for slots, _ in self.leader.upkeep._pins.values():
            np.add.at(host, slots, 1)
        assert self.host.pins(np.arange(self.host_slots)).tolist() == host.tolist()
        assert self.disk.pool.pins(np.arange(self.disk_slots)).tolist() == disk.tolist()

    def bounds_are_kept(self) -> None:
        operations = {copy.operation.id: copy.operation for copy in self.copies}
        writing = sum(len(op.host_slots) for op in operations.values() if op.direction == WRITE)
        assert writing <= min(self.settings["disk__max_queued_blocks"], self.host_slots // 2)
        assert 0 <= self.disk._fetched <= self.host_slots // 2
        if any(not transfer.expired for transfer in self.disk._in_flight.values()):
            assert self.leader.has_work

    def drain(self) -> None:
        """Everything ends: nothing is left in use."""
        while self.requests:
            self.finish()
        for name in list(self.leader.upkeep._pins):
            self.leader.upkeep.unpin(name)
        for i in range(40):
            settled = self.disk.ready or self.disk.off_reason is not None
            if i >= 5 and settled and not self.copies:
                break
            while copies := self.under_way():
                self.end(copies[0], "well")
            while any(not rank.told for rank in self.ranks):
                self.announce()
            self.step()
            self.check()
        assert not self.copies
        assert not self.leader.has_work
        for pool in (self.host, self.disk.pool):
            assert not pool.pins(np.arange(pool.capacity)).any()
            if pool.usable:  # not where it was turned off before it began
                assert pool.num_free + pool.num_registered == pool.usable
        tier = self.disk
        assert (tier._queued_reads, tier._queued_writes, tier._fetched) == (0, 0, 0)
        assert not tier._fetches
        assert not tier._arriving.any()


WEIGHTS = {
    "step": 30,
    "serve": 30,
    "arrive": 8,
    "ask": 30,
    "compute": 25,
    "preempt": 1,
    "finish": 16,
    "clear": 0.3,
    "clear_salt": 0.5,
    "resize": 0.7,
    "pin": 1,
    "prefetch": 2,
    "crowd": 8,
    "advance": 25,
    "end": 60,
    "time_out": 0.7,
    "kill_io_process": 0.3,
    "rot": 1,
    "pass_time": 3,
    "idle": 0.7,
    "restart": 0.9,
    "announce": 4,
    "refuse": 0.02,
    "drain": 0.3,
}

_totals: Counter[str] = Counter()


def count(simulation: Simulation) -> None:
    """Of one engine."""
    stats = simulation.disk.stats
    _totals["written"] += stats.written_blocks
    _totals["read"] += stats.read_blocks
    _totals["recovered"] += stats.recovered_blocks
    _totals.update({f"{kind.name} {why.name}": n for (kind, why), n in stats.failures.items()})


@pytest.mark.parametrize("seed", range(RUNS))
def test_random_history(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_ADOPT_AT_ONCE", 2)
    random = Random(seed)
    simulation = Simulation(random)
    for _ in range(STEPS):
        action = random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if action == "restart":
            count(simulation)
        getattr(simulation, action)()
        simulation.check()
    simulation.drain()
    count(simulation)
    _totals.update(simulation.counts)
    _totals["runs"] += 1


def test_the_histories_are_full_of_life() -> None:
    """What never happens is not tested."""
    if _totals["runs"] < RUNS:
        pytest.skip("not all histories were run in this process")
    for what in ("waits", "loads", "restarts", "good blocks", "written", "read", "recovered"):
        assert _totals[what] >= 5 * RUNS, what
    for what in ("clears", "clears of a salt", "timeouts", "pauses"):
        assert _totals[what] >= RUNS, what
    for why in ("TIMEOUT", "UNAVAILABLE", "ERROR", "CORRUPT"):
        assert _totals[f"WRITE {why}"], why
        assert _totals[f"READ {why}"], why
