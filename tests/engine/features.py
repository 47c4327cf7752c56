"""Requests of all kinds, executed in an engine's process, and engines one after the other."""

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.engine.harness import make_engine
from tests.engine.scenarios import Ran, drain, observe, reset, worker_side

_ENGINE: list[Any] = []


@dataclass(frozen=True)
class Query:
    """One request: what tokens and greedy sampling do not say."""

    prompt: tuple[int, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)  # of SamplingParams
    more: dict[str, Any] = field(default_factory=dict)  # of vLLM's prompt
    images: tuple[np.ndarray, ...] = ()
    embeddings: np.ndarray | None = None
    adapter: tuple[str, int, str] | None = None  # name, number, folder

    def vllm_prompt(self) -> dict[str, Any]:
        if self.embeddings is not None:
            import torch

            return {"prompt_embeds": torch.from_numpy(self.embeddings), **self.more}
        prompt = {"prompt_token_ids": list(self.prompt), **self.more}
        if self.images:
            from PIL import Image

            prompt["multi_modal_data"] = {"image": [Image.fromarray(image) for image in self.images]}
        return prompt

    def vllm_sampling(self) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        given = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, **self.sampling}
        if "structured_outputs" in given:
            given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
        return SamplingParams(**given)

    def vllm_adapter(self) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(*self.adapter) if self.adapter else None


# ---- one engine after another


def start(_: Any, model: str, options: dict[str, Any]) -> None:
    """Start an engine in this process. seed_weights: of load_format="dummy"."""
    options = dict(options)
    seed = options.pop("seed_weights", None)
    from vllm.config import VllmConfig
    from vllm.platforms import current_platform

    if seed is not None:
        _seed_weights(seed)
    batches = vars(VllmConfig)["max_concurrent_batches"]
    try:
        _ENGINE.append(make_engine(model, options))
    finally:
        # An engine with the asynchronous scheduler has changed it; the engine itself has read it.
        VllmConfig.max_concurrent_batches = batches  # type: ignore[method-assign]
    # vLLM replaces its kernels at each start, and stumbles over modules that ngram has imported meanwhile.
    current_platform.register_triton_kernel_overrides = lambda: None


def stop(_: Any) -> None:
    if _ENGINE:
        _ENGINE.pop().llm_engine.engine_core.shutdown()
    gc.collect()


def use(_: Any, function: Callable[..., Any], *args: Any) -> Any:
    return function(_ENGINE[-1], *args)


_GAINS = {"qkv_proj": 1.6, "o_proj": 4.0, "embed": 4.0}


def _seed_weights(seed: int) -> None:
    """vLLM's dummy weights are so small that answers hardly depend on prompts. These make an answer depend on
    every block and every image before it."""
    import torch
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
                values = torch.randn(parameter.shape, generator=generator) * gain
                parameter.data.copy_(values / parameter[0].numel() ** 0.5)
            else:
                parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)

    DummyModelLoader.load_weights = load_weights


# ---- requests


def run(llm: Any, queries: Sequence[Query]) -> Ran:
    """Generate; all samples of a request count as its answer."""
    before = observe(llm)
    outputs = llm.generate(
        [query.vllm_prompt() for query in queries],
        [query.vllm_sampling() for query in queries],
        lora_request=[query.vllm_adapter() for query in queries],
        use_tqdm=False,
    )
    drain(llm)
    return Ran(
        [[token for sample in output.outputs for token in sample.token_ids] for output in outputs],
        [output.num_cached_tokens or 0 for output in outputs],
        before,
        observe(llm),
    )


def again(llm: Any, function: Callable[..., Ran], *args: Any) -> Ran:
    """With an empty device cache."""
    drain(llm)
    if not reset(llm):
        raise RuntimeError("the device cache could not be reset")
    return function(llm, *args)


def beam_search(llm: Any, prompt: tuple[int, ...]) -> Ran:
    from vllm.sampling_params import BeamSearchParams

    before = observe(llm)
    found = llm.beam_search(
        [{"prompt_token_ids": list(prompt)}], BeamSearchParams(beam_width=3, max_tokens=40, ignore_eos=True)
    )
    drain(llm)
    beams = [list(beam.tokens) for output in found for beam in output.sequences]
    return Ran(beams, [], before, observe(llm))


def prompt_logprobs(llm: Any, prompt: tuple[int, ...]) -> tuple[Ran, list[float]]:
    query = Query(prompt, {"prompt_logprobs": 0})
    before = observe(llm)
    output = llm.generate([query.vllm_prompt()], query.vllm_sampling(), use_tqdm=False)[0]
    drain(llm)
    values = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry]
    return Ran(
        [list(output.outputs[0].token_ids)], [output.num_cached_tokens or 0], before, observe(llm)
    ), values


def embed(llm: Any, prompts: Sequence[tuple[int, ...]]) -> tuple[list[list[float]], Any]:
    outputs = llm.embed([{"prompt_token_ids": list(prompt)} for prompt in prompts], use_tqdm=False)
    drain(llm)
    return [output.outputs.embedding for output in outputs], observe(llm)


def stream_input(llm: Any, pieces: Sequence[tuple[int, ...]], max_tokens: int) -> Ran:
    """One session whose prompt arrives in pieces, each of which is answered; as vLLM's AsyncLLM does it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    before = observe(llm)
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    said: list[int] = []

    def send(tokens: Sequence[int], resumable: bool) -> None:
        request = engine.input_processor.process_inputs(
            "session",
            {"prompt_token_ids": list(tokens)},
            params,
            supported_tasks=("generate",),
            resumable=resumable,
        )
        request.external_req_id = "session"
        engine.output_processor.add_request(request, None, None, 0)
        # Both change the request's lists when the next piece arrives.
        engine.engine_core.add_request(copy.deepcopy(request))

    def answer() -> None:
        wanted = len(said) + max_tokens
        for _ in range(500):
            for output in engine.step():
                said.extend(output.outputs[0].token_ids)
            if len(said) >= wanted:
                return
        raise TimeoutError(f"the session does not answer: {said}")

    for piece in pieces:
        send(piece, True)
        answer()
    send([0], False)
    for _ in range(3):
        engine.step()
    drain(llm)
    return Ran([said], [], before, observe(llm))


# ---- speculation


def speculation(llm: Any) -> tuple[int, int]:
    """Tokens proposed and accepted since the engine's start."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return int(values["vllm:spec_decode_num_draft_tokens"]), int(
        values["vllm:spec_decode_num_accepted_tokens"]
    )


def kv_scales(llm: Any) -> list[float]:
    """Of each layer's keys and values."""
    layers = worker_side(llm)._vllm_config.compilation_config.static_forward_context.values()
    return [float(scale) for layer in layers for scale in (layer._k_scale, layer._v_scale)]


# ---- an engine that is not as it says


def hand_over_other_types() -> None:
    """Give the connector views of another type of the first KV tensor; the number of bytes is the same."""
    import torch

    from kvbm.vllm_integration.connector import KvbmConnector

    register = KvbmConnector.register_kv_caches

    def registered(self: Any, kv_caches: dict[str, Any]) -> None:
        KvbmConnector.register_kv_caches = register
        first = next(iter(kv_caches))
        register(self, {**kv_caches, first: kv_caches[first].view(torch.int32)})

    KvbmConnector.register_kv_caches = registered
