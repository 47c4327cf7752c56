"""Which vLLM requests are cached, and under which identity."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.vllm_integration.identity import RequestIdentity, identify


def make_request(**options: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    given = {
        "request_id": "r",
        "prompt_token_ids": list(range(100)),
        "sampling_params": SamplingParams(max_tokens=4),
        "pooling_params": None,
    }
    return Request(**{**given, **options})


def feature(identifier: str | None, offset: int = 5, length: int = 40) -> Any:
    return SimpleNamespace(
        identifier=identifier,
        mm_position=SimpleNamespace(offset=offset, length=length),
        modality="image",
        data=None,
    )


def lora(**options: Any) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(**{"lora_name": "a", "lora_int_id": 1, "lora_path": "/a", **options})


def test_plain_request() -> None:
    assert identify(make_request()) == RequestIdentity(None, None, ())
    assert identify(make_request(cache_salt="s")) == RequestIdentity("s", None, ())


def test_prompt_embeddings_are_refused() -> None:
    import torch

    request = make_request(prompt_token_ids=None, prompt_embeds=torch.zeros(10, 8))
    assert request.all_token_ids[:] == [0] * 10  # all such prompts have the same tokens
    assert identify(request) == "prompt embeddings"


def test_prompts_that_mix_tokens_and_embeddings_are_refused() -> None:
    request = make_request()
    request.prompt_is_token_ids = [True] * 50 + [False] * 50
    assert identify(request) == "prompt embeddings"


def test_pooling_is_refused() -> None:
    from vllm import PoolingParams

    request = make_request(sampling_params=None, pooling_params=PoolingParams(task="embed"))
    assert identify(request) == "pooling request"


def test_streaming_input_is_refused() -> None:
    assert identify(make_request(resumable=True)) == "streaming input"


@pytest.mark.feature("Images without an identifier", refused="multimodal item without identifier")
@pytest.mark.parametrize("identifier", [None, ""])
def test_multimodal_item_without_identifier_is_refused(identifier: str | None) -> None:
    request = make_request(mm_features=[feature("known"), feature(identifier, 60)])
    assert identify(request) == "multimodal item without identifier"


def test_multimodal_items_are_part_of_the_identity() -> None:
    one, two, moved = (
        identify(make_request(mm_features=[feature(name, offset)]))
        for name, offset in (("x", 5), ("y", 5), ("x", 6))
    )
    assert all(isinstance(identity, RequestIdentity) for identity in (one, two, moved))
    keys = [
        identity.extra_keys(32) for identity in (one, two, moved) if isinstance(identity, RequestIdentity)
    ]
    assert [sorted(key) for key in keys] == [[0, 1]] * 3
    assert len({key[0] for key in keys}) == len({key[1] for key in keys}) == 3


def test_lora_is_part_of_the_identity() -> None:
    identities = [
        identify(make_request(lora_request=request))
        for request in (None, lora(), lora(lora_path="/b"), lora(lora_name="b"), lora(lora_int_id=2))
    ]
    assert all(isinstance(identity, RequestIdentity) for identity in identities)
    assert len({identity.adapter for identity in identities if isinstance(identity, RequestIdentity)}) == 5


@pytest.mark.feature("LoRA adapters replaced in place", refused="LoRA adapter replaced in place")
def test_lora_replaced_in_place_is_refused() -> None:
    assert identify(make_request(lora_request=lora(load_inplace=True))) == "LoRA adapter replaced in place"
