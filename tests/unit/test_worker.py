"""The worker with real threads and a copy engine whose every step waits for the test."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from kvbm.errors import LostLoadError
from kvbm.logic.operations import Completion, Direction, Failure, Operation
from kvbm.runtime.worker import Worker
from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CopyEngine, InStepLoad, Transfer
from kvbm.transfer.records import HostRecords

PATIENCE_S = 20.0  # for what happens at once unless something is wrong
RECORD_BYTES = 64
SLOTS = BLOCKS = 8

OFFLOAD, ONBOARD = Direction.OFFLOAD, Direction.ONBOARD


class Gate:
    """Where one copy waits."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()
        self.raises: Exception | None = None

    def open(self, raises: Exception | None = None) -> None:
        self.raises = raises
        self.go.set()

    def pass_through(self) -> None:
        self.entered.set()
        assert self.go.wait(PATIENCE_S)
        if self.raises:
            raise self.raises


class FakeInStepLoad(InStepLoad):
    over = False
    raises: Exception | None = None

    def before_layer(self, name: str) -> None:
        if self.raises is not None:
            raise self.raises

    def before_all(self) -> None:
        self.before_layer("")

    @property
    def is_over(self) -> bool:
        return self.over


class FakeEngine(CopyEngine):
    """Copies between `device` and the arena; with `gated`, each copy waits at a gate of its own first."""

    def __init__(self, arena: HostArena, gated: bool = False) -> None:
        self.arena = arena
        self.device = np.arange(BLOCKS * RECORD_BYTES, dtype=np.uint8).reshape(BLOCKS, RECORD_BYTES).copy()
        self.gated = gated
        self.gates: queue.Queue[tuple[str, list[int], Gate]] = queue.Queue()
        self.calls: list[tuple[str, list[int], list[int]]] = []
        self.marks = 0
        self.afters: list[object] = []
        self.start_raises: Exception | None = None
        self.transfers: list[FakeInStepLoad] = []
        self.in_step_loads: list[FakeInStepLoad] = []
        self.ready: int | None = None

    def fence(self) -> object:
        self.marks += 1
        return self.marks

    def _enter(self, kind: str, blocks: np.ndarray, slots: np.ndarray, after: object) -> None:
        self.calls.append((kind, blocks.tolist(), slots.tolist()))
        self.afters.append(after)
        if self.gated:
            gate = Gate()
            self.gates.put((kind, slots.tolist(), gate))
            gate.pass_through()

    def offload(self, device_blocks: np.ndarray, host_slots: np.ndarray, after: object = None) -> None:
        self._enter("offload", device_blocks, host_slots, after)
        self.arena.records()[host_slots] = self.device[device_blocks]

    def onboard(self, device_blocks: np.ndarray, host_slots: np.ndarray, after: object = None) -> None:
        self._enter("onboard", device_blocks, host_slots, after)
        self.device[device_blocks] = self.arena.records()[host_slots]

    def start_offload(
        self, device_blocks: np.ndarray, host_slots: np.ndarray, after: object = None
    ) -> Transfer:
        return self._start("start offload", device_blocks, host_slots, after)

    def start_onboard(
        self, device_blocks: np.ndarray, host_slots: np.ndarray, after: object = None
    ) -> Transfer:
        return self._start("start onboard", device_blocks, host_slots, after)

    def _start(self, kind: str, blocks: np.ndarray, slots: np.ndarray, after: object) -> Transfer:
        assert threading.current_thread() is threading.main_thread()
        self.calls.append((kind, blocks.tolist(), slots.tolist()))
        self.afters.append(after)
        if self.start_raises is not None:
            raise self.start_raises
        self.transfers.append(FakeInStepLoad())
        return self.transfers[-1]

    def start_in_step(self, device_blocks: np.ndarray, host_slots: np.ndarray) -> InStepLoad:
        assert threading.current_thread() is threading.main_thread()
        self.calls.append(("in step", device_blocks.tolist(), host_slots.tolist()))
        if self.start_raises is not None:
            raise self.start_raises
        self.in_step_loads.append(FakeInStepLoad())
        return self.in_step_loads[-1]

    @property
    def ready_slots(self) -> int | None:
        return self.ready

    def next(self) -> tuple[str, list[int], Gate]:
        """The next copy that has begun and waits."""
        return self.gates.get(timeout=PATIENCE_S)


