"""Which versions of an engine are taken."""

import pytest

from kvbm.engines import SGLANG, TENSORRT_LLM, VLLM, Engine
from kvbm.errors import UnsupportedEngineError

INSIDE = [
    *((VLLM, version) for version in ("0.26.0", "0.32.0", "0.32.0+cpu", "0.33.1rc1")),
    *((SGLANG, version) for version in ("0.5.9", "0.5.10.post1", "0.5.23")),
    *((TENSORRT_LLM, version) for version in ("1.2.0", "1.3.0rc5", "1.4.2")),
]
OUTSIDE = [
    *((VLLM, version) for version in ("0.25.1", "0.34.0", "1.0.0", "1", "dev", "")),
    *((SGLANG, version) for version in ("0.5.8", "0.5.24", "0.6.0", "0.5", "main")),
    *((TENSORRT_LLM, version) for version in ("1.1.9", "1.5.0", "0.20.0")),
]


@pytest.mark.parametrize(("engine", "version"), INSIDE)
def test_versions_within_the_range(engine: Engine, version: str) -> None:
    engine.require(version, allow_untested=False)


@pytest.mark.parametrize(("engine", "version"), OUTSIDE)
def test_versions_outside_the_range(engine: Engine, version: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=f"{engine.name} .*KVBM_ALLOW_UNTESTED_ENGINE"):
        engine.require(version, allow_untested=False)
    engine.require(version, allow_untested=True)
