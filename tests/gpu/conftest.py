import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from benchmarks.vllm_gpu import MODEL

    folder = tmp_path_factory.mktemp("llama-8b-shape")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder
