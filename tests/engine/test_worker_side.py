"""The connector's half on a worker with the calls that vLLM's model runner makes, and no engine."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvbm.config import load_config
from kvbm.errors import CapacityError, LostLoadError
from kvbm.logic.operations import Direction, Failure, Operation
from kvbm.runtime import rank
from kvbm.runtime.messages import StepOrders
from kvbm.vllm_integration import worker as worker_module
from kvbm.vllm_integration.identity import Geometry
from kvbm.vllm_integration.worker import Snapshot, WorkerSide
from tests.engine.lazy_loads import LazyCopyEngine

BLOCKS, SLOTS = 8, 8
NAMES = ["layer0", "layer1", "layer2"]
SHAPE = (BLOCKS, 16)  # of a layer's tensor, in bytes
ANNOUNCED = SimpleNamespace(
    kv_cache_groups=[
        SimpleNamespace(layer_names=NAMES, kv_cache_spec=SimpleNamespace(dtype=torch.uint8)),
    ],
    needs_kv_cache_zeroing=False,
)


class Model:
    """A worker's half over three layers; blocks 1 and 2 are in the host tier, in slots 5 and 3."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, checksum: bool = False, announced: object = ANNOUNCED
    ) -> None:
        monkeypatch.setattr(rank, "CpuCopyEngine", LazyCopyEngine)
        shape = Geometry(4, len(NAMES) * SHAPE[1], BLOCKS, 1)
        monkeypatch.setattr(worker_module, "geometry", lambda *_: shape)
        self.caches = {
            name: torch.arange(i, i + BLOCKS * SHAPE[1]).to(torch.uint8).reshape(SHAPE).clone()
            for i, name in enumerate(NAMES)
        }
        config = load_config(environ={}, host__num_blocks=SLOTS, host__checksum=checksum)
        self.side = WorkerSide(SimpleNamespace(parallel_config=SimpleNamespace(rank=0)), announced, config)
        self.side.register(self.caches)
        assert self.side._worker is not None
        self.engine: Any = self.side._worker._records._engine
        for name in NAMES:  # the layers announce themselves in the first forward pass
            self.side.before_layer(name)
        self.engine.offload(np.array([1, 2]), np.array([5, 3]))
        self.stored = {name: cache[1:3].clone() for name, cache in self.caches.items()}
        for cache in self.caches.values():
            cache[1:3] = 0

    def begin(self, *operations: Operation) -> None:
        self.side.begin(StepOrders(list(operations), tokens=1))

    def arrived(self, *blocks: int) -> list[bool]:
        """By layer, whether blocks 1 and 2 are in the given blocks."""
        return [bool(cache[list(blocks)].equal(self.stored[name])) for name, cache in self.caches.items()]

    def end(self) -> Snapshot:
        self.side.end_loads()
        return self.side.snapshot()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch)


def load(slots: tuple[int, ...] = (5, 3)) -> Operation:
    blocks = np.array([4, 6], np.int32)
    return Operation(7, Direction.ONBOARD, "r", blocks, np.array(slots, np.int32), 10.0, in_step=True)


def other_load(*, in_step: bool) -> Operation:
    """Of the first stored block into block 0."""
    block, slot = np.array([0], np.int32), np.array([5], np.int32)
    return Operation(9, Direction.ONBOARD, "w", block, slot, 10.0, in_step)


def offload() -> Operation:
    return Operation(8, Direction.OFFLOAD, "", np.array([7], np.int32), np.array([1], np.int32), 10.0)


def test_by_layer(model: Model) -> None:
    model.begin(load())
    model.side.start_loads(by_layer=True)
    assert model.arrived(4, 6) == [False, False, False]
    model.side.before_layer("layer0")
    assert model.arrived(4, 6) == [True, False, False]
    model.side.before_layer("layer1")
    model.side.before_layer("layer2")
    assert model.arrived(4, 6) == [True, True, True]
    assert model.engine.seen["layers at the end"] == 0
    model.end()


def test_as_a_whole(model: Model) -> None:
    """As one CUDA graph the forward pass calls nobody: all has to be there when it starts."""
    model.begin(load())
    model.side.start_loads(by_layer=False)
    assert model.arrived(4, 6) == [True, True, True]
    model.end()


def test_layers_that_nobody_asked_for_are_there_after_the_step(model: Model) -> None:
    model.begin(load())
    model.side.start_loads(by_layer=True)
    model.side.before_layer("layer1")
    model.end()
    assert model.arrived(4, 6) == [True, True, True]


# ---- loads that are started while the step is planned


def test_started_early(model: Model) -> None:
    """It goes on while vLLM prepares the step, and is not started again by it."""
    model.begin()
    model.end()
    model.side.start_early(load())
    assert model.engine.seen["in step"] == 1
    model.begin(load())
    model.side.start_loads(by_layer=True)
    assert model.arrived(4, 6) == [False, False, False]
    model.side.before_layer("layer0")
    assert model.arrived(4, 6) == [True, False, False]
    model.end()
    assert model.arrived(4, 6) == [True, True, True]
    assert completions(model) == [(7, 0, Failure.NONE)]
    assert model.engine.seen["in step"] == 1