class Setup:
    def __init__(
        self, *, gated: bool = False, threads: int = 1, checksum: bool = True, by_itself: bool = False
    ) -> None:
        self.now = 0.0
        self.arena = HostArena(SLOTS, RECORD_BYTES)
        self.engine = FakeEngine(self.arena, gated)
        self.engine.copies_by_itself = by_itself
        self.records = HostRecords(self.arena, self.engine, checksum=checksum)
        self.worker = Worker(self.records, threads=threads, clock=lambda: self.now)
        self.serial = 0

    def order(
        self, direction: Direction, blocks: list[int], slots: list[int], timeout_s: float = 10.0
    ) -> Operation:
        self.serial += 1
        return Operation(
            self.serial,
            direction,
            "request",
            np.array(blocks, np.int32),
            np.array(slots, np.int32),
            timeout_s,
        )

    def submit(
        self, direction: Direction, blocks: list[int], slots: list[int], timeout_s: float = 10.0
    ) -> Operation:
        operation = self.order(direction, blocks, slots, timeout_s)
        self.worker.submit([operation])
        return operation

    def completions(self, count: int) -> list[Completion]:
        """What is reported until there are `count`."""
        reported: list[Completion] = []
        wait_for(lambda: len(reported.extend(self.worker.poll()) or reported) >= count)
        assert len(reported) == count
        return reported

    def quiet(self) -> None:
        wait_for(lambda: self.worker.idle)
        assert self.worker.poll() == []


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


@contextmanager
def setup(
    *, gated: bool = False, threads: int = 1, checksum: bool = True, by_itself: bool = False
) -> Iterator[Setup]:
    s = Setup(gated=gated, threads=threads, checksum=checksum, by_itself=by_itself)
    try:
        yield s
    finally:
        s.engine.gated = False
        while not s.engine.gates.empty():
            s.engine.gates.get()[2].open()
        s.worker.close()


def summary(completion: Completion) -> tuple[int, list[int], Failure, bool]:
    return completion.operation_id, completion.failed.tolist(), completion.reason, completion.quiesced


# ---- the usual ----


@pytest.mark.parametrize("checksum", [True, False])
def test_there_and_back(checksum: bool) -> None:
    with setup(checksum=checksum) as s:
        original = s.engine.device.copy()
        first = s.submit(OFFLOAD, [0, 5, 2], [7, 1, 3])
        assert summary(s.completions(1)[0]) == (first.id, [], Failure.NONE, True)
        s.engine.device[:] = 0
        second = s.submit(ONBOARD, [5, 4], [1, 7])
        assert summary(s.completions(1)[0]) == (second.id, [], Failure.NONE, True)
        np.testing.assert_array_equal(s.engine.device[5], original[5])
        np.testing.assert_array_equal(s.engine.device[4], original[0])
        assert not s.engine.device[[0, 1, 2, 3, 6, 7]].any()
        s.quiet()


def test_poll_reports_once_and_idle_tells() -> None:
    with setup(gated=True) as s:
        assert s.worker.idle
        s.submit(OFFLOAD, [0], [0])
        assert not s.worker.idle
        *_, gate = s.engine.next()
        assert s.worker.poll() == []
        gate.open()
        wait_for(lambda: bool(s.worker._completions))
        assert not s.worker.idle  # not polled yet
        assert len(s.worker.poll()) == 1
        assert s.worker.idle
        assert s.worker.poll() == []


