"""Where the KV heads lie in a record, for the layouts of vLLM's backends, and which engines share records."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvbm.storage.split import Part, Split
from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CpuCopyEngine
from kvbm.transfer.layout import recognise, tensor_view
from kvbm.vllm_integration import weights
from kvbm.vllm_integration.identity import Geometry
from kvbm.vllm_integration.split import find_split
from kvbm.vllm_integration.weights import HeadSplit, record_namespace

BLOCKS, TOKENS, SIZE = 5, 16, 8


@dataclass(frozen=True)
class Form:
    """A backend's KV tensor. shape: with the heads as "h". order: of its dimensions in memory."""

    shape: tuple[int | str, ...]
    order: tuple[int, ...]
    shape_of: Callable[..., tuple[int, ...]] | None = None  # get_kv_cache_shape, until vLLM 0.28

    def tensor(self, heads: int) -> torch.Tensor:
        sizes = [heads if size == "h" else int(size) for size in self.shape]
        dense = torch.zeros([sizes[dim] for dim in self.order], dtype=torch.int16)
        return dense.permute(*np.argsort(self.order).tolist())


FORMS = {
    "CPU": Form((BLOCKS, "h", TOKENS, 2 * SIZE), (0, 1, 2, 3)),
    "NHD": Form((BLOCKS, "h", TOKENS, 2 * SIZE), (0, 2, 1, 3)),
    "fractions of a block": Form((4 * BLOCKS, "h", TOKENS // 4, 2 * SIZE), (0, 1, 2, 3)),
    "FlashAttention before 0.29": Form(
        (2, BLOCKS, TOKENS, "h", SIZE), (0, 1, 2, 3, 4), lambda n, b, h, s: (2, n, b, h, s)
    ),
    "FlashInfer HND before 0.29": Form(
        (BLOCKS, 2, TOKENS, "h", SIZE), (0, 1, 3, 2, 4), lambda n, b, h, s: (n, 2, b, h, s)
    ),
}


class FullAttentionSpec:
    block_size, head_size, num_head_slots = TOKENS, SIZE, None

    def __init__(self, heads: int) -> None:
        self.num_kv_heads = heads


class MLAAttentionSpec(FullAttentionSpec):
    pass


@dataclass
class Rank:
    """What a rank of an engine has; all of it may be changed."""

    form: Form
    heads: int = 4
    rank: int = 0
    ranks: int = 1
    layers: int = 3
    spec: type = FullAttentionSpec
    speculative: object = None
    tensor_parallel: int | None = None
    scales: Sequence[float] = (1.0,)
    caches: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        each = max(1, self.heads // self.ranks)
        first = self.rank * self.heads // self.ranks
        dim = self.form.shape.index("h")
        for layer in range(self.layers):
            whole = self.form.tensor(self.heads)
            whole[:] = torch.from_numpy(
                np.random.default_rng(layer).integers(-32768, 32767, whole.shape, np.int16)
            )
            tensor = self.form.tensor(each)
            tensor[:] = whole.narrow(dim, first, each)
            self.caches[f"layer{layer}"] = tensor
        self.announced = self.spec(each)

    @property
    def shape(self) -> Geometry:
        size = self.layers * next(iter(self.caches.values())).numel() * 2 // BLOCKS
        return Geometry(TOKENS, size, BLOCKS, self.ranks)

    def own(self) -> tuple[Any, Any, Geometry, dict[str, torch.Tensor]]:
        backend = SimpleNamespace(full_cls_name=lambda: "BACKEND")
        if self.form.shape_of:
            backend.get_kv_cache_shape = self.form.shape_of
        layer = SimpleNamespace(
            get_attn_backend=lambda: backend,
            _k_scale=torch.tensor(self.scales),
            _v_scale=torch.tensor(1.0),
        )
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                get_total_num_kv_heads=lambda: self.heads, model="none", revision=None, seed=0
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=self.tensor_parallel or self.ranks),
            speculative_config=self.speculative,
            load_config=SimpleNamespace(load_format="auto"),
            compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(self.caches, layer)),
        )
        group = SimpleNamespace(kv_cache_spec=self.announced, layer_names=list(self.caches))
        return config, SimpleNamespace(kv_cache_groups=[group]), self.shape, self.caches

    def split(self) -> HeadSplit:
        found = find_split(*self.own())
        assert not isinstance(found, str), found
        return found

    def namespace(self) -> bytes:
        return record_namespace(*self.own(), self.split())

    def records(self) -> np.ndarray:
        """Of all blocks, as the rank stores them."""
        layout = recognise(
            (tensor_view(name, tensor) for name, tensor in self.caches.items()),
            BLOCKS,
            self.shape.record_bytes,
        )
        arena = HostArena(BLOCKS, layout.record_bytes)
        try:
            blocks = np.arange(BLOCKS)
            CpuCopyEngine(layout, arena).offload(blocks, blocks)
            return arena.records().copy()
        finally:
            arena.close()


