"""What differs between vLLM's versions, with stand-ins for the objects of those that don't run here."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvbm.transfer.layout import recognise, tensor_view
from kvbm.vllm_integration import compat

BLOCKS, LAYERS, TOKENS, HEADS, CONTENT = 6, 3, 4, 2, 10


# ---- which forward passes call the connector at each layer


def context(metadata: Any, mode: str | None) -> SimpleNamespace:
    """vLLM's ForwardContext, as far as it matters."""
    if mode is None:
        return SimpleNamespace(attn_metadata=metadata)
    return SimpleNamespace(attn_metadata=metadata, cudagraph_runtime_mode=SimpleNamespace(name=mode))


@pytest.mark.parametrize(
    ("metadata", "mode", "calls"),
    [
        (None, "NONE", False),  # no forward pass, or Model Runner V2 with a full graph
        (None, "FULL", False),
        (None, "PIECEWISE", False),
        ({}, "NONE", False),
        ({"layer": object()}, "FULL", False),
        ({"layer": object()}, "PIECEWISE", True),
        ({"layer": object()}, "NONE", True),
        ({"layer": object()}, None, True),
        ([{"layer": object()}], "NONE", False),  # two halves of a batch, each on a stream of its own
    ],
)
def test_calls_layer_hooks(metadata: Any, mode: str | None, calls: bool) -> None:
    assert compat.calls_layer_hooks(context(metadata, mode)) is calls


def test_an_unknown_context_is_loaded_as_a_whole() -> None:
    assert compat.calls_layer_hooks(None) is False
    assert compat.calls_layer_hooks(SimpleNamespace()) is False


def test_calls_layer_hooks_with_the_context_of_this_vllm() -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import ForwardContext

    def real(metadata: Any, mode: CUDAGraphMode) -> Any:
        return ForwardContext(
            no_compile_layers={}, attn_metadata=metadata, slot_mapping={}, cudagraph_runtime_mode=mode
        )

    layers = {"layer": object()}
    modes = (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL)
    assert [compat.calls_layer_hooks(real(layers, mode)) for mode in modes] == [True, True, False]
    assert not compat.calls_layer_hooks(real(None, CUDAGraphMode.NONE))