@pytest.mark.parametrize("threads", [1, 2])
def test_loads_do_not_wait_for_offloads(threads: int) -> None:
    """Every offload thread is busy and more offloads are queued: a load that comes last begins at once."""
    with setup(gated=True, threads=threads, checksum=False) as s:
        for slot in range(threads):
            s.submit(OFFLOAD, [slot], [slot])
        busy = [s.engine.next()[2] for _ in range(threads)]
        s.submit(OFFLOAD, [6], [6])
        for slot in range(threads):
            s.submit(ONBOARD, [4 + slot], [0])
        loads = [s.engine.next() for _ in range(threads)]
        assert [kind for kind, *_ in loads] == ["onboard"] * threads
        for *_, gate in loads:
            gate.open()
        s.completions(threads)  # while the offloads still wait
        for gate in busy:
            gate.open()
        kind, slots, gate = s.engine.next()
        assert (kind, slots) == ("offload", [6])
        gate.open()
        s.completions(threads + 1)
        s.quiet()


@pytest.mark.parametrize("direction", [OFFLOAD, ONBOARD])
def test_first_come_first_served(direction: Direction) -> None:
    with setup(gated=True, checksum=False) as s:
        for slot in range(4):
            s.submit(direction, [slot], [slot])
        for slot in range(4):
            _, slots, gate = s.engine.next()
            assert slots == [slot]
            gate.open()
        assert [c.operation_id for c in s.completions(4)] == [1, 2, 3, 4]


def test_as_many_at_once_as_threads() -> None:
    with setup(gated=True, threads=3) as s:
        for slot in range(4):
            s.submit(OFFLOAD, [slot], [slot])
        gates = [s.engine.next()[2] for _ in range(3)]
        assert s.engine.gates.empty()
        gates[1].open()
        s.engine.next()[2].open()
        for gate in gates:
            gate.open()
        assert {c.operation_id for c in s.completions(4)} == {1, 2, 3, 4}
        s.quiet()


def test_copies_are_behind_what_was_given_to_the_device_before() -> None:
    with setup() as s:
        s.worker.submit([s.order(OFFLOAD, [0], [0]), s.order(OFFLOAD, [1], [1])])
        s.completions(2)
        s.submit(ONBOARD, [2], [0])
        s.completions(1)
        assert s.engine.afters == [1, 1, 2]


def test_submit_and_poll_do_not_wait_for_a_copy() -> None:
    with setup(gated=True) as s:
        s.submit(OFFLOAD, [0], [0])
        *_, gate = s.engine.next()
        begun = time.monotonic()
        s.submit(OFFLOAD, [1], [1])
        s.worker.cancel([2, 99])
        assert s.worker.poll() == []
        assert not s.worker.idle
        assert time.monotonic() - begun < PATIENCE_S / 2
        gate.open()
        assert [summary(c) for c in s.completions(2)] == [
            (1, [], Failure.NONE, True),
            (2, [0], Failure.CANCELLED, True),
        ]


# ---- failures ----


def test_a_copy_that_raises() -> None:
    with setup(gated=True) as s:
        s.submit(OFFLOAD, [0, 1], [0, 1])
        s.engine.next()[2].open(RuntimeError("broken"))
        assert summary(s.completions(1)[0]) == (1, [0, 1], Failure.ERROR, True)
        s.submit(OFFLOAD, [0, 1], [0, 1])  # the thread lives
        s.engine.next()[2].open()
        assert summary(s.completions(1)[0]) == (2, [], Failure.NONE, True)
        s.submit(ONBOARD, [2, 3], [0, 1])
        s.engine.next()[2].open(OSError("broken"))
        assert summary(s.completions(1)[0]) == (3, [0, 1], Failure.ERROR, True)


