"""Ranks that use the host tier of the first: its memory in several processes, its worker, its leader."""

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np
import pytest

from kvbm.config import load_config
from kvbm.errors import LayoutError
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.runtime.leader import Leader
from kvbm.runtime.messages import WorkerReport
from kvbm.runtime.worker import Worker
from kvbm.transfer.arena import ArenaHandle, HostArena
from kvbm.transfer.copy import CopyEngine
from kvbm.transfer.records import HostRecords

SLOTS, RECORD = 6, 5000
NONE = np.empty(0, np.int32)
NO_RECORDS = NONE, np.empty((0, 2), np.uint64)


@pytest.fixture
def arena() -> Iterator[HostArena]:
    arena = HostArena(SLOTS, RECORD)
    yield arena
    arena.close()


# ---- memory ----


def _other_process(handle: ArenaHandle, connection: Connection) -> None:
    arena = HostArena(SLOTS, RECORD, handle)
    intact = HostRecords(arena).intact(np.arange(3))
    arena.slots[4] = 9
    connection.send((intact.tolist(), int(arena.slots[1, 7])))


def test_another_process_sees_and_checks_the_same_records(arena: HostArena) -> None:
    records = HostRecords(arena)
    arena.slots[:3] = 7
    records.seal(np.arange(3))
    arena.slots[2, 100] = 0
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_other_process, args=(arena.handle, theirs))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == ([True, True, False], 7)
    process.join(60)
    assert process.exitcode == 0
    assert (arena.slots[4] == 9).all()


def test_an_arena_lives_as_long_as_somebody_uses_it(arena: HostArena) -> None:
    other = HostArena(SLOTS, RECORD, arena.handle)
    arena.slots[0] = 3
    assert (other.slots[0] == 3).all()
    first = HostArena(1, 1)
    second = HostArena(1, 1, first.handle)
    first.slots[0, 0] = 5
    first.close()
    assert second.slots[0, 0] == 5
    second.close()
    other.close()


def test_what_is_no_arena_any_more_is_refused(arena: HostArena) -> None:
    """Closed, in another process's place, of another size, or not to be had."""
    closed = HostArena(SLOTS, RECORD)
    gone = closed.handle
    closed.close()
    before = len(os.listdir("/proc/self/fd"))
    for handle in [
        gone,
        replace(arena.handle, inode=arena.handle.inode + 1),
        replace(arena.handle, pid=2**22 + 1),
    ]:
        with pytest.raises(LayoutError):
            HostArena(SLOTS, RECORD, handle)
    for slots in (SLOTS - 1, SLOTS + 1):  # its checksums would lie elsewhere
        with pytest.raises(LayoutError):
            HostArena(slots, RECORD, arena.handle)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- worker ----


class Engine(CopyEngine):
    """Blocks that are rows of an array."""

    def __init__(self, arena: HostArena) -> None:
        self.arena = arena
        self.device = np.zeros((SLOTS, RECORD), np.uint8)

    def offload(self, device_blocks: np.ndarray, host_slots: np.ndarray, after: object = None) -> None:
        self.arena.records()[host_slots] = self.device[device_blocks]

    def onboard(self, device_blocks: np.ndarray, host_slots: np.ndarray, after: object = None) -> None:
        self.device[device_blocks] = self.arena.records()[host_slots]


def operation(id_: int, direction: Direction) -> Operation:
    ids = np.array([1, 3], np.int32)
    return Operation(id_, direction, "", ids, ids, 30.0, disk_slots=ids, hashes=np.zeros((2, 2), np.uint64))


def wait(worker: Worker) -> list[Completion]:
    completions: list[Completion] = []
    while not worker.idle:
        completions += worker.poll()
    return completions


def test_a_rank_that_does_not_store_loads_what_the_first_has_stored(arena: HostArena) -> None:
    shared = HostArena(SLOTS, RECORD, arena.handle)
    engines = Engine(arena), Engine(shared)
    first, second = (
        Worker(HostRecords(arena, engines[0])),
        Worker(HostRecords(shared, engines[1]), stores=False),
    )
    engines[0].device[:], engines[1].device[:] = 1, 2
    second.submit(
        [operation(0, Direction.OFFLOAD), operation(1, Direction.WRITE), operation(2, Direction.READ)]
    )
    done = second.poll()  # at once
    assert [(one.operation_id, len(one.failed), one.quiesced) for one in done] == [
        (0, 0, True),
        (1, 0, True),
        (2, 0, True),
    ]
    assert not shared.slots.any()
    second.submit([operation(3, Direction.ONBOARD)])
    (early,) = wait(second)  # nothing is there that could be taken for a record
    assert (early.reason, early.failed.tolist()) == (Failure.CORRUPT, [0, 1])
    first.submit([operation(0, Direction.OFFLOAD)])
    wait(first)
    second.submit([operation(4, Direction.ONBOARD)])
    (loaded,) = wait(second)
    assert len(loaded.failed) == 0
    assert (engines[1].device[[1, 3]] == 1).all()
    first.close()
    second.close()


# ---- leader ----


def test_the_first_rank_alone_speaks_for_the_disk() -> None:
    """What the others say of it neither fails nor completes anything, and nothing is waited for from them."""
    config = load_config(environ={}, host__num_blocks=8, disk__num_blocks=8, disk__disable_filter=True)
    leader = Leader(
        config,
        namespace=b"n" * 16,
        block_size=4,
        num_slots=8,
        ranks=2,
        shared=True,
        disk_slots=8,
        disk_record_bytes=8192,
    )

    def report(rank: int, *completions: Completion, **more: object) -> None:
        leader.receive([WorkerReport(rank, 8, 8, completions=list(completions), **more)])  # type: ignore[arg-type]

    disk = leader.disk
    assert disk is not None
    report(0, found=NO_RECORDS, found_all=True)
    report(1)
    leader.tick()
    assert disk.ready
    pool = leader.pool
    slots, _ = pool.claim(np.arange(2, dtype=np.uint64).reshape(1, 2), 1)
    pool.register(slots)
    disk.seen(slots)
    (write,) = [one for one in leader.take_orders(0).operations if one.direction == Direction.WRITE]
    report(1, Completion(write.id, write.positions, Failure.UNAVAILABLE))
    assert disk.pool.num_registered == 0
    report(0, Completion(write.id, NONE))
    assert disk.pool.num_registered == 1
