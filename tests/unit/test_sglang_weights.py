"""When SGLang's weights change: what is kept from being served, and until when."""

from typing import Any

import pytest

from kvbm.sglang_integration import compat
from kvbm.sglang_integration.weights import WeightWatch


class Store:
    def __init__(self) -> None:
        self.cleared = 0

    def clear(self) -> None:
        self.cleared += 1


class Engine:
    """SGLang's classes as far as they are wrapped, new for each test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class WeightUpdater:
            def begin_weight_update(self) -> None: ...

            def end_weight_update(self, *, run_post_load: bool) -> None: ...

            def update_weights_from_disk(self, path: str) -> tuple[bool, str]:
                return True, path

        class BaseCacheController:
            def reset(self) -> str:
                return "reset"

        class HybridCacheController(BaseCacheController):
            def reset(self) -> str:
                return super().reset()

        self.updater, self.controller = WeightUpdater(), HybridCacheController()
        monkeypatch.setattr(compat, "weight_updaters", lambda: iter([WeightUpdater]))
        monkeypatch.setattr(
            compat, "cache_controllers", lambda: iter([HybridCacheController, BaseCacheController])
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch)


@pytest.fixture
def watch(engine: Engine) -> WeightWatch:
    return WeightWatch()


@pytest.fixture
def store(watch: WeightWatch) -> Store:
    store = Store()
    watch.add(store)
    return store


def test_nothing_goes_in_or_out_between_a_change_and_the_flush(
    engine: Engine, watch: WeightWatch, store: Store
) -> None:
    assert engine.updater.update_weights_from_disk("there") == (True, "there")
    assert watch.changing
    assert not store.cleared  # what is under way could still come in
    assert engine.controller.reset() == "reset"
    assert store.cleared == 1
    assert not watch.changing


def test_a_flush_alone_keeps_everything(engine: Engine, watch: WeightWatch, store: Store) -> None:
    engine.controller.reset()
    assert not store.cleared


def test_a_session(engine: Engine, watch: WeightWatch, store: Store) -> None:
    engine.updater.begin_weight_update()
    engine.controller.reset()
    assert (watch.changing, store.cleared) == (False, 1)
    engine.updater.end_weight_update(
        run_post_load=False
    )  # may change weights, and is not followed by a flush
    assert (watch.changing, store.cleared) == (False, 2)


def test_a_session_without_a_flush_waits_for_one(engine: Engine, watch: WeightWatch, store: Store) -> None:
    engine.updater.begin_weight_update()
    engine.updater.end_weight_update(run_post_load=True)
    assert watch.changing
    engine.controller.reset()
    assert (watch.changing, store.cleared) == (False, 1)


def test_a_failed_change_counts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, path: str) -> None:
        raise OSError(path)

    monkeypatch.setattr(type(engine.updater), "update_weights_from_disk", fails)
    watch, store = WeightWatch(), Store()
    watch.add(store)
    with pytest.raises(OSError, match="there"):
        engine.updater.update_weights_from_disk("there")
    assert watch.changing


def test_methods_are_wrapped_once(engine: Engine, watch: WeightWatch, store: Store) -> None:
    other = Store()
    watch.add(other)
    engine.updater.update_weights_from_disk("there")
    engine.controller.reset()
    assert (store.cleared, other.cleared) == (1, 1)


def test_an_engine_without_these_methods_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "weight_updaters", lambda: iter(()))
    monkeypatch.setattr(compat, "cache_controllers", lambda: iter(()))
    WeightWatch().add(Store())
    assert "does not hear of" in caplog.text
