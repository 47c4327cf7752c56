"""Two real vLLM on one GPU: with KVBM, and without connector or cache, which says what is right.

The shape of Llama-3.1-8B in bf16, weights made up. vLLM runs in its batch-invariant mode, in which a token
does not depend on what else is in the batch, so that answers can be compared token for token.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.engine import scenarios
from tests.engine.harness import Engine
from tests.engine.scenarios import Ask

BLOCK = 16
DEVICE_BLOCKS = 1280  # 20,480 tokens
OPTIONS = {
    "dtype": "bfloat16",
    "block_size": BLOCK,
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 18432,
    "num_gpu_blocks_override": DEVICE_BLOCKS,
    "max_num_seqs": 64,
    # Fixed, not measured: several engines start on one GPU at the same time.
    "kv_cache_memory_bytes": 4 << 30,
    "gpu_memory_utilization": 0.2,
}
ENV = {"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
HOST = {"DYN_KVBM_CPU_CACHE_GB": "12"}


class Pair:
    """The engine under test, and one without connector or cache that says what is right."""

    def __init__(self, model: Path, mode: str, env: dict[str, str], **options: object) -> None:
        common = {**OPTIONS, "enforce_eager": mode == "eager", **options}
        self._start = lambda: Engine(model, kvbm={}, env={**ENV, **HOST, **env}, **common)
        self.engine = self._start()
        self._plain = Engine(model, env=ENV, enable_prefix_caching=False, **common)
        self.engine.wait_ready()
        self._known: dict[Ask, list[int]] = {}

    def right(self, asks: Sequence[Ask]) -> list[list[int]]:
        plain = [Ask(ask.prompt, ask.max_tokens) for ask in asks]
        new = [ask for ask in dict.fromkeys(plain) if ask not in self._known]
        if new:
            self._known.update(zip(new, self._plain.call(scenarios.run, new).tokens, strict=True))
        return [self._known[ask] for ask in plain]

    def restart(self) -> None:
        """The engine under test ends, and another one starts with the same settings."""
        self.engine.close()
        self.engine = self._start()
        self.engine.wait_ready()

    def close(self) -> None:
        self.engine.close()
        self._plain.close()


def write_model(folder: Path, config: dict[str, Any]) -> Path:
    """A model without weights or tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prompt(seed: int, tokens: int, vocabulary: int = 100_000) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1000, vocabulary) for _ in range(tokens))


def full(asks: Sequence[Ask]) -> int:
    """Blocks that a load can bring: at least one token is left to compute."""
    return sum((len(ask.prompt) - 1) // BLOCK for ask in asks)
