"""What identifies a vLLM request and engine. No vLLM is needed: the objects are told by their attributes."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvbm.config import load_config
from kvbm.errors import CapacityError, LayoutError
from kvbm.logic.groups import FULL, KvGroup, KvGroups
from kvbm.vllm_integration import compat
from kvbm.vllm_integration.identity import Geometry, check_tensors, geometry, identify
from kvbm.vllm_integration.scheduler import disk_slots_of, slots_of


def request(**changes: Any) -> SimpleNamespace:
    plain = {
        "pooling_params": None, "prompt_embeds": None, "prompt_is_token_ids": None, "resumable": False,
        "mm_features": [], "lora_request": None, "cache_salt": None,
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **changes})


def image(identifier: str | None, offset: int, length: int) -> SimpleNamespace:
    return SimpleNamespace(identifier=identifier, mm_position=SimpleNamespace(offset=offset, length=length))


def lora(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"lora_name": "a", "lora_int_id": 1, "lora_path": "/a", **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pooling_params": object()}, "pooling"),
        ({"prompt_embeds": object()}, "embeddings"),
        ({"prompt_is_token_ids": [True]}, "embeddings"),
        ({"resumable": True}, "streaming"),
        ({"mm_features": [image(None, 0, 4)]}, "identifier"),
        ({"lora_request": lora(load_inplace=True)}, "in place"),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], reason: str):
    result = identify(request(**changes))
    assert isinstance(result, str)
    assert reason in result


def test_adapters_differ_by_name_and_path():
    identities = [
        identify(request(lora_request=adapter))
        for adapter in (None, lora(), lora(lora_name="b"), lora(lora_path="/b"), lora(lora_int_id=2))
    ]
    assert len({identity.adapter for identity in identities if not isinstance(identity, str)}) == 5


def test_images_enter_the_blocks_they_touch():
    identity = identify(request(mm_features=[image("cat", 10, 20), image("dog", 30, 2)]))
    assert not isinstance(identity, str)
    keys = identity.extra_keys(16)
    assert sorted(keys) == [0, 1]
    other = identify(request(mm_features=[image("cow", 10, 20), image("dog", 30, 2)]))
    assert not isinstance(other, str)
    assert all(keys[block] != other.extra_keys(16)[block] for block in keys)
    # Where an image starts matters: the same tokens of it lie elsewhere.
    moved = identify(request(mm_features=[image("cat", 11, 20), image("dog", 31, 2)]))
    assert not isinstance(moved, str)
    assert moved.extra_keys(16)[0] != keys[0]


class FullAttentionSpec:
    block_size = 16
    page_size_bytes = 1000
    sliding_window: int | None = None


class SlidingWindowSpec(FullAttentionSpec):
    sliding_window = 40


class MambaSpec(FullAttentionSpec):
    mamba_cache_mode = "align"
    num_speculative_blocks = 0
    real_page_size_bytes = 900


class SmallBlocks(FullAttentionSpec):
    block_size = 8


SmallBlocks.__name__ = "FullAttentionSpec"


class MLAAttentionSpec(FullAttentionSpec):
    pass


class ChunkedLocalAttentionSpec(FullAttentionSpec):
    pass


def kv_group(spec: type, layers: int = 3, **changes: Any) -> Any:
    kv_cache_spec = spec()
    group = SimpleNamespace(kv_cache_spec=kv_cache_spec, layer_names=list("abcdef"[:layers]))
    for name, value in changes.items():
        setattr(group if name == "enable_kv_transfer" else kv_cache_spec, name, value)
    return group


def engine(*groups: Any, **parallel: Any) -> tuple[Any, Any]:
    sizes = {"pipeline_parallel_size": 1, "world_size": 2, **parallel}
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes),
        model_config=SimpleNamespace(enable_sleep_mode=False),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
    )
    found = list(groups) or [kv_group(FullAttentionSpec)]
    return config, SimpleNamespace(kv_cache_groups=found, num_blocks=7)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM that can do all that we know of."""
    monkeypatch.setattr(compat, "takes_back_requests", lambda: True)
    monkeypatch.setattr(compat, "offers_states", lambda: True)


def test_geometry():
    assert geometry(*engine()) == Geometry(block_size=16, record_bytes=3000, num_device_blocks=7, ranks=2)


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize(
    ("window", "extra", "blocks"), [(1, 0, 1), (2, 0, 1), (17, 0, 1), (18, 0, 2), (40, 0, 3), (40, 10, 4)]
)
def test_a_window_needs_the_blocks_that_the_next_token_sees(window: int, extra: int, blocks: int):
    sliding = kv_group(SlidingWindowSpec, sliding_window=window, extra_retained_tokens=extra)
    shape = geometry(*engine(sliding, kv_group(FullAttentionSpec)))
    assert isinstance(shape, Geometry)
    assert shape.groups == KvGroups((KvGroup(blocks, window - 1 + extra), FULL))


@pytest.mark.usefixtures("newest")
def test_states_and_attention_share_the_memory_of_a_block():
    shape = geometry(*engine(kv_group(MambaSpec, layers=4), kv_group(FullAttentionSpec, layers=2)))
    assert isinstance(shape, Geometry)
    assert shape.groups == KvGroups((KvGroup(window=1, offered=True), FULL))
    # The first two places are as large as attention wants them, the others hold states only.
    assert shape.record_bytes == 2 * 1000 + 2 * 900


@pytest.mark.usefixtures("newest")
def test_states_of_every_block():
    shape = geometry(*engine(kv_group(MambaSpec, mamba_cache_mode="all")))
    assert isinstance(shape, Geometry)
    assert shape.groups == KvGroups((KvGroup(window=1, reach=1),))


HYBRID = kv_group(SlidingWindowSpec), kv_group(FullAttentionSpec)


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (engine(kv_group(ChunkedLocalAttentionSpec)), "ChunkedLocalAttentionSpec"),
        (engine(kv_group(SmallBlocks), kv_group(FullAttentionSpec)), "different sizes"),
        (engine(kv_group(FullAttentionSpec, enable_kv_transfer=False)), "let connectors move"),
        (engine(kv_group(MambaSpec, mamba_cache_mode="none")), "mamba_cache_mode=none"),
        (engine(kv_group(MambaSpec, num_speculative_blocks=1)), "speculative"),
        (engine(pipeline_parallel_size=2, distributed_executor_backend="ray"), "executor mp only"),
        (engine(*HYBRID, pipeline_parallel_size=2, distributed_executor_backend="mp"), "several groups"),
        pytest.param(
            engine(decode_context_parallel_size=2),
            "context",
            marks=pytest.mark.feature("Context parallel", refused="context parallelism is not supported yet"),
        ),
    ],
)
def test_engines_that_are_not_cached(parts: tuple[Any, Any], reason: str):
    result = geometry(*parts)
    assert isinstance(result, str)
    assert reason in result


def test_vllm_that_is_too_old_for_hybrid_models(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "takes_back_requests", lambda: False)
    assert "0.30" in str(geometry(*engine(*HYBRID)))
    monkeypatch.setattr(compat, "takes_back_requests", lambda: True)
    assert isinstance(geometry(*engine(*HYBRID)), Geometry)


@pytest.mark.usefixtures("newest")
def test_vllm_that_does_not_say_where_states_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "offers_states", lambda: False)
    assert "recurrent states" in str(geometry(*engine(kv_group(MambaSpec), kv_group(FullAttentionSpec))))


def test_a_window_of_which_vllm_keeps_everything_is_full_attention():
    shape = geometry(*engine(kv_group(FullAttentionSpec, sliding_window=128)))
    assert isinstance(shape, Geometry)
    assert shape.groups.single


def pipeline(
    monkeypatch: pytest.MonkeyPatch, layers: list[int], stage: int, own: int, **parallel: Any
) -> Any:
    """The geometry on a rank of a stage with KV caches of `own` layers; vLLM shares out `layers`."""
    monkeypatch.setattr(compat, "pipeline_layers", lambda _: (layers, stage))
    stages = {"pipeline_parallel_size": len(layers), "distributed_executor_backend": "mp", **parallel}
    spec = stages.pop("spec", FullAttentionSpec)
    return geometry(*engine(kv_group(spec, layers=own), **stages))


def test_stages_of_a_pipeline_have_records_of_different_sizes(monkeypatch: pytest.MonkeyPatch):
    """The scheduler and all ranks come to the same number of slots, each from its own layers."""
    shapes = [pipeline(monkeypatch, [3, 5, 2], stage, (3, 5, 2)[stage], world_size=6) for stage in range(3)]
    assert [shape.record_bytes for shape in shapes] == [3000, 5000, 2000]
    # On disk each record has a header of 4 KiB.
    on_disk = load_config(disk__cache_gb=7 * (8192 + 12288 + 8192) * 2 / 1e9, environ={})
    for shape in shapes:
        assert shape.records == [3000, 3000, 5000, 5000, 2000, 2000]
        assert shape.host_bytes(10) == 10 * (4096 + 8192 + 4096) * 2
        assert slots_of(shape, load_config(host__cache_gb=shape.host_bytes(10) / 1e9, environ={})) == 10
        assert disk_slots_of(shape, on_disk) == 7


