"""What a request sees on a GPU: vLLM alone, with KVBM, and with vLLM's own CPU offloading, in one run.

    python benchmarks/vllm_gpu.py [--engines none kvbm native] [--modes eager graphs] [--json FILE]

Llama-3.1-8B in shape, bf16, weights made up. Each engine runs in a process of its own (AsyncLLM, so with
vLLM's asynchronous scheduler, as `vllm serve` does) and is asked for: the time to the first token (TTFT) of
prompts of 4k, 16k and 32k tokens, cold, found in device memory, and found in host memory after the device
cache was emptied; the inter-token latency of 16 decoding requests while such prompts arrive; a batch of 32
prompts of 2k tokens with 64 output tokens; its start. Tokens served from a tier are asserted, or a figure
would mean nothing. `--only` takes parts of that: ttft, decode, batch, or start alone. `--only disk` asks for
prompts that lie on disk alone: the engine `disk` loads what pays, `disk-always` all that is there. `dma`,
`kernel` and `staged` are KVBM with one way to copy; `timed` is KVBM in an engine that tells where the time of
its steps goes while requests decode.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}
SIZES = {"4k": 4096, "16k": 16384, "32k": 32768}
DECODE_BEFORE_S, ARRIVE_EVERY_S = 1.0, 0.3
DEVICE_BLOCKS = 6000  # 96,000 tokens, so that a handful of long prompts drives others out
KVBM = {
    "kv_connector": "DynamoConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "kvbm.vllm_integration.connector",
}
BENCH = {"kv_role": "kv_both", "kv_connector_module_path": "benchmarks.connectors"}
COPY_METHODS = ("dma", "kernel", "staged")
CONNECTORS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "kvbm": KVBM,
    "native": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"},
    **dict.fromkeys(COPY_METHODS, KVBM),
    "disk": KVBM,
    "disk-always": KVBM,
    "null": {**BENCH, "kv_connector": "NullConnector"},
    "timed": {**BENCH, "kv_connector": "TimedConnector"},
    "no-copies": {**BENCH, "kv_connector": "NoCopiesConnector"},
}
PARTS = ["ttft", "decode", "batch", "disk", "start"]
DISK_HOST_GB = 4.5  # two of the prompts that lie on disk
# Of a turn of the loop of the engine `timed`. The hooks are parts of the others; what these leave of a turn
# the engine has waited for the device.
STEP_PARTS = ("schedule", "execute", "sample", "update", "hooks")
STEP_COLUMNS = ("end", "turn", "tokens", *STEP_PARTS)


class Engine:
    """One engine under measurement. Times in seconds."""

    def __init__(self, name: str, mode: str, host_gb: float, **options: Any) -> None:
        from vllm import SamplingParams
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.host_gb = host_gb
        self.step_times = Path(tempfile.mktemp(suffix=".steps")) if name == "timed" else None
        if self.step_times is not None:
            os.environ["STEP_TIMES"] = str(self.step_times)
        self._sampling = SamplingParams
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(MODEL))
        connector = CONNECTORS[name]
        if name == "native":
            connector = {
                **(connector or {}),
                "kv_connector_extra_config": {"cpu_bytes_to_use": int(host_gb * 1e9)},
            }
        elif connector is not None and name != "null":
            extra: dict[str, Any] = {"host.cache_gb": host_gb}
            if name in COPY_METHODS:
                extra["transfer.copy_method"] = name
            if name.startswith("disk"):
                extra = {
                    "host.cache_gb": DISK_HOST_GB,
                    "disk.cache_gb": 20.0,
                    "disk.dir": tempfile.mkdtemp(dir="."),
                    "disk.disable_filter": True,
                    "disk.skip_slow_loads": name == "disk",
                }
            connector = {**connector, "kv_connector_extra_config": extra}
        start = time.perf_counter()
        self.llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                **{
                    "model": str(folder),
                    "load_format": "dummy",
                    "skip_tokenizer_init": True,
                    "max_model_len": 36864,
                    "num_gpu_blocks_override": DEVICE_BLOCKS,
                    "enforce_eager": mode == "eager",
                    "enable_prefix_caching": True,
                    "kv_transfer_config": KVTransferConfig(**connector) if connector else None,
                    **options,
                }
            )
        )
        self.start_s = time.perf_counter() - start
        self._serial = 0

    async def ask(self, tokens: Sequence[int], output: int = 1) -> dict[str, Any]:
        """Send one prompt; when each token came, counted from now, and how many prompt tokens were cached."""
        from vllm.sampling_params import RequestOutputKind

        params = self._sampling(
            temperature=0,
            max_tokens=output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._serial += 1
        start = time.perf_counter()
        times: list[float] = []
        ids: list[int] = []
        cached = 0
        prompt: Any = {"prompt_token_ids": list(tokens)}
        async for part in self.llm.generate(prompt, params, f"r{self._serial}"):
            now = time.perf_counter()
            new = list(part.outputs[0].token_ids)
            times += [now] * len(new)
            ids += new
            cached = max(cached, part.num_cached_tokens or 0)
        return {"ttft": times[0] - start, "times": times, "ids": ids, "cached": cached}

    async def wake_up(self) -> None:
        """Clocks fall while nothing runs."""
        for _ in range(3):
            await self.ask([1, 2, 3], 4)

    async def empty_device(self) -> None:
        for _ in range(100):
            if await self.llm.reset_prefix_cache():
                return
            await asyncio.sleep(0.05)
        raise RuntimeError("the device cache could not be emptied")

    async def memory_is_pinned(self) -> None:
        """KVBM pins its memory in the background."""
        await asyncio.sleep(0.35 * self.host_gb)

    async def ask_cold_and_again(self, prompt: Sequence[int], output: int = 1) -> tuple[Any, Any]:
        """A prompt that nothing knows, then found on the device, which is emptied; output: tokens then."""
        await self.wake_up()
        cold = await self.ask(prompt)
        await asyncio.sleep(0.3)  # offloads are over
        await self.wake_up()
        device = await self.ask(prompt, output)
        await self.empty_device()
        expect_cached(cold, 0, 0)
        expect_cached(device, len(prompt) - 16, len(prompt))
        return cold, device

    async def ask_host(self, prompt: Sequence[int], output: int = 1) -> Any:
        """The same prompt, of which only the host tier is left; the device is emptied again."""
        await self.wake_up()
        host = await self.ask(prompt, output)
        await asyncio.sleep(0.2)
        await self.empty_device()
        expect_cached(host, len(prompt) - 32, len(prompt))
        return host


def has_host_tier(name: str) -> bool:
    return name not in ("none", "null", "no-copies")


def random_prompt(rng: np.random.Generator, tokens: int) -> list[int]:
    return rng.integers(0, 128000, tokens).tolist()


async def first_tokens(engine: Engine, name: str, repeats: int) -> dict[str, Any]:
    """TTFT by prompt size and by where the prompt is found, in ms."""
    rng = np.random.default_rng(1)
    result: dict[str, Any] = {}
    for size, tokens in SIZES.items():
        rows: dict[str, list[float]] = {"cold": [], "device": [], "host": []}
        equal = 0
        for _ in range(repeats):
            prompt = random_prompt(rng, tokens)
            cold, device = await engine.ask_cold_and_again(prompt, 8)
            rows["cold"].append(cold["ttft"])
            rows["device"].append(device["ttft"])
            if has_host_tier(name):
                host = await engine.ask_host(prompt, 8)
                rows["host"].append(host["ttft"])
                equal += host["ids"] == device["ids"]
        result[size] = {
            where: {
                "median": 1e3 * statistics.median(times),
                "least": 1e3 * min(times),
                "all": [round(1e3 * value, 2) for value in times],
            }
            for where, times in rows.items()
            if times
        }
        result[size]["host output equals device output"] = f"{equal} of {len(rows['host'])}"
        print(
            size,
            {
                k: {m: round(x, 1) for m, x in v.items() if m != "all"}
                for k, v in result[size].items()
                if k in rows
            },
            result[size]["host output equals device output"],
            flush=True,
        )
    tiny = [(await engine.ask(random_prompt(rng, 15)))["ttft"] for _ in range(10)]
    result["15 tokens"] = 1e3 * statistics.median(tiny)
    return result


def expect_cached(answer: dict[str, Any], least: int, most: int) -> None:
    if not least <= answer["cached"] <= most:
        raise RuntimeError(f"{answer['cached']} tokens were cached, expected {least} to {most}")


async def decoding(engine: Engine, name: str) -> dict[str, Any]:
    """Inter-token latency in ms of 16 requests that decode while 16k-token prompts arrive."""
    prompts = await stored_prompts(engine, 8)
    result: dict[str, Any] = {}
    for case in decode_cases(name):
        result[case] = await decode_beside(engine, prompts, case)
        print(
            case,
            {k: round(v, 2) if isinstance(v, float) else v for k, v in result[case].items()},
            flush=True,
        )
    return result


def decode_cases(name: str) -> list[str]:
    return ["alone", "device hits", *(["host hits"] if has_host_tier(name) else [])]


async def stored_prompts(engine: Engine, count: int) -> list[list[int]]:
    rng = np.random.default_rng(2)
    prompts = [random_prompt(rng, SIZES["16k"]) for _ in range(count)]
    for prompt in prompts:
        await engine.ask(prompt)
        await asyncio.sleep(0.3)
    return prompts


async def decode_beside(engine: Engine, prompts: Sequence[Sequence[int]], case: str) -> dict[str, Any]:
    """The same in one case: each of the prompts arrives once, or the first as often, from the device."""
    rng = np.random.default_rng()  # nothing knows what is decoded: it is stored anew
    await engine.empty_device()
    if case == "device hits":
        await engine.ask(prompts[0])
    lasts_s = DECODE_BEFORE_S + ARRIVE_EVERY_S * len(prompts)
    decoders = start_decoding(engine, rng, lasts_s)
    await asyncio.sleep(DECODE_BEFORE_S)
    begin = time.perf_counter()
    ttft = []
    for i, prompt in enumerate(prompts):
        if case != "alone":
            answer = await engine.ask(prompts[0] if case == "device hits" else prompt)
            expect_cached(answer, SIZES["16k"] - 32, SIZES["16k"])
            ttft.append(answer["ttft"])
        await asyncio.sleep(max(0.0, begin + ARRIVE_EVERY_S * (i + 1) - time.perf_counter()))
    end = time.perf_counter()
    answers = await asyncio.gather(*decoders)
    if min(answer["times"][-1] for answer in answers) < end:
        raise RuntimeError("the requests that decode were over before all prompts had arrived")
    gaps = gaps_between(answers, begin, end)
    result = {
        "mean": 1e3 * float(gaps.mean()),
        "median": 1e3 * float(np.median(gaps)),
        "p99": 1e3 * float(np.percentile(gaps, 99)),
        "ttft": [round(1e3 * value, 1) for value in ttft],
        "seconds": end - begin,
    }
    if engine.step_times is not None:
        result["steps"] = where_steps_go(
            engine.step_times, begin - DECODE_BEFORE_S / 2, begin, end, len(decoders)
        )
    return result


def start_decoding(
    engine: Engine, rng: np.random.Generator, lasts_s: float
) -> list[asyncio.Task[dict[str, Any]]]:
    """16 requests that decode for so long, at least."""
    most = int(lasts_s / 0.004)  # no GPU makes these steps in 4 ms: they outlast the arrivals
    return [asyncio.create_task(engine.ask(random_prompt(rng, 256), most)) for _ in range(16)]


def gaps_between(answers: Sequence[dict[str, Any]], begin: float, end: float) -> np.ndarray:
    """Seconds between the tokens of each answer, of those that came between two times."""
    return np.concatenate([np.diff([t for t in answer["times"] if begin <= t <= end]) for answer in answers])


def where_steps_go(file: Path, first: float, begin: float, end: float, tokens: int) -> dict[str, Any]:
    """Medians in ms of steps that only decode, before and after `begin`, and each longer one of all after it.

    By the monotonic clock, which all processes of a machine share.
    """
    turns = np.fromfile(file).reshape(-1, len(STEP_COLUMNS))
    columns = dict(zip(STEP_COLUMNS, turns.T, strict=True))
    ended = columns["end"]
    parts: dict[str, Any] = {part: columns[part] for part in STEP_PARTS}
    parts["wait"] = columns["turn"] - np.sum([parts[part] for part in STEP_PARTS if part != "hooks"], axis=0)
    parts["period"] = np.diff(ended, prepend=ended[0])
    decodes = columns["tokens"] == tokens
    result: dict[str, Any] = {}
    for when, since, until in (("before", first, begin), ("after", begin, end)):
        chosen = decodes & (since < ended) & (ended < until)
        result[when] = {part: round(1e3 * float(np.median(took[chosen])), 3) for part, took in parts.items()}
    usual = result["after"]["period"] / 1e3
    result["longer"] = [
        {
            "at": round(1e3 * (float(ended[i]) - begin), 1),
            "tokens": int(columns["tokens"][i]),
            **{part: round(1e3 * float(took[i]), 2) for part, took in parts.items()},
        }
        for i in np.flatnonzero((begin < ended) & (ended < end) & (parts["period"] > 1.25 * usual))
    ]
    return result


async def batch(engine: Engine, name: str) -> dict[str, float]:
    """Seconds for 32 prompts of 2k tokens with 64 output tokens."""
    rng = np.random.default_rng(3)
    result: dict[str, float] = {}
    for repeat in range(3):
        prompts = [random_prompt(rng, 2048) for _ in range(32)]
        for where in ("cold", "device", "host"):
            if where == "host":
                await engine.empty_device()
                if not has_host_tier(name):
                    continue
            start = time.perf_counter()
            answers = await asyncio.gather(*(engine.ask(prompt, 64) for prompt in prompts))
            took = time.perf_counter() - start
            for answer in answers:
                expect_cached(answer, 0 if where == "cold" else 2048 - 32, 2048 if where != "cold" else 0)
            result[where] = min(result.get(where, 1e9), took) if repeat else took
            await asyncio.sleep(0.5)
    print({key: round(value, 3) for key, value in result.items()}, flush=True)
    return result


async def from_disk(engine: Engine, name: str) -> dict[str, Any]:
    """TTFT in ms of prompts of 16k tokens of which the host tier has lost all but the last two."""
    rng = np.random.default_rng(5)
    prompts = [random_prompt(rng, SIZES["16k"]) for _ in range(6)]
    rows: dict[str, list[float]] = {"cold": [], "again": []}
    cached = []
    for prompt in prompts:
        await engine.wake_up()
        rows["cold"].append(1e3 * (await engine.ask(prompt))["ttft"])
        for _ in range(20):  # 2 GiB are on disk then; an idle engine makes no steps, and hears of nothing
            await asyncio.sleep(0.15)
            await engine.wake_up()
    for prompt in prompts[:4]:
        await engine.empty_device()
        await engine.wake_up()
        answer = await engine.ask(prompt)
        rows["again"].append(1e3 * answer["ttft"])
        cached.append(answer["cached"])
        await asyncio.sleep(0.5)
    result: dict[str, Any] = {
        where: {"median": statistics.median(times), "all": times} for where, times in rows.items()
    }
    result["tokens from KVBM"] = cached
    print(
        name, {k: v if isinstance(v, list) else round(v["median"], 1) for k, v in result.items()}, flush=True
    )
    return result


async def warm_up(engine: Engine) -> None:
    rng = np.random.default_rng(4)
    for tokens in (512, 16384, 32768):
        await engine.ask(random_prompt(rng, tokens), 4)
    await engine.memory_is_pinned()
    await engine.empty_device()


async def measure(name: str, mode: str, host_gb: float, repeats: int, parts: Sequence[str]) -> dict[str, Any]:
    engine = Engine(name, mode, host_gb)
    result: dict[str, Any] = {"start s": engine.start_s}
    print(f"{name} {mode}: started in {engine.start_s:.1f} s", flush=True)
    if list(parts) != ["start"]:
        await warm_up(engine)
    if "disk" in parts:
        result["disk ms"] = await from_disk(engine, name)
    if "ttft" in parts:
        result["ttft ms"] = await first_tokens(engine, name, repeats)
    if "decode" in parts:
        result["inter-token ms"] = await decoding(engine, name)
    if "batch" in parts:
        result["batch s"] = await batch(engine, name)
    engine.llm.shutdown()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=["none", "kvbm", "native"], choices=list(CONNECTORS))
    parser.add_argument("--modes", nargs="+", default=["eager", "graphs"], choices=["eager", "graphs"])
    parser.add_argument("--host-gb", type=float, default=40.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=PARTS[:3], choices=PARTS, metavar="PART")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--one", action="store_true", help="measure here, not in a process for each engine")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.json and Path(arguments.json).exists():
        results = json.loads(Path(arguments.json).read_text())
    if arguments.one:
        name, mode = arguments.engines[0], arguments.modes[0]
        results[f"{name} {mode} {arguments.host_gb:.0f} GB"] = asyncio.run(
            measure(name, mode, arguments.host_gb, arguments.repeats, arguments.only)
        )
        Path(arguments.json).write_text(json.dumps(results, indent=1))
        os._exit(0)  # vLLM's own threads may linger
    file = arguments.json or tempfile.mktemp(suffix=".json")
    for mode in arguments.modes:
        for name in arguments.engines:
            command = [sys.executable, __file__, "--one", "--engines", name, "--modes", mode, "--json", file]
            command += ["--host-gb", str(arguments.host_gb), "--repeats", str(arguments.repeats)]
            subprocess.run([*command, "--only", *arguments.only], check=False)
    print(Path(file).read_text() if not arguments.json else f"figures in {file}")


if __name__ == "__main__":
    main()