# ---- layouts that we ask for


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Pretends to be on CUDA."""
    import vllm.platforms

    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    fake = SimpleNamespace(is_cuda=lambda: True)
    monkeypatch.setattr(vllm.platforms, "_current_platform", fake, raising=False)
    monkeypatch.setitem(vars(vllm.platforms), "current_platform", fake)
    return fake


@pytest.mark.parametrize(
    ("version", "layout"),
    [
        ("0.26.0", None),
        ("0.28.1", None),
        ("0.29.0", "BLHNC"),
        ("0.30.1.dev5+gabc", "BLHNC"),
        ("0.33.0", "BLHNC"),
        ("1.0", "BLHNC"),
        ("unknown", None),
    ],
)
def test_wanted_layout(
    platform: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, version: str, layout: str | None
) -> None:
    assert compat.wanted_layout(version) == layout
    # vLLM: "an explicit VLLM_KV_CACHE_LAYOUT" is the user's word.
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBNHC")
    assert compat.wanted_layout(version) is None
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "")
    assert compat.wanted_layout(version) == layout


@pytest.mark.parametrize("version", ["0.26.0", "0.28.0", "0.29.0", "0.33.0"])
def test_no_layout_is_wanted_on_cpus(platform: SimpleNamespace, version: str) -> None:
    platform.is_cuda = lambda: False
    assert compat.wanted_layout(version) is None


def test_the_wanted_layout_has_a_name_in_this_vllm() -> None:
    from vllm.v1.kv_cache_layout import KVCacheLayout

    layout = KVCacheLayout["BLHNC"]
    assert layout.value[:2] == (1, 0)  # blocks, layers: a block is one stretch


# ---- vLLM 0.26 to 0.28: one tensor for all layers


class FakeBackend:
    """An attention backend's order of the dimensions (layers, blocks, heads, tokens, content) in memory."""

    order: tuple[int, ...]

    @classmethod
    def get_kv_cache_stride_order(cls, include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        assert include_num_layers_dimension
        return cls.order


def cross_layer_cache(order: tuple[int, ...]) -> tuple[torch.Tensor, Any, dict[str, torch.Tensor]]:
    """As vLLM's allocate_uniform_kv_caches makes them: tensor, backend, and its own view of each layer."""
    logical = (LAYERS, BLOCKS, HEADS, TOKENS, CONTENT)
    shape = tuple(logical[dimension] for dimension in order)
    count = LAYERS * BLOCKS * HEADS * TOKENS * CONTENT
    tensor = torch.arange(count, dtype=torch.int32).reshape(shape)
    permuted = tensor.permute(*(order.index(dimension) for dimension in range(len(order))))
    backend = type("Backend", (FakeBackend,), {"order": order})
    return tensor, backend, {f"layer{i}": permuted[i] for i in range(LAYERS)}


def cache_config(*shared_by: list[str]) -> SimpleNamespace:
    names = shared_by or [[f"layer{i}"] for i in range(LAYERS)]
    return SimpleNamespace(kv_cache_tensors=[SimpleNamespace(shared_by=each) for each in names])


# FlashAttention's orders with tokens before heads (NHD) and heads before tokens (HND), and layers outermost.
ORDERS = [(1, 0, 3, 2, 4), (1, 2, 0, 3, 4), (1, 0, 2, 3, 4), (0, 1, 2, 3, 4)]


@pytest.mark.parametrize("order", ORDERS)
def test_layers_of(order: tuple[int, ...]) -> None:
    tensor, backend, theirs = cross_layer_cache(order)
    ours = compat.layers_of(tensor, backend, cache_config())
    assert list(ours) == list(theirs)
    for name, layer in ours.items():
        assert layer.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        for block in range(BLOCKS):
            # The order within a block is the kernel's business, what belongs to it is ours.
            assert layer[block].flatten().sort().values.equal(theirs[name][block].flatten().sort().values)
    seen = torch.cat([layer.flatten() for layer in ours.values()])
    assert seen.sort().values.equal(tensor.flatten())


def test_layers_of_names_all_that_share_a_tensor() -> None:
    tensor, backend, theirs = cross_layer_cache(ORDERS[0])
    ours = compat.layers_of(tensor, backend, cache_config(["a", "b"], ["c"], ["d"]))
    assert list(ours) == ["a", "b", "c", "d"]
    assert ours["a"].equal(ours["b"])
    assert ours["d"].sum() == theirs["layer2"].sum()


@pytest.mark.parametrize("order", ORDERS[:3])
def test_the_layout_of_layers_in_one_tensor_is_recognised(order: tuple[int, ...]) -> None:
    """The pieces of a block of a layer hold what vLLM's view of that block holds, and nothing else."""
    tensor, backend, theirs = cross_layer_cache(order)
    ours = compat.layers_of(tensor, backend, cache_config())
    record_bytes = LAYERS * HEADS * TOKENS * CONTENT * tensor.element_size()
    layout = recognise((tensor_view(*item) for item in ours.items()), BLOCKS, record_bytes)

    pieces = [
        (run.address + piece * run.piece_stride, run.block_stride, run.piece_bytes)
        for run in layout.runs
        for piece in range(run.pieces)
    ]
    memory = tensor.flatten()
    for (name, (first, last)), block in itertools.product(layout.layers.items(), range(BLOCKS)):
        found = []
        for address, stride, size in pieces[first:last]:
            start = (address + block * stride - tensor.data_ptr()) // tensor.element_size()
            found.append(memory[start : start + size // tensor.element_size()])
        assert torch.cat(found).sort().values.equal(theirs[name][block].flatten().sort().values)