def test_a_slot_that_is_not_there_fails() -> None:
    with setup() as s:
        s.submit(OFFLOAD, [0, 1], [0, 1])
        s.completions(1)
        before = s.engine.device.copy()
        s.submit(ONBOARD, [4, 5, 6, 7], [0, -1, 1, -1])
        assert summary(s.completions(1)[0]) == (2, [1, 3], Failure.ERROR, True)
        np.testing.assert_array_equal(s.engine.device[[4, 6]], before[[0, 1]])
        np.testing.assert_array_equal(s.engine.device[[5, 7]], before[[5, 7]])
        s.submit(ONBOARD, [4, 5], [-1, -1])
        assert summary(s.completions(1)[0]) == (3, [0, 1], Failure.ERROR, True)
        s.submit(ONBOARD, [], [])
        assert summary(s.completions(1)[0]) == (4, [], Failure.NONE, True)


@pytest.mark.parametrize("bit", [0, 8 * RECORD_BYTES - 1])
def test_a_corrupt_record_is_not_loaded(bit: int) -> None:
    with setup() as s:
        s.submit(OFFLOAD, [0, 1, 2], [0, 1, 2])
        s.completions(1)
        s.arena.records()[1, bit // 8] ^= 1 << bit % 8
        before = s.engine.device.copy()
        s.submit(ONBOARD, [5, 6, 7], [0, 1, 2])
        assert summary(s.completions(1)[0]) == (2, [1], Failure.CORRUPT, True)
        np.testing.assert_array_equal(s.engine.device[[5, 7]], before[[0, 2]])
        np.testing.assert_array_equal(s.engine.device[6], before[6])
        # With a slot that is not there the greater reason is told.
        s.submit(ONBOARD, [5, 6, 7], [1, -1, 2])
        assert summary(s.completions(1)[0]) == (3, [0, 1], Failure.CORRUPT, True)
        s.submit(OFFLOAD, [1], [1])  # written anew it is good
        s.completions(1)
        s.submit(ONBOARD, [6], [1])
        assert summary(s.completions(1)[0]) == (5, [], Failure.NONE, True)


def test_a_record_that_was_never_written_is_corrupt() -> None:
    with setup() as s:
        s.submit(ONBOARD, [0], [3])
        assert summary(s.completions(1)[0]) == (1, [0], Failure.CORRUPT, True)
        assert s.engine.calls == []


# ---- copies by the device itself ----


@contextmanager
def device() -> Iterator[Setup]:
    with setup(checksum=False, by_itself=True) as s:
        yield s


def in_step(s: Setup, *operations: Operation) -> list[FakeInStepLoad]:
    """The engine's loads behind those that the worker hands out."""
    s.worker.start_in_step(operations)
    return s.engine.in_step_loads[-len(operations) :]


def test_the_device_copies_without_threads() -> None:
    with device() as s:
        assert s.worker.loads_in_step
        assert s.worker._threads == []
        s.worker.submit([s.order(OFFLOAD, [3, 1], [0, 5]), s.order(ONBOARD, [2], [7])])
        assert s.engine.calls == [("start offload", [3, 1], [0, 5]), ("start onboard", [2], [7])]
        assert s.engine.afters == [1, 1]
        assert s.worker.poll() == []
        offload, load = s.engine.transfers
        load.over = True
        assert [summary(c) for c in s.worker.poll()] == [(2, [], Failure.NONE, True)]
        assert s.worker.poll() == []
        assert not s.worker.idle
        offload.over = True
        assert [summary(c) for c in s.worker.poll()] == [(1, [], Failure.NONE, True)]
        s.quiet()


def test_a_load_by_the_device_of_slots_that_are_not_there() -> None:
    with device() as s:
        s.submit(ONBOARD, [4, 5, 6, 7], [0, -1, 1, -1])
        assert s.engine.calls == [("start onboard", [4, 6], [0, 1])]
        assert s.worker.poll() == []
        s.engine.transfers[0].over = True
        assert [summary(c) for c in s.worker.poll()] == [(1, [1, 3], Failure.ERROR, True)]
        s.submit(ONBOARD, [4, 5], [-1, -1])
        assert [summary(c) for c in s.worker.poll()] == [(2, [0, 1], Failure.ERROR, True)]
        assert len(s.engine.calls) == 1
        s.quiet()


@pytest.mark.parametrize("direction", [OFFLOAD, ONBOARD])
def test_a_copy_that_the_device_refuses(direction: Direction) -> None:
    with device() as s:
        s.engine.start_raises = RuntimeError("broken")
        s.worker.submit([s.order(direction, [0, 1], [0, 1]), s.order(direction, [2], [2])])
        assert [summary(c) for c in s.worker.poll()] == [
            (1, [0, 1], Failure.ERROR, True),
            (2, [0], Failure.ERROR, True),
        ]
        s.quiet()


def test_a_copy_by_the_device_that_is_cancelled_is_over_when_it_is_over() -> None:
    with device() as s:
        s.submit(OFFLOAD, [0, 1], [0, 1])
        s.worker.cancel([1])
        assert s.worker.poll() == []
        s.engine.transfers[0].over = True
        assert [summary(c) for c in s.worker.poll()] == [(1, [0, 1], Failure.CANCELLED, True)]
        s.quiet()


@pytest.mark.parametrize("direction", [OFFLOAD, ONBOARD])
def test_a_copy_by_the_device_that_hangs(direction: Direction) -> None:
    with device() as s:
        s.submit(direction, [0, 1], [0, 1], timeout_s=5.0)
        s.now = 4.9
        assert s.worker.poll() == []
        s.now = 5.0
        assert [summary(c) for c in s.worker.poll()] == [(1, [0, 1], Failure.TIMEOUT, False)]
        s.now = 500.0
        assert s.worker.poll() == []
        s.engine.transfers[0].over = True
        assert [summary(c) for c in s.worker.poll()] == [(1, [0, 1], Failure.TIMEOUT, True)]
        s.quiet()


def test_a_load_inside_a_step_is_complete_when_it_is_over() -> None:
    with device() as s:
        one, two = in_step(s, s.order(ONBOARD, [3, 1], [0, 5]), s.order(ONBOARD, [2], [7]))
        assert s.engine.calls == [("in step", [3, 1], [0, 5]), ("in step", [2], [7])]
        assert s.worker.poll() == []
        assert not s.worker.idle
        two.over = True
        assert [summary(c) for c in s.worker.poll()] == [(2, [], Failure.NONE, True)]
        assert s.worker.poll() == []
        assert not s.worker.idle
        one.over = True
        assert [summary(c) for c in s.worker.poll()] == [(1, [], Failure.NONE, True)]
        s.quiet()


def test_a_load_inside_a_step_that_cannot_start_is_made_at_once() -> None:
    """The engine computes on it already: it can't become a miss."""
    with device() as s:
        s.engine.arena.records()[[0, 1]] = 7
        s.engine.start_raises = RuntimeError("broken")
        (load,) = s.worker.start_in_step([s.order(ONBOARD, [2, 3], [0, 1])])
        assert (s.engine.device[[2, 3]] == 7).all()
        load.before_layer("any")
        load.before_all()
        assert [summary(c) for c in s.worker.poll()] == [(1, [], Failure.NONE, True)]
        s.quiet()


@pytest.mark.parametrize("call", ["before_layer", "before_all"])
def test_a_load_inside_a_step_that_breaks_is_made_at_once(call: str) -> None:
    with device() as s:
        s.engine.arena.records()[[0, 1]] = 7
        (load,) = s.worker.start_in_step([s.order(ONBOARD, [2, 3], [0, 1])])
        s.engine.in_step_loads[0].raises = RuntimeError("broken")
        assert not load.is_over
        load.before_layer("any") if call == "before_layer" else load.before_all()
        assert (s.engine.device[[2, 3]] == 7).all()
        assert [summary(c) for c in s.worker.poll()] == [(1, [], Failure.NONE, True)]
        s.quiet()


def test_a_load_inside_a_step_that_cannot_be_made_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with device() as s:
        with pytest.raises(LostLoadError, match="not in the host tier"):
            s.worker.start_in_step([s.order(ONBOARD, [0, 1], [3, -1])])
        assert s.engine.calls == []

        def onboard(*args: object) -> None:
            raise RuntimeError("lost")

        s.engine.start_raises = RuntimeError("broken")
        monkeypatch.setattr(s.engine, "onboard", onboard)
        with pytest.raises(LostLoadError, match="lost"):
            s.worker.start_in_step([s.order(ONBOARD, [0, 1], [0, 1])])


@pytest.mark.parametrize(("checksum", "by_itself"), [(True, True), (True, False), (False, False)])
def test_no_loads_inside_a_step_otherwise(checksum: bool, by_itself: bool) -> None:
    """With checksums a record that turns out to be damaged could not be taken back."""
    with setup(checksum=checksum, by_itself=by_itself) as s:
        assert not s.worker.loads_in_step
        assert len(s.worker._threads) == 2
        with pytest.raises(LostLoadError):
            s.worker.start_in_step([s.order(ONBOARD, [0], [0])])


def test_completions_outlive_a_device_that_cannot_be_asked() -> None:
    class Lost(FakeInStepLoad):
        @property
        def is_over(self) -> bool:
            raise RuntimeError("device lost")

    with device() as s:
        s.submit(ONBOARD, [1], [1])
        s.submit(ONBOARD, [2], [-1])
        s.worker._transfers[0].transfer = Lost()
        assert [summary(c) for c in s.worker.poll()] == [
            (1, [0], Failure.ERROR, True),
            (2, [0], Failure.ERROR, True),
        ]


def test_ready_slots_are_those_of_the_copy_engine() -> None:
    with setup() as s:
        assert s.worker.ready_slots == SLOTS  # None: all are
        for ready in (1, 5):
            s.engine.ready = ready
            assert s.worker.ready_slots == ready


# ---- cancel ----


def test_cancelled_before_it_runs() -> None:
    with setup(gated=True) as s:
        s.submit(OFFLOAD, [0], [0])
        *_, gate = s.engine.next()
        s.submit(OFFLOAD, [1, 2], [1, 2])
        s.worker.cancel([2])
        gate.open()
        assert [summary(c) for c in s.completions(2)] == [
            (1, [], Failure.NONE, True),
            (2, [0, 1], Failure.CANCELLED, True),
        ]
        assert len(s.engine.calls) == 1
        s.quiet()


def test_cancelled_while_it_runs() -> None:
    with setup(gated=True) as s:
        s.submit(OFFLOAD, [0, 1], [0, 1])
        *_, gate = s.engine.next()
        s.worker.cancel([1])
        assert s.worker.poll() == []  # it may still touch the slots
        gate.open()
        assert summary(s.completions(1)[0]) == (1, [0, 1], Failure.CANCELLED, True)
        s.quiet()


def test_cancelled_when_it_is_over() -> None:
    with setup() as s:
        s.submit(OFFLOAD, [0], [0])
        wait_for(lambda: bool(s.worker._completions))
        s.worker.cancel([1])
        assert summary(s.completions(1)[0]) == (1, [], Failure.NONE, True)
        s.worker.cancel([1])
        s.quiet()


def test_cancelled_and_raising_is_an_error() -> None:
    with setup(gated=True) as s:
        s.submit(OFFLOAD, [0], [0])
        *_, gate = s.engine.next()
        s.worker.cancel([1])
        gate.open(RuntimeError())
        assert summary(s.completions(1)[0]) == (1, [0], Failure.ERROR, True)


# ---- deadlines ----


@pytest.mark.parametrize("direction", [OFFLOAD, ONBOARD])
def test_a_copy_that_hangs(direction: Direction) -> None:
    with setup(gated=True, threads=2) as s:
        s.submit(OFFLOAD, [0, 1], [0, 1])
        s.engine.next()[2].open()
        s.completions(1)
        s.submit(direction, [0, 1], [0, 1], timeout_s=5.0)
        *_, gate = s.engine.next()
        s.now = 4.9
        assert s.worker.poll() == []
        s.now = 5.0
        assert [summary(c) for c in s.worker.poll()] == [(2, [0, 1], Failure.TIMEOUT, False)]
        s.now = 500.0
        assert s.worker.poll() == []
        assert not s.worker.idle
        s.submit(OFFLOAD, [3], [3])  # the other thread works on
        s.engine.next()[2].open()
        assert summary(s.completions(1)[0]) == (3, [], Failure.NONE, True)
        gate.open()
        assert [summary(c) for c in s.completions(1)] == [(2, [0, 1], Failure.TIMEOUT, True)]
        s.quiet()


def test_a_copy_that_hangs_and_then_raises() -> None:
    with setup(gated=True) as s:
        s.submit(OFFLOAD, [0], [0], timeout_s=5.0)
        *_, gate = s.engine.next()
        s.now = 6.0
        assert [c.quiesced for c in s.worker.poll()] == [False]
        gate.open(RuntimeError())
        assert summary(s.completions(1)[0]) == (1, [0], Failure.ERROR, True)
        s.quiet()


def test_a_cancelled_copy_that_hangs() -> None:
    with setup(gated=True) as s:
        s.submit(OFFLOAD, [0], [0], timeout_s=5.0)
        *_, gate = s.engine.next()
        s.worker.cancel([1])
        s.now = 6.0
        assert [summary(c) for c in s.worker.poll()] == [(1, [0], Failure.TIMEOUT, False)]
        s.worker.cancel([1])
        gate.open()
        assert summary(s.completions(1)[0]) == (1, [0], Failure.TIMEOUT, True)
        s.quiet()


def test_a_load_that_never_began_is_reported_at_its_deadline() -> None:
    """A request waits for it; for an offload nobody does."""
    with setup(gated=True, checksum=False) as s:
        s.submit(OFFLOAD, [0], [0], timeout_s=1000.0)
        *_, offload = s.engine.next()
        s.submit(ONBOARD, [3], [3], timeout_s=1000.0)
        *_, load = s.engine.next()
        s.submit(ONBOARD, [1], [1], timeout_s=5.0)
        s.submit(OFFLOAD, [2], [2], timeout_s=5.0)
        s.now = 6.0
        assert [summary(c) for c in s.worker.poll()] == [(3, [0], Failure.TIMEOUT, False)]
        assert s.worker.poll() == []
        load.open()
        assert [summary(c) for c in s.completions(2)] == [
            (2, [], Failure.NONE, True),
            (3, [0], Failure.TIMEOUT, True),
        ]
        offload.open()
        assert [summary(c) for c in s.completions(2)] == [
            (1, [], Failure.NONE, True),
            (4, [0], Failure.TIMEOUT, True),
        ]
        assert len(s.engine.calls) == 2  # what came too late was not executed
        s.quiet()


def test_deadlines_count_from_receipt() -> None:
    with setup(gated=True) as s:
        s.now = 1000.0
        s.submit(OFFLOAD, [0], [0], timeout_s=5.0)
        *_, gate = s.engine.next()
        assert s.worker.poll() == []
        gate.open()
        assert summary(s.completions(1)[0]) == (1, [], Failure.NONE, True)


# ---- the end ----


def test_close_stops_the_threads() -> None:
    with setup(threads=3) as s:
        assert s.worker.close()
        assert not any(thread.is_alive() for thread in s.worker._threads)


def test_close_does_not_execute_what_is_queued_nor_wait_for_what_hangs() -> None:
    with setup(gated=True) as s:
        s.submit(OFFLOAD, [0], [0])
        *_, gate = s.engine.next()
        s.submit(OFFLOAD, [1], [1])
        s.submit(ONBOARD, [2], [0])
        begun = time.monotonic()
        assert not s.worker.close()
        assert time.monotonic() - begun < PATIENCE_S / 2
        assert all(thread.daemon for thread in s.worker._threads)
        gate.open()
        for thread in s.worker._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert len(s.engine.calls) == 1