def test_started_early_and_read_as_a_whole(model: Model) -> None:
    model.begin()
    model.side.start_early(load())
    model.begin(load())
    model.side.start_loads(by_layer=False)
    assert model.arrived(4, 6) == [True, True, True]
    model.end()


def test_started_early_for_a_step_that_never_came(model: Model) -> None:
    """The next one writes to no block behind its back."""
    model.begin()
    model.side.start_early(load())
    model.begin()
    assert model.arrived(4, 6) == [True, True, True]
    model.end()
    assert completions(model) == [(7, 0, Failure.NONE)]


def test_started_early_behind_a_step_that_failed_half_way(model: Model) -> None:
    """What that left is waited for, what was started early goes on."""
    model.begin(load())  # the engine raises before `start_loads`
    model.side.start_early(other_load(in_step=True))
    model.begin(other_load(in_step=True))
    assert model.arrived(4, 6) == [True, True, True]
    assert model.caches["layer0"][0].ne(model.stored["layer0"][0]).any()
    model.side.start_loads(by_layer=True)
    model.side.before_layer("layer0")
    assert model.caches["layer0"][0].equal(model.stored["layer0"][0])
    model.end()
    assert model.engine.seen["in step"] == 2


def before_the_first_step(model: Model) -> None:
    model.side._caller = None


def on_another_stream(model: Model) -> None:
    model.engine.caller = lambda: "another"


def where_it_can_not_be_started(model: Model) -> None:
    model.engine.start_in_step = model.engine.onboard = lambda *_: 1 // 0


@pytest.mark.parametrize("where", [before_the_first_step, on_another_stream, where_it_can_not_be_started])
def test_not_started_early(model: Model, where: Callable[[Model], None]) -> None:
    """The step starts it, as it does without."""
    model.begin()
    where(model)
    model.side.start_early(load())
    assert model.engine.seen["in step"] == 0
    for name in ("caller", "start_in_step", "onboard"):
        vars(model.engine).pop(name, None)
    model.begin(load())
    model.side.start_loads(by_layer=False)
    assert model.engine.seen["in step"] == 1
    assert model.arrived(4, 6) == [True, True, True]
    model.end()