@pytest.fixture(autouse=True)
def engine_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "engine_namespace", lambda *_: b"e" * 16)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("ours", [1, 2, 4, 8])
@pytest.mark.parametrize("theirs", [1, 2, 4, 8])
def test_records_made_of_others_are_those_that_the_rank_stores(form: Form, theirs: int, ours: int) -> None:
    stored = [Rank(form, rank=rank, ranks=theirs) for rank in range(theirs)]
    records = [rank.records() for rank in stored]
    for rank in range(ours):
        own = Rank(form, rank=rank, ranks=ours)
        assert own.split() == stored[0].split()
        assert own.namespace() == stored[0].namespace()
        split = own.split().split
        shares = split.shares(rank, ours, theirs)
        for block, want in enumerate(own.records()):
            made = np.zeros_like(want)
            split.recut(shares, [records[share.rank][block] for share in shares], theirs, made, ours)
            assert (made == want).all()


def test_layers_of_a_form_are_one_part() -> None:
    assert Rank(FORMS["NHD"]).split().split == Split(4, (Part(3 * TOKENS, 2 * SIZE * 2),))
    assert Rank(FORMS["CPU"]).split().split == Split(4, (Part(3, TOKENS * 2 * SIZE * 2),))


def test_another_order_in_memory_is_another_namespace() -> None:
    assert Rank(FORMS["CPU"]).namespace() != Rank(FORMS["NHD"]).namespace()
    assert Rank(FORMS["CPU"]).namespace() != Rank(FORMS["CPU"], layers=2).namespace()
    assert Rank(FORMS["CPU"]).namespace() != Rank(FORMS["CPU"], heads=8).namespace()


def shared_memory(rank: Rank) -> None:
    first, other = rank.caches["layer0"], Rank(FORMS["NHD"]).caches["layer0"]
    rank.caches["layer1"] = first.as_strided(first.shape, other.stride())


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        (Rank(FORMS["CPU"], spec=MLAAttentionSpec), "not shared out by KV heads"),
        (Rank(FORMS["CPU"], ranks=2, tensor_parallel=1), "differ in more"),
        (Rank(FORMS["CPU"], speculative=object()), "draft model"),
        (Rank(FORMS["CPU"], scales=(1.0, 0.5)), "scales of their own"),
        (replace(Rank(FORMS["CPU"]), heads=8, ranks=4), "different numbers of KV heads"),
    ],
)
def test_why_records_stay_with_their_number_of_ranks(rank: Rank, reason: str) -> None:
    if reason.startswith("different"):
        rank.announced.num_kv_heads = 4
    assert reason in str(find_split(*rank.own()))


def test_what_is_not_known_is_not_guessed() -> None:
    packed = Rank(FORMS["CPU"])
    packed.announced.num_head_slots = 4
    assert "counts the heads" in str(find_split(*packed.own()))
    unknown = Rank(Form((BLOCKS, "h", TOKENS, 2, SIZE), (0, 1, 2, 3, 4)))
    assert "counts the heads" in str(find_split(*unknown.own()))
    other = Rank(replace(FORMS["NHD"], shape=(BLOCKS, TOKENS, "h", 2 * SIZE)))
    assert "counts the heads" in str(find_split(*other.own()))
    strange = Rank(replace(FORMS["FlashAttention before 0.29"], shape_of=lambda n, b, h: (n, b, h)))
    assert "counts the heads" in str(find_split(*strange.own()))


def test_memory_that_layers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(FORMS["CPU"])
    rank.caches["layer1"] = rank.caches["layer0"]
    config, announced, shape, caches = rank.own()
    once = replace(shape, record_bytes=shape.record_bytes * 2 // 3)
    found = find_split(config, announced, once, caches)
    assert isinstance(found, HeadSplit)
    assert found.split.parts == (Part(2, TOKENS * 2 * SIZE * 2),)
    shared_memory(rank)
    assert "memory with one of another form" in str(find_split(config, announced, once, rank.caches))
    assert "hold more than" in str(find_split(*Rank(FORMS["CPU"]).own()[:2], once, Rank(FORMS["CPU"]).caches))
