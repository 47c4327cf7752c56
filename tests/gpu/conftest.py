from pathlib import Path
from typing import Any

import pytest

from tests.gpu.pair import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _llama(tmp_path_factory.mktemp("llama-8b-shape"))


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with nine layers: it starts sooner, and a pipeline of two stages has five and four."""
    return _llama(tmp_path_factory.mktemp("nine-layers"), num_hidden_layers=9)


def _llama(folder: Path, **changes: Any) -> Path:
    from benchmarks.vllm_gpu import MODEL

    return write_model(folder, {**MODEL, **changes})


@pytest.fixture(scope="session")
def two_gpus() -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