def test_pipelines_whose_layers_are_not_alike(monkeypatch: pytest.MonkeyPatch):
    """As with a draft model in the last stage, or with layers that have no KV."""
    assert pipeline(monkeypatch, [3, 3], 1, 4) == (
        "stage 1 of the pipeline has KV caches of 4 layers, of 3 in all"
    )


def test_ranks_of_a_pipeline_do_not_share(monkeypatch: pytest.MonkeyPatch):
    """With MLA those of one stage hold the same bytes, but not those of all stages."""
    shape = pipeline(monkeypatch, [3, 3], 0, 3, world_size=4, spec=MLAAttentionSpec)
    assert (shape.shared, shape.records) == (False, [3000] * 4)


@pytest.mark.parametrize(
    ("spec", "parallel", "shared"),
    [
        (MLAAttentionSpec, {"distributed_executor_backend": "mp"}, True),
        (MLAAttentionSpec, {"distributed_executor_backend": "mp", "nnodes": 2}, False),  # no common memory
        (MLAAttentionSpec, {"distributed_executor_backend": "ray"}, False),  # nobody knows
        (MLAAttentionSpec, {"distributed_executor_backend": "mp", "world_size": 1}, False),
        (FullAttentionSpec, {"distributed_executor_backend": "mp"}, False),  # other heads on every rank
    ],
)
def test_one_copy_where_all_ranks_hold_the_same(spec: type, parallel: dict[str, Any], shared: bool):
    shape = geometry(*engine(kv_group(spec), **parallel))
    assert isinstance(shape, Geometry)
    assert shape.shared is shared
    assert shape.host_bytes(1) == 4096 * (1 if shared else shape.ranks)
    mixed = geometry(*engine(kv_group(spec), kv_group(FullAttentionSpec), **parallel))
    assert not isinstance(mixed, Geometry) or not mixed.shared


def test_size_is_shared_by_the_ranks():
    shape = Geometry(block_size=16, record_bytes=4000, num_device_blocks=7, ranks=2)
    assert shape.host_bytes(10) == 10 * 4096 * 2
    config = load_config(host__cache_gb=shape.host_bytes(10) / 1e9, environ={})
    assert slots_of(shape, config) == 10
    assert slots_of(shape, load_config(host__cache_gb=1, host__num_blocks=3, environ={})) == 3


def test_less_than_one_block_is_an_error(monkeypatch: pytest.MonkeyPatch):
    shape = Geometry(block_size=16, record_bytes=4_000_000, num_device_blocks=7, ranks=2)
    with pytest.raises(CapacityError, match="DYN_KVBM_CPU_CACHE_GB"):
        slots_of(shape, load_config({"host.cache_gb": 0.001}, environ={}))


@pytest.mark.parametrize(("prefix_caching", "cache_gb"), [(True, 0), (False, 4), (False, 0)])
def test_images_that_vllm_only_numbers(prefix_caching: bool, cache_gb: float):
    """Without prefix caching and processor cache, the first image of each process has the same identifier."""
    config, kv_cache = engine()
    config.cache_config.enable_prefix_caching = prefix_caching
    assert isinstance(geometry(config, kv_cache), Geometry)  # a model of text
    config.model_config.multimodal_config = SimpleNamespace(mm_processor_cache_gb=cache_gb)
    result = geometry(config, kv_cache)
    assert isinstance(result, Geometry) == (prefix_caching or cache_gb > 0)
    assert isinstance(result, Geometry) or "not identified by contents" in result


@pytest.mark.feature(
    "KV scales of the first requests (before 0.32)", refused="such scales are not part of any identity"
)
def test_scales_of_the_first_requests():
    """vLLM before 0.32 can calculate them: then the same tokens have other bytes after each start."""
    config, kv_cache = engine()
    config.cache_config.calculate_kv_scales = True
    assert "scales" in str(geometry(config, kv_cache))


class Tensor:
    def __init__(self, address: int, dtype: str = "fp8") -> None:
        self.dtype = dtype
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def test_tensors_are_those_that_were_announced():
    config = engine(kv_group(FullAttentionSpec, layers=2, dtype="fp8"), kv_group(MambaSpec, layers=1))[1]
    config.kv_cache_groups[1].layer_names = ["state"]
    tensors = {"a": Tensor(10), "b": Tensor(20), "state": Tensor(10, "int8")}
    check_tensors(config, tensors)
    check_tensors(config, {**tensors, "reads what b wrote": Tensor(20)})
    for wrong, reason in (
        ({**tensors, "c": Tensor(30)}, "tensor c is of no announced layer"),
        ({"a": Tensor(10), "state": Tensor(10)}, "first b"),
        ({**tensors, "a": Tensor(10, "bf16")}, "a is bf16, announced as fp8"),
    ):
        with pytest.raises(LayoutError, match=reason):
            check_tensors(config, wrong)
