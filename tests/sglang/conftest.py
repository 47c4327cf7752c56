"""Tests with a real SGLang, in the environment of scripts/setup_sglang.sh: without SGLang there are none."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import DEFAULT_MODEL, TINY, write_weights

Expect = Callable[[list[tuple[int, ...]]], list[list[int]]]
ENV = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
    "PATH": os.pathsep.join((str(Path(sys.prefix) / "bin"), os.environ["PATH"])),  # ninja
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than these tests
}

if find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.update(ENV)  # SGLang reads some of it when it is imported


def write_model(folder: Path, seed: int) -> Path:
    """A small Llama of random weights, in which a wrong page changes the answers."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEFAULT_MODEL / name, folder)
    (folder / "config.json").write_text(json.dumps({**TINY, "tie_word_embeddings": False}))
    write_weights(folder, seed)
    return folder


@pytest.fixture(scope="session")
def keen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sglang") / "keen", seed=1)


@pytest.fixture(scope="session")
def plain(keen: Path) -> Iterator[Any]:
    """The same model without KVBM, and without any caching."""
    from tests.sglang.harness import Engine

    with Engine(keen, disable_radix_cache=True, sleep_on_idle=True) as engine:
        yield engine


@pytest.fixture(scope="session")
def expect(plain: Any) -> Expect:
    """What the prompts must be answered."""
    return lambda asks: plain.run(asks).tokens