@pytest.mark.parametrize("announced", [{"needs_kv_cache_zeroing": True}, {}])
def test_blocks_that_vllm_may_zero_are_not_loaded_early(
    announced: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so when it prepares the step. Nor where it does not say."""
    groups = SimpleNamespace(kv_cache_groups=ANNOUNCED.kv_cache_groups, **announced)
    model = Model(monkeypatch, announced=groups)
    model.begin()
    model.side.start_early(load())
    assert model.engine.seen["in step"] == 0


def test_a_block_that_is_missing_stops_the_engine_in_the_step(model: Model) -> None:
    """Not while vLLM plans."""
    model.begin()
    model.side.start_early(load((5, -1)))
    model.begin(load((5, -1)))
    with pytest.raises(LostLoadError):
        model.side.start_loads(by_layer=True)


# ---- a step


def test_offloads_come_before_the_load(model: Model) -> None:
    """They read what earlier steps computed. And a step that failed half-way leaves nothing behind."""
    model.begin(load(), offload())
    assert [operation.id for operation in model.side._orders.operations] == [7]
    model.side.start_loads(by_layer=True)
    model.begin()  # the forward pass has raised: the next step comes
    assert model.arrived(4, 6) == [True, True, True]
    assert model.side._in_step == []


@pytest.mark.parametrize("threads", [False, True])
def test_what_a_step_overwrites_is_given_up(monkeypatch: pytest.MonkeyPatch, threads: bool) -> None:
    """Its offload is ordered with that step, or was with one before."""
    model = Model(monkeypatch, checksum=threads)
    held = threading.Event()
    monkeypatch.setattr(model.engine, "offload", lambda *_: held.wait(20.0))
    model.engine.never_over = True
    model.side.begin(StepOrders([offload()], cancel=[8], tokens=1))
    held.set()
    model.engine.never_over = False
    done: list[tuple[int, int, Failure]] = []
    for _ in range(1000):
        done += completions(model)
        if done:
            break
        time.sleep(0.005)
    assert done == [(8, 1, Failure.CANCELLED)]


def test_a_load_that_was_never_started_is_started_before_the_next_step(model: Model) -> None:
    model.begin(load())
    model.begin()
    assert model.arrived(4, 6) == [True, True, True]
    assert completions(model) == [(7, 0, Failure.NONE)]


def completions(model: Model) -> list[tuple[int, int, Failure]]:
    """After the report of a step: operation, number of failed blocks, reason."""
    model.side.snapshot()
    report = model.side.report()
    done = report.completions if report else []
    return [(each.operation_id, len(each.failed), each.reason) for each in done]


def test_vllm_does_not_hear_of_a_load_that_nobody_waits_for(model: Model) -> None:
    """vLLM fails an assertion when a request that it does not wait for has finished its load."""
    model.begin(load())
    model.side.start_loads(by_layer=False)
    snapshot = model.end()
    assert snapshot == Snapshot()
    report = model.side.report()
    assert report is not None
    assert [each.operation_id for each in report.completions] == [7]
    assert (report.loads_in_step, report.ready_slots) == (True, SLOTS)


def test_reported_once_and_not_before_it_is_over(model: Model) -> None:
    model.engine.never_over = True
    model.begin(load())
    model.side.start_loads(by_layer=False)
    model.end()
    assert completions(model) == []
    assert model.side._worker is not None
    assert not model.side._worker.idle
    model.begin()  # the next steps
    assert completions(model) == []
    model.engine.never_over = False
    assert completions(model) == [(7, 0, Failure.NONE)]
    assert completions(model) == []
    assert model.side._worker.idle


@pytest.mark.parametrize("in_step_first", [False, True])
def test_with_a_load_that_a_request_waits_for(model: Model, in_step_first: bool) -> None:
    waiting = other_load(in_step=False)
    onboard = model.engine.onboard

    def slow(*args: Any) -> None:
        time.sleep(0.05)  # the load inside the step is over first
        onboard(*args)

    model.engine.onboard = slow
    model.begin(*([load(), waiting] if in_step_first else [waiting, load()]))
    model.side.start_loads(by_layer=True)
    for name in NAMES:
        model.side.before_layer(name)
    finished: set[str] = set()
    done: list[int] = []
    for _ in range(1000):
        finished |= model.end().finished_recving
        report = model.side.report()
        done += [each.operation_id for each in report.completions] if report else []
        if len(done) == 2:
            break
        time.sleep(0.005)
    assert finished == {"w"}
    assert sorted(done) == [7, 9]
    assert all(bool(cache[0].equal(model.stored[name][0])) for name, cache in model.caches.items())


@pytest.mark.parametrize("slots", [(5, -1), (-1, -1)])
def test_a_block_that_is_missing_stops_the_engine(model: Model, slots: tuple[int, int]) -> None:
    """vLLM's asynchronous scheduler would give out a token computed without it."""
    model.begin(load(slots=slots))
    with pytest.raises(LostLoadError):
        model.side.start_loads(by_layer=True)


def test_a_load_that_can_not_be_started_is_made_at_once(model: Model) -> None:
    model.engine.raises_at = {"start"}
    model.begin(load())
    model.side.start_loads(by_layer=True)
    assert model.arrived(4, 6) == [True, True, True]
    assert model.end() == Snapshot()
    assert completions(model) == [(7, 0, Failure.NONE)]


def test_a_load_that_breaks_at_a_layer_is_made_at_once(model: Model) -> None:
    model.engine.raises_at = {"layer1"}
    model.begin(load())
    model.side.start_loads(by_layer=True)
    model.side.before_layer("layer0")
    assert model.arrived(4, 6) == [True, False, False]
    model.side.before_layer("layer1")
    assert model.arrived(4, 6) == [True, True, True]
    assert model.end() == Snapshot()


def test_not_by_layer_where_one_does_not_announce_itself(model: Model) -> None:
    """Some models' attention does not call the connector: nobody knows when such a layer reads."""
    model.side._unannounced = set(NAMES)
    for announced in (NAMES[:2], NAMES[2:]):
        model.begin(load())
        model.side.start_loads(by_layer=True)
        assert model.arrived(4, 6) == [True, True, True]
        for name in announced:
            model.side.before_layer(name)
        model.end()
    model.begin(load())
    model.side.start_loads(by_layer=True)
    assert model.arrived(4, 6) == [False, False, False]
    model.end()


def test_not_with_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, checksum=True)
    report = model.side.report()
    assert report is not None
    assert report.loads_in_step is False


def test_the_default_on_cpus_is_with_checksums() -> None:
    config = load_config(environ={}, host__num_blocks=SLOTS)
    assert config.host.checksum is None


@pytest.mark.parametrize(
    ("error", "stops"), [(CapacityError("too big"), True), (RuntimeError("no such call"), False)]
)
def test_a_copy_engine_that_can_not_be_made(
    monkeypatch: pytest.MonkeyPatch, error: Exception, stops: bool
) -> None:
    """A machine without the memory that was asked for is the user's to mend; all else means: not cached."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(rank, "make_copy_engine", fail)
    monkeypatch.setattr(worker_module, "geometry", lambda *_: Geometry(4, 48, BLOCKS, 1))
    config = load_config(environ={}, host__num_blocks=SLOTS)
    side = WorkerSide(SimpleNamespace(parallel_config=SimpleNamespace(rank=0)), ANNOUNCED, config)
    caches = {name: torch.zeros(SHAPE, dtype=torch.uint8) for name in NAMES}
    if stops:
        with pytest.raises(CapacityError):
            side.register(caches)
    else:
        side.register(caches)
        report = side.report()
        assert report is not None
        assert "no such call" in str(report.refused)
