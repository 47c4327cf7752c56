"""The worker's disk half, with an I/O process that is the test."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.runtime import worker as worker_module
from kvbm.runtime.worker import Worker
from kvbm.storage.client import BatchResult, Replies
from kvbm.storage.messages import Batch, Status
from kvbm.storage.store import Found
from kvbm.transfer.arena import HostArena
from kvbm.transfer.records import HostRecords

SLOTS, RECORD_BYTES = 8, 64
WRITE, READ, OFFLOAD = Direction.WRITE, Direction.READ, Direction.OFFLOAD
HASHES = np.random.default_rng(2).integers(0, 2**64, (SLOTS, 2), np.uint64)


class FakeStorage:
    """As a StorageClient; `replies` is what the next poll brings."""

    def __init__(self) -> None:
        self.ready = False
        self.refused: str | None = None
        self.replies = Replies()
        self.calls: list[Any] = []

    def submit(self, batch: Batch) -> None:
        self.calls.append(batch)

    def discard(self, disk_slots: np.ndarray) -> None:
        self.calls.append(("discard", disk_slots.tolist()))

    def clear(self) -> None:
        self.calls.append("clear")

    def poll(self) -> Replies:
        replies, self.replies = self.replies, Replies()
        return replies

    def close(self) -> None:
        self.calls.append("close")

    def answer(self, id_: int, failed: tuple[int, ...] = (), status: Status = Status.DONE) -> None:
        batch = next(call for call in self.calls if isinstance(call, Batch) and call.id == id_)
        checksums = np.frombuffer(batch.host_slots, np.int32).astype(np.uint64) + np.uint64(1000)
        self.replies.results.append(BatchResult(id_, np.array(failed, np.int32), status, checksums, 0.25))


class Setup:
    def __init__(self, *, checksum: bool = True, disk: bool = True) -> None:
        self.now = 100.0
        self.storage = FakeStorage()
        self.records = HostRecords(HostArena(SLOTS, RECORD_BYTES), checksum=checksum)
        self.worker = Worker(
            self.records,
            threads=0,
            disk=self.storage if disk else None,  # type: ignore[arg-type]
            clock=lambda: self.now,
        )

    def order(self, id_: int, direction: Direction, host: list[int], disk: list[int]) -> Operation:
        operation = Operation(
            id_,
            direction,
            "",
            np.empty(0, np.int32),
            np.array(host, np.int32),
            10.0,
            disk_slots=np.array(disk, np.int32),
            hashes=HASHES[: len(host)],
        )
        self.worker.submit([operation])
        return operation

    def poll(self) -> list[tuple[int, list[int], Failure, bool]]:
        return [summary(completion) for completion in self.worker.poll()]

    @property
    def batch(self) -> Batch:
        return self.storage.calls[-1]


def summary(completion: Completion) -> tuple[int, list[int], Failure, bool]:
    return completion.operation_id, completion.failed.tolist(), completion.reason, completion.quiesced


# ---- batches ----


@pytest.mark.parametrize("direction", [WRITE, READ])
def test_a_batch_says_what_goes_where(direction: Direction) -> None:
    s = Setup()
    s.order(7, direction, [3, 1, 5], [30, 10, 50])
    batch = s.batch
    assert (batch.id, batch.write, batch.timeout_s) == (7, direction == WRITE, 10.0)
    assert np.frombuffer(batch.host_slots, np.int32).tolist() == [3, 1, 5]
    assert np.frombuffer(batch.disk_slots, np.int32).tolist() == [30, 10, 50]
    assert batch.hashes == HASHES[:3].tobytes()
    assert [batch.hashes[16 * i : 16 * i + 16] for i in range(3)] == [row.tobytes() for row in HASHES[:3]]
    assert batch.groups == bytes(3)


def test_hashes_that_are_a_part_of_an_array_arrive_whole() -> None:
    s = Setup()
    operation = s.order(1, WRITE, [0, 1], [0, 1])
    s.worker.submit([dataclasses.replace(operation, id=2, hashes=HASHES[1:8:3][:2])])
    assert s.batch.hashes == HASHES[1].tobytes() + HASHES[4].tobytes()


def test_written_are_the_checksums_of_the_host_records() -> None:
    s = Setup()
    s.records.arena.records()[:] = np.arange(SLOTS, dtype=np.uint8)[:, None]
    s.records.seal(np.arange(SLOTS))
    s.order(1, WRITE, [3, 1], [0, 1])
    expected = s.records.checksums(np.array([3, 1]))
    assert expected is not None
    assert np.frombuffer(s.batch.checksums, np.uint64).tolist() == expected.tolist()
    assert len(set(expected.tolist())) == 2
    s.order(2, READ, [4], [2])
    assert s.batch.checksums == b""


def test_without_checksums_none_are_compared() -> None:
    s = Setup(checksum=False)
    s.order(1, WRITE, [3, 1], [0, 1])
    assert s.batch.checksums == b""
    s.storage.answer(1)
    s.order(2, READ, [3], [0])
    s.storage.answer(2)
    assert s.poll() == [(1, [], Failure.NONE, True), (2, [], Failure.NONE, True)]


# ---- results ----


@pytest.mark.parametrize("direction", [WRITE, READ])
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (Status.DONE, Failure.NONE),
        (Status.TIMEOUT, Failure.TIMEOUT),
        (Status.UNAVAILABLE, Failure.UNAVAILABLE),
        (Status.ERROR, Failure.ERROR),
        (Status.DAMAGED, Failure.CORRUPT),
    ],
)
def test_what_became_of_it(direction: Direction, status: Status, reason: Failure) -> None:
    s = Setup()
    s.order(1, direction, [3, 1, 5], [0, 1, 2])
    assert s.poll() == []
    assert not s.worker.idle
    failed = (0, 2) if status else ()
    s.storage.answer(1, failed, status)
    (completion,) = s.worker.poll()
    assert summary(completion) == (1, list(failed), reason, True)
    assert completion.seconds == 0.25
    assert s.worker.idle
    assert s.poll() == []


def test_the_greater_status_is_the_greater_failure() -> None:
    """Several ranks' reasons are compared."""
    reasons = [worker_module._FAILURES[status] for status in sorted(Status)]
    assert reasons == sorted(reasons)
    assert len(reasons) == len(Status)


