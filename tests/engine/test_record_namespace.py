"""What tells the records of one engine from those of another that finds them on disk."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvbm.runtime import fingerprint
from kvbm.vllm_integration import weights
from kvbm.vllm_integration.exchange import find_exchange
from kvbm.vllm_integration.identity import Geometry
from kvbm.vllm_integration.weights import record_namespace

BLOCKS = 8


class Engine:
    def __init__(self, folder: Path) -> None:
        (folder / "w.safetensors").write_bytes(b"weights")
        self.model = SimpleNamespace(model=str(folder), revision=None, seed=0)
        self.load_format = "auto"
        self.backend = "FLASH"
        self.scale = 1.0
        self.caches = {f"layer{i}": torch.zeros((BLOCKS, 2, 4, 6)) for i in range(2)}

    def namespace(self) -> bytes:
        layer = SimpleNamespace(
            get_attn_backend=lambda: SimpleNamespace(full_cls_name=lambda: ("module", self.backend)),
            _k_scale=torch.tensor(1.0),
            _v_scale=torch.tensor(self.scale),
        )
        config = SimpleNamespace(
            model_config=self.model,
            load_config=SimpleNamespace(load_format=self.load_format),
            compilation_config=SimpleNamespace(static_forward_context={"layer0": layer, "other": object()}),
        )
        return record_namespace(config, None, Geometry(4, 384, BLOCKS, 1), self.caches)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(weights, "engine_namespace", lambda *_: b"e" * 16)
    return Engine(tmp_path)


def test_the_same_engine_finds_its_own(engine: Engine) -> None:
    assert engine.namespace() == engine.namespace()
    assert len(engine.namespace()) == 16


def other_weights(engine: Engine) -> None:
    (Path(engine.model.model) / "w.safetensors").write_bytes(b"other weights")


def other_scale(engine: Engine) -> None:
    engine.scale = 0.5


def other_seed(engine: Engine) -> None:
    engine.model.seed = 1


def random_weights(engine: Engine) -> None:
    engine.load_format = "dummy"


def other_backend(engine: Engine) -> None:
    engine.backend = "TRITON"


def other_dtype(engine: Engine) -> None:
    engine.caches = {name: cache.to(torch.float64) for name, cache in engine.caches.items()}


def other_shape(engine: Engine) -> None:
    engine.caches = {name: cache.reshape(BLOCKS, 4, 2, 6) for name, cache in engine.caches.items()}


def other_order_of_bytes(engine: Engine) -> None:
    engine.caches = {name: torch.zeros((BLOCKS, 4, 2, 6)).permute(0, 2, 1, 3) for name in engine.caches}
    assert engine.caches["layer0"].shape == (BLOCKS, 2, 4, 6)


def fewer_layers(engine: Engine) -> None:
    del engine.caches["layer1"]


def other_stage(engine: Engine) -> None:
    """Of a pipeline: as many layers, and all alike."""
    engine.caches = {f"layer{i + 2}": cache for i, cache in enumerate(engine.caches.values())}


@pytest.mark.parametrize(
    "change",
    [
        other_weights,
        other_scale,
        other_seed,
        random_weights,
        other_backend,
        other_dtype,
        other_shape,
        other_order_of_bytes,
        fewer_layers,
        other_stage,
    ],
    ids=lambda change: change.__name__,
)
def test_what_may_change_the_bytes_changes_it(engine: Engine, change: Callable[[Engine], None]) -> None:
    before = engine.namespace()
    change(engine)
    assert engine.namespace() != before


def test_a_stage_of_a_pipeline_exchanges_nothing() -> None:
    """Its records look like those of a smaller model."""
    assert "stage" in str(find_exchange(None, None, {}, Geometry(4, 384, BLOCKS, 2, stages=(384, 384)), 0))


def test_another_vllm_finds_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine.namespace()
    monkeypatch.setattr(weights.vllm, "__version__", "99.0")
    assert engine.namespace() != before


def test_another_device_finds_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine.namespace()
    monkeypatch.setattr(fingerprint, "_CPU_FLAGS", {"no such flag"})
    assert engine.namespace() != before


def test_another_engine_namespace_finds_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine.namespace()
    monkeypatch.setattr(weights, "engine_namespace", lambda *_: b"f" * 16)
    assert engine.namespace() != before


def test_the_number_of_device_blocks_does_not_matter(engine: Engine) -> None:
    """It depends on the memory that was free, and the strides depend on it."""

    def caches(blocks: int) -> dict[str, Any]:
        # K and V in halves of the tensor: the stride between them grows with the blocks.
        return {name: torch.zeros((2, blocks, 4, 6)).permute(1, 0, 2, 3) for name in engine.caches}

    digests = []
    for blocks in (BLOCKS, 3 * BLOCKS):
        tensor = caches(blocks)["layer0"]
        digests.append(weights._tensor("layer0", tensor, Geometry(4, 384, blocks, 1), None))
    assert digests[0] == digests[1]
