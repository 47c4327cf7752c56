"""The connector's half on a worker with a disk tier: what the I/O process is told, and what the leader is."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvbm.config import load_config
from kvbm.errors import CapacityError
from kvbm.logic.operations import Direction, Failure, Operation
from kvbm.runtime.messages import StepOrders, WorkerReport
from kvbm.runtime.rank import FoundRecords
from kvbm.storage.client import BatchResult, Replies
from kvbm.storage.messages import Batch, Status
from kvbm.storage.store import Found
from kvbm.vllm_integration import worker as worker_module
from kvbm.vllm_integration.identity import Geometry
from kvbm.vllm_integration.worker import WorkerSide
from tests.engine.test_worker_side import ANNOUNCED, NAMES

BLOCKS, SLOTS, DISK = 8, 8, 20
HASHES = np.random.default_rng(4).integers(0, 2**64, (100_000, 2), np.uint64)


class FakeStorage:
    def __init__(self) -> None:
        self.ready = False
        self.refused: str | None = None
        self.replies = Replies()
        self.calls: list[Any] = []

    def submit(self, batch: Batch) -> None:
        self.calls.append(("write" if batch.write else "read", batch.id))

    def discard(self, disk_slots: np.ndarray) -> None:
        self.calls.append(("discard", *disk_slots.tolist()))

    def clear(self) -> None:
        self.calls.append("clear")

    def poll(self) -> Replies:
        replies, self.replies = self.replies, Replies()
        return replies

    def close(self) -> None:
        self.calls.append("close")


class Model:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int = 0, **settings: Any) -> None:
        self.storage = FakeStorage()
        self.started: dict[str, Any] = {}

        def start(config: Any, arena: Any, **how: Any) -> FakeStorage:
            self.started = {**how, "arena slots": arena.num_slots}
            return self.storage

        monkeypatch.setattr(worker_module, "start_storage", start)
        monkeypatch.setattr(worker_module, "geometry", lambda *_: Geometry(4, 48, BLOCKS, 2))
        monkeypatch.setattr(worker_module, "record_namespace", lambda *_: b"n" * 16)
        parallel = SimpleNamespace(rank=rank, data_parallel_rank=3, data_parallel_rank_local=3)
        config = load_config(environ={}, **{"host__num_blocks": SLOTS, "disk__num_blocks": DISK, **settings})
        self.side = WorkerSide(SimpleNamespace(parallel_config=parallel), ANNOUNCED, config)
        self.side.register({name: torch.zeros((BLOCKS, 16), dtype=torch.uint8) for name in NAMES})
        assert self.side._refused is None

    def step(self, *operations: Operation, tokens: int = 1, **orders: Any) -> WorkerReport | None:
        self.side.begin(StepOrders(list(operations), tokens=tokens, **orders))
        self.side.start_loads()
        self.side.end_loads()
        self.side.snapshot()
        return self.side.report()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model(monkeypatch)
    first = model.step()
    assert first is not None
    assert first.ready_slots == SLOTS
    return model


def order(id_: int, direction: Direction, slot: int = 0) -> Operation:
    slots = np.array([slot], np.int32)
    return Operation(
        id_, direction, "", np.empty(0, np.int32), slots, 10.0, disk_slots=slots, hashes=HASHES[:1]
    )


def answer(model: Model, id_: int, status: Status = Status.DONE) -> None:
    failed = np.arange(1 if status else 0, dtype=np.int32)
    result = BatchResult(id_, failed, status, np.zeros(1, np.uint64), 0.5)
    model.storage.replies.results.append(result)


# ---- orders ----


def test_it_is_started_with_this_ranks_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, rank=1)
    started = model.started
    assert (started["rank"], started["ranks"], started["num_slots"]) == (1, 2, DISK)
    assert (started["namespace"], started["arena slots"]) == (b"n" * 16, SLOTS)


def test_not_without_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, disk__num_blocks=0)
    assert model.started == {}
    report = model.step(order(1, Direction.READ))
    assert report is not None
    assert [(done.reason, done.failed.tolist()) for done in report.completions] == [
        (Failure.UNAVAILABLE, [0])
    ]
    model.step(forget=[1], forget_all=True)


def test_what_the_user_asked_for_and_the_machine_lacks_stops_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(monkeypatch)

    def fail(*_: object, **__: object) -> None:
        raise CapacityError("the drive is too small")

    monkeypatch.setattr(worker_module, "start_storage", fail)
    with pytest.raises(CapacityError):
        model.side.register({name: torch.zeros((BLOCKS, 16), dtype=torch.uint8) for name in NAMES})


@pytest.mark.parametrize("tokens", [0, 1])
def test_reads_come_before_writes(model: Model, tokens: int) -> None:
    model.step(order(1, Direction.WRITE), order(2, Direction.READ), order(3, Direction.WRITE), tokens=tokens)
    assert model.storage.calls == [("read", 2), ("write", 1), ("write", 3)]


def test_what_is_to_be_forgotten_is_so_before_its_slot_is_written_again(model: Model) -> None:
    model.step(order(1, Direction.WRITE, slot=5), forget=[5, 6])
    assert model.storage.calls == [("discard", 5, 6), ("write", 1)]
    model.step(order(2, Direction.WRITE), forget_all=True)
    assert model.storage.calls[2:] == ["clear", ("write", 2)]


def test_a_step_without_such_orders_says_nothing(model: Model) -> None:
    model.step()
    assert model.storage.calls == []


def test_vllm_does_not_hear_of_the_disk(model: Model) -> None:
    model.step(order(1, Direction.READ), order(2, Direction.WRITE))
    answer(model, 1)
    answer(model, 2, Status.ERROR)
    snapshot = model.side.snapshot()
    assert snapshot == worker_module.Snapshot()
    report = model.side.report()
    assert report is not None
    assert [(done.operation_id, done.reason, done.seconds) for done in report.completions] == [
        (1, Failure.NONE, 0.5),
        (2, Failure.ERROR, 0.5),
    ]
    assert model.step() is None


# ---- what was found ----


def found(start: int, count: int) -> Found:
    numbers = np.arange(start, start + count)
    return Found(numbers.astype(np.int32), HASHES[numbers], np.zeros(count, np.uint8))


def pieces_of(model: Model) -> list[tuple[list[int], bool]]:
    """Slots and whether it was the last piece, report by report."""
    pieces = []
    for _ in range(10):
        report = model.step()
        if report is not None and report.found is not None:
            slots, hashes = report.found
            assert (hashes == HASHES[slots]).all()
            pieces.append((slots.tolist(), report.found_all))
        elif report is not None:
            assert not report.found_all
    return pieces


def test_what_was_found_is_reported_once(model: Model) -> None:
    model.storage.replies.found = [found(0, 3), found(3, 2)]
    assert pieces_of(model) == []  # not all of it, yet
    model.storage.ready = True
    assert pieces_of(model) == [([0, 1, 2, 3, 4], True)]


def test_that_nothing_was_found_is_reported_as_well(model: Model) -> None:
    """Requests wait for it."""
    model.storage.ready = True
    model.storage.replies.found = [found(0, 0)]
    assert pieces_of(model) == [([], True)]


def test_much_is_reported_in_pieces(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FoundRecords, "_PIECE", 4)
    model.storage.ready = True
    model.storage.replies.found = [found(0, 6), found(6, 3)]
    assert pieces_of(model) == [([0, 1, 2, 3], False), ([4, 5, 6, 7], False), ([8], True)]


@pytest.mark.parametrize("count", [1, 3, 4, 8])
def test_the_last_piece_is_the_last(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FoundRecords, "_PIECE", 4)
    records = FoundRecords()
    records.add([])
    assert not records.wants_report
    assert records.next_piece() == (None, False)
    records.add([found(0, count)])
    slots: list[int] = []
    last = False
    while records.wants_report:
        assert not last
        piece, last = records.next_piece()
        assert piece is not None
        slots += piece[0].tolist()
    assert last
    assert slots == list(range(count))
    assert records.next_piece() == (None, False)


def test_a_piece_is_no_more_than_a_step_can_bear() -> None:
    records = FoundRecords()
    records.add([found(0, 70_000)])
    sizes = []
    while records.wants_report:
        piece, _ = records.next_piece()
        assert piece is not None
        sizes.append(len(piece[0]))
    assert sizes == [32768, 32768, 70_000 - 65_536]


# ---- refusals and timed steps ----


def test_a_refusal_is_reported_once(model: Model) -> None:
    assert model.step() is None
    model.storage.refused = "the drive is gone"
    report = model.step()
    assert report is not None
    assert (report.disk_refused, report.refused) == ("the drive is gone", None)
    assert model.step() is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_tells_when_a_timed_step_is_over(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    model = Model(monkeypatch, rank=rank)
    model.step()
    report = model.step(timed=True)
    assert (report is not None and report.timed) == (rank == 0)
    assert model.step() is None


def test_close(model: Model) -> None:
    model.side.close()
    assert model.storage.calls == ["close"]
