"""Requests and what the engine's `Admin` says of them. Functions of `llm` run in its process."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine import disk_tools, scenarios
from tests.engine.conftest import TINY
from tests.engine.scenarios import Ask, Stepper

Told = dict[str, Any]
"""What `kvbm explain` shows of a request, and its `num_cached_tokens` as vLLM counts it: "cached"."""

_numbers = itertools.count()
_ESTIMATES: list[Any] = []


def admin(llm: Any) -> Any:
    from kvbm.runtime.admin import Admin

    side = scenarios.side(llm)
    return Admin(side.leader, side.observer, block_bytes=1, disk_block_bytes=1)


def wait_ready(llm: Any, deadline_s: float = 30.0) -> None:
    """Ask trifles until the host tier has its memory: an idle engine does not step."""
    end = time.monotonic() + deadline_s
    while not scenarios.leader(llm).ready:
        if time.monotonic() > end:
            raise TimeoutError("the host tier does not get ready")
        scenarios.run(llm, [Ask((1000, 1001, 1002), 1)])


def ask(llm: Any, asked: Ask, *, adapter: str | None = None, drained: bool = True, **sampling: Any) -> Told:
    """One request, and why it missed. Another one may be running."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    name = f"explained{next(_numbers)}"
    params = SamplingParams(temperature=0, max_tokens=asked.max_tokens, ignore_eos=True, **sampling)
    request: Any = scenarios._prompt(asked)
    return finish(
        llm, name, request, params, drained, LoRARequest("adapter", 1, adapter) if adapter else None
    )


def ask_with_embeddings(llm: Any, tokens: int) -> Told:
    import torch
    from vllm import SamplingParams

    embeddings = torch.zeros(tokens, TINY["hidden_size"], dtype=torch.float32)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    return finish(llm, f"explained{next(_numbers)}", {"prompt_embeds": embeddings}, params, True, None)


def ask_with_adapter(llm: Any, asked: Ask, adapter: str) -> Told:
    return ask(llm, asked, adapter=adapter)


def ask_for_logprobs(llm: Any, asked: Ask) -> Told:
    return ask(llm, asked, prompt_logprobs=1)


def ask_hastily(llm: Any, asked: Ask) -> Told:
    """Without waiting for what follows from it."""
    return ask(llm, asked, drained=False)


def finish(llm: Any, name: str, request: Any, params: Any, drained: bool, lora: Any) -> Told:
    engine = llm.llm_engine
    engine.add_request(name, request, params, lora_request=lora)
    cached, finished = 0, False
    while not finished:
        for output in engine.step():
            if output.request_id == name:
                cached, finished = output.num_cached_tokens or 0, output.finished
    if drained:
        scenarios.drain(llm)
    # vLLM adds to the id that it was given, which is what clients see.
    told = admin(llm).request(name)
    return {**told, "cached": cached}


def again(llm: Any, asked: Ask) -> Told:
    """With an empty device cache."""
    scenarios.drain(llm)
    if not scenarios.reset(llm):
        raise RuntimeError("the device cache could not be reset")
    return ask(llm, asked)


def lose_host(llm: Any) -> None:
    """The host tier evicts all that nobody uses, as if much else had passed through it."""
    scenarios.drain(llm)
    pool = scenarios.leader(llm).pool
    pool.release(pool.allocate(pool.capacity))


def from_disk(llm: Any, asked: Ask) -> Told:
    disk_tools.wait_ready(llm)
    lose_host(llm)
    return again(llm, asked)


def weigh_loads(llm: Any, wanted: bool) -> None:
    """Whether loads that are slower than computing are declined. They are by default."""
    disk = scenarios.leader(llm).disk
    if disk._estimate is not None:
        _ESTIMATES[:] = [disk._estimate]
    disk._estimate = _ESTIMATES[0] if wanted else None


def damage_on_disk(llm: Any, folder: str, asked: Ask, block: int) -> None:
    """Change a bit of a block's record."""
    from kvbm.storage.containers import PAGE

    disk = scenarios.leader(llm).disk
    slot = int(disk.pool.match(scenarios.hashes(llm, asked.prompt))[block])
    client = scenarios.worker(llm)._disk
    stride = client._options.slot_bytes + PAGE
    with (Path(folder) / "kvbm-0" / "rank-0" / f"records-{slot % 4:02d}.kvbm").open("r+b") as file:
        file.seek(PAGE + slot // 4 * stride + PAGE + 1234)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 8]))


def crowded(llm: Any, big: Ask, small: Ask) -> Told:
    """A request that has all of the host tier, and one that comes and goes meanwhile: what is told of it."""
    stepper = Stepper(llm)
    stepper.add("big", big)
    leader = scenarios.leader(llm)
    while leader.pool.num_free or leader._planner.has_work:
        stepper.step()
        if "big" in stepper.finished:
            raise RuntimeError("there was room")
    told = ask(llm, small, drained=False)
    stepper.finish()
    scenarios.drain(llm)
    return told


def clear(llm: Any, *args: Any) -> int:
    return admin(llm).clear(*args)


def wanted(llm: Any) -> int:
    """Blocks that the last requests wanted of KVBM."""
    return admin(llm).measure().host_rate.wanted


def misses(llm: Any) -> dict[str, int]:
    return admin(llm).misses()


def make_adapter(folder: Path) -> Path:
    """A LoRA adapter for `tiny`."""
    from safetensors.numpy import save_file

    rng, size = np.random.default_rng(3), TINY["hidden_size"]
    weights = {}
    for layer in range(TINY["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = rng.standard_normal((8, size)).astype(np.float32)
        weights[f"{name}.lora_B.weight"] = rng.standard_normal((size, 8)).astype(np.float32)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