def test_records_that_were_read_have_their_checksums() -> None:
    s = Setup()
    s.order(1, READ, [3, 1], [0, 1])
    s.order(2, WRITE, [4], [2])
    s.storage.answer(1)
    s.storage.answer(2)
    s.poll()
    checksums = s.records.checksums(np.array([3, 1, 4]))
    assert checksums is not None
    assert checksums.tolist() == [1003, 1001, 0]


def test_several_at_once_and_in_another_order() -> None:
    s = Setup()
    for id_ in (1, 2, 3):
        s.order(id_, READ, [id_], [id_])
    s.storage.answer(3)
    s.storage.answer(1, (0,), Status.DAMAGED)
    assert s.poll() == [(3, [], Failure.NONE, True), (1, [0], Failure.CORRUPT, True)]
    s.storage.answer(2)
    assert s.poll() == [(2, [], Failure.NONE, True)]


def test_what_takes_too_long_is_said_twice() -> None:
    s = Setup()
    s.order(1, READ, [3, 1], [0, 1])
    s.now += 9.9
    assert s.poll() == []
    s.now += 0.2
    assert s.poll() == [(1, [0, 1], Failure.TIMEOUT, False)]
    s.now += 100.0
    assert s.poll() == []
    assert not s.worker.idle
    s.storage.answer(1)
    assert s.poll() == [(1, [0, 1], Failure.TIMEOUT, True)]
    assert s.worker.idle


def test_late_and_damaged() -> None:
    s = Setup()
    s.order(1, READ, [3, 1], [0, 1])
    s.now += 11.0
    s.poll()
    s.storage.answer(1, (1,), Status.DAMAGED)
    assert s.poll() == [(1, [0, 1], Failure.CORRUPT, True)]


def test_where_there_is_no_disk() -> None:
    s = Setup(disk=False)
    s.order(1, READ, [3, 1], [0, 1])
    s.order(2, WRITE, [3], [0])
    assert s.poll() == [(1, [0, 1], Failure.UNAVAILABLE, True), (2, [0], Failure.UNAVAILABLE, True)]
    assert s.worker.take_found() == []
    assert not s.worker.disk_ready
    assert s.worker.disk_refused is None
    s.worker.forget_on_disk(np.array([1], np.int32), everything=True)


# ---- at start, and clearing ----


def test_what_was_found_is_told_once() -> None:
    s = Setup()
    found = Found(np.array([1], np.int32), HASHES[:1], np.zeros(1, np.uint8))
    assert not s.worker.disk_ready
    s.storage.replies.found = [found, found]
    s.storage.ready = True
    s.poll()
    assert s.worker.disk_ready
    assert s.worker.take_found() == [found, found]
    assert s.worker.take_found() == []


def test_why_the_disk_can_not_be_used() -> None:
    s = Setup()
    assert s.worker.disk_refused is None
    s.storage.refused = "the drive is full"
    assert s.worker.disk_refused == "the drive is full"


@pytest.mark.parametrize(
    ("slots", "everything", "calls"),
    [
        ([], False, []),
        ([4, 2], False, [("discard", [4, 2])]),
        ([], True, ["clear"]),
        ([4], True, ["clear", ("discard", [4])]),
    ],
)
def test_forgetting(slots: list[int], everything: bool, calls: list[Any]) -> None:
    s = Setup()
    s.worker.forget_on_disk(np.array(slots, np.int32), everything)
    assert s.storage.calls == calls


def test_close() -> None:
    s = Setup()
    s.order(1, WRITE, [3], [0])
    s.worker.close()
    assert s.storage.calls[-1] == "close"


# ---- others' turn ----


def test_steps_that_compute_nothing_leave_time_to_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(worker_module.time, "sleep", slept.append)
    s = Setup()
    s.worker.let_others_run()
    assert slept == []
    s.order(1, READ, [3], [0])
    s.worker.let_others_run()
    assert len(slept) == 1
    assert slept[0] < 0.001
    s.storage.answer(1)
    s.poll()
    s.worker.let_others_run()
    assert len(slept) == 1
