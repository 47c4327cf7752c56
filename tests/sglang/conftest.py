"""Tests with a real SGLang, in the environment of scripts/setup_sglang.sh: without SGLang there are none."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ENV = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
    "PATH": os.pathsep.join((str(Path(sys.prefix) / "bin"), os.environ["PATH"])),  # ninja
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}

if find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ.update(ENV)  # SGLang reads some of it when it is imported
