"""SGLang's linker on a GPU: offloads behind a forward pass, loads layer by layer into the next.

SGLang 0.5.23 can't be installed on the GPU machine at hand (it wants torch 2.14), so what calls the linker is
not SGLang: these tests make its calls in its order, with a KV pool of its form, on a stream of their own.
Where it is not installed, the few names that the linker imports from it are stand-ins. Where there is no GPU,
as in CI, threads copy within the memory of the CPU.

pytest -m gpu tests/gpu/test_sglang_linker.py
"""

import contextlib
import hashlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from kvbm.logic.operations import Operation
from kvbm.transfer.copy import InStepLoad

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.timeout(120), *([pytest.mark.gpu] if DEVICE.type == "cuda" else [])]

PAGE, PAGES, LAYERS, HEADS, DIM = 16, 256, 8, 4, 64
DTYPES = [torch.bfloat16, torch.float16, torch.uint8]  # uint8: as SGLang stores fp8


@pytest.fixture(scope="module", autouse=True)
def sglang() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        try:
            import sglang  # noqa: F401
        except ImportError:
            for name, members in {
                "sglang": {"__version__": "0.5.23"},
                "sglang.srt": {},
                "sglang.srt.mem_cache": {},
                "sglang.srt.mem_cache.hicache_storage": {"PoolName": SimpleNamespace(KV="kv")},
                "sglang.srt.mem_cache.unified_cache": {},
                "sglang.srt.mem_cache.unified_cache.unified_cache_linker": {"UnifiedCacheLinker": object},
            }.items():
                module = ModuleType(name)
                vars(module).update(members)
                patch.setitem(sys.modules, name, module)
        yield


class MHATokenToKVPool:
    """By its name and form SGLang's pool of keys and values, a tensor a layer for each."""

    def __init__(self, dtype: torch.dtype) -> None:
        shape = (PAGES * PAGE, HEADS, DIM)
        self.k_buffer = [torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(LAYERS)]
        self.v_buffer = [torch.zeros(shape, dtype=dtype, device=DEVICE) for _ in range(LAYERS)]
        self.start_layer, self.end_layer = 0, LAYERS


class Engine:
    """Makes SGLang's calls. Pages are numbers; a page's key is the hash of its content's seed."""

    def __init__(self, dtype: torch.dtype) -> None:
        from sglang.srt.mem_cache.hicache_storage import PoolName

        from kvbm.sglang_integration.linker import KvbmLinker

        self.name = PoolName.KV
        self.pool = MHATokenToKVPool(dtype)
        cuda = DEVICE.type == "cuda"
        self.stream: Any = torch.cuda.Stream() if cuda else None
        params = SimpleNamespace(
            page_size=PAGE,
            token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: self.pool),
            **dict.fromkeys(("pp_rank", "attn_cp_rank"), 0),
            **dict.fromkeys(("pp_size", "attn_cp_size"), 1),
        )
        self.linker: Any = KvbmLinker(
            SimpleNamespace(model_path="", speculative_algorithm=None),
            params,
            components={_Component("FULL")},
            extra_config={"kvbm": {"host": {"num_blocks": 2 * PAGES}, "engine": {"allow_untested": True}}},
            forward_stream=self.stream,
        )
        assert not self.linker._refused

    def on_stream(self) -> Any:
        """Behind what the test has made on its own stream."""
        if self.stream is None:
            return contextlib.nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def transfers(self, pages: torch.Tensor, seeds: list[int]) -> list[Any]:
        indices = (pages[:, None] * PAGE + torch.arange(PAGE)).reshape(-1).to(DEVICE)
        keys = [hashlib.sha256(str(seed).encode()).hexdigest() for seed in seeds]
        return [SimpleNamespace(name=self.name, device_indices=indices, keys=keys)]

    def bytes_by_layer(self) -> Iterator[list[torch.Tensor]]:
        """Keys and values of each layer, (pages, tokens of a page, ...)."""
        for buffers in zip(self.pool.k_buffer, self.pool.v_buffer, strict=True):
            yield [buffer.view(torch.uint8).unflatten(0, (PAGES, PAGE)) for buffer in buffers]

    def compute(self, pages: torch.Tensor, contents: torch.Tensor) -> None:
        """A slow forward pass that writes pages; contents: (layers, 2, pages, ...) bytes."""
        with self.on_stream():
            if self.stream is not None:
                torch.cuda._sleep(20_000_000)  # some 10 ms
            for layer, views in enumerate(self.bytes_by_layer()):
                for which, view in enumerate(views):
                    view[pages.to(DEVICE)] = contents[layer, which]

    def forward(self, index: int, pages: torch.Tensor) -> torch.Tensor:
        """A forward pass that reads each layer's pages when the counter lets it; their bytes."""
        self.linker.layer_done_counter.set_consumer(index)
        seen = []
        with self.on_stream():
            for layer, views in enumerate(self.bytes_by_layer()):
                self.linker.layer_done_counter.wait_until(layer)
                seen.append(torch.stack([view[pages.to(DEVICE)] for view in views]))
            result = torch.stack(seen)
        self.synchronize()
        return result

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def offload(self, pages: torch.Tensor, seeds: list[int]) -> None:
        assert self.linker.offload(self.transfers(pages, seeds))

    def offloads_end(self, count: int) -> list[bool]:
        results = []
        while len(results) < count:
            time.sleep(0.001)  # threads that copy need the GIL
            results += [
                self.linker.pop_completed_offload() for _ in range(self.linker.num_completed_offloads())
            ]
        return results

    def load(self, rid: str, pages: torch.Tensor, seeds: list[int]) -> None:
        transfers = self.transfers(pages, seeds)
        assert self.linker.lookup(rid, transfers) == list(range(1, len(seeds) + 1))
        assert self.linker.load(rid, transfers)


class _Component(NamedTuple):
    name: str


@pytest.fixture(params=DTYPES, ids=str)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    torch.manual_seed(0)
    engine = Engine(request.param)
    yield engine
    engine.linker.close()


def contents_of(engine: Engine, pages: int) -> torch.Tensor:
    width = engine.pool.k_buffer[0].view(torch.uint8).shape[-1]
    return torch.randint(0, 256, (LAYERS, 2, pages, PAGE, HEADS, width), dtype=torch.uint8, device=DEVICE)


def test_pages_come_back_bit_by_bit(engine: Engine) -> None:
    """Written by a slow pass just before the offload; overwritten; read by the next pass, layer by layer."""
    for turn in range(3):
        order = torch.randperm(PAGES)
        source, target = order[:60], order[60:120]
        seeds = list(range(100 * turn, 100 * turn + 60))
        contents = contents_of(engine, 60)
        engine.compute(source, contents)
        engine.offload(source, seeds)
        if engine.stream is not None:  # in its order; threads have none, and on CPUs SGLang waits for them
            engine.compute(source, contents_of(engine, 60))  # a next request gets these pages
        assert engine.offloads_end(1) == [True]
        engine.compute(target, contents_of(engine, 60))
        engine.load("a", target, seeds)
        index = engine.linker.start_layer_wise_loading()
        seen = engine.forward(index, target)
        assert engine.linker.finish_layer_wise_loading(index)
        assert torch.equal(seen, contents)


def test_several_requests_in_a_batch(engine: Engine) -> None:
    """One of three is given up before the batch: its pages are left alone."""
    order = torch.randperm(PAGES)
    source, targets = order[:96], order[96:192].split([1, 40, 55])
    seeds = list(range(96))
    parts = [seeds[:1], seeds[1:41], seeds[41:]]
    contents = contents_of(engine, 96)
    engine.compute(source, contents)
    engine.offload(source, seeds)
    assert engine.offloads_end(1) == [True]
    garbage = contents_of(engine, 96)
    engine.compute(order[96:192], garbage)
    for rid, (target, part) in enumerate(zip(targets, parts, strict=True)):
        engine.load(str(rid), target, part)
    assert engine.linker.cancel_queued_load("1")
    index = engine.linker.start_layer_wise_loading()
    seen = engine.forward(index, order[96:192])
    assert engine.linker.finish_layer_wise_loading(index)
    want = contents.clone()
    want[:, :, 1:41] = garbage[:, :, 1:41]
    assert torch.equal(seen, want)


class Arrived(InStepLoad):
    """A load that is over, and who asked for its layers."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @property
    def is_over(self) -> bool:
        return True

    def before_layer(self, name: str) -> None:
        self.asked.append(name)

    def before_all(self) -> None: ...


def test_a_batch_is_one_load(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its first layers would wait for all layers of the requests before the last."""
    pages, seeds = torch.arange(50), list(range(50))
    engine.compute(pages, contents_of(engine, 50))
    engine.offload(pages, seeds)
    assert engine.offloads_end(1) == [True]
    loads: list[tuple[Sequence[Operation], Arrived]] = []

    def start_in_step(operations: Sequence[Operation]) -> list[InStepLoad]:
        loads.append((operations, Arrived()))
        return [loads[-1][1]]

    worker = engine.linker._worker
    monkeypatch.setattr(type(worker), "loads_in_step", True)
    monkeypatch.setattr(worker, "start_in_step", start_in_step)
    for rid, part in {"a": slice(0, 20), "b": slice(0, 50)}.items():
        engine.load(rid, pages[part] + (100 if rid == "a" else 120), seeds[part])
    index = engine.linker.start_layer_wise_loading()
    engine.forward(index, pages)
    assert engine.linker.finish_layer_wise_loading(index)
    [([operation], load)] = loads
    assert operation.device_blocks.tolist() == list(range(100, 170))
    assert operation.host_slots[:20].tolist() == operation.host_slots[20:40].tolist()
    assert len(set(operation.host_slots.tolist())) == 50
    assert load.asked == [f"{layer}.{which}" for layer in range(LAYERS) for which in "kv"]
    assert not engine.linker._store.pool.pins(operation.host_slots).any()


def test_a_load_that_can_not_be_started(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang hears of it, and waits for nothing."""
    pages, seeds = torch.arange(10), list(range(10))
    engine.compute(pages, contents_of(engine, 10))
    engine.offload(pages, seeds)
    assert engine.offloads_end(1) == [True]
    with monkeypatch.context() as patch:
        for order in ("submit", "start_in_step"):
            patch.setattr(engine.linker._worker, order, lambda _: 1 // 0)
        engine.load("a", pages, seeds)
        index = engine.linker.start_layer_wise_loading()
        engine.forward(index, pages)
        assert not engine.linker.finish_layer_wise_loading(index)
    engine.load("b", pages, seeds)
    index = engine.linker.start_layer_wise_loading()
    engine.forward(index, pages)
    assert engine.linker.finish_layer_wise_loading(index)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="no thread of ours copies")
def test_a_copy_that_hangs_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(torch.bfloat16)
    go, closed = threading.Event(), []
    records = engine.linker._store.records
    copies = records._engine
    monkeypatch.setattr(copies, "offload", lambda *_: go.wait(60))
    monkeypatch.setattr(copies, "close", lambda: closed.append(True))
    engine.linker._timeout_s = 0.1
    engine.offload(torch.arange(5), list(range(5)))
    engine.linker.close()
    assert records.arena.records().shape[0] == 2 * PAGES
    assert not closed
    go.set()


def test_a_batch_without_loads(engine: Engine) -> None:
    index = engine.linker.start_layer_wise_loading()
    assert index == -1
    engine.forward(index, torch.arange(3))
    assert engine.linker.finish_layer_wise_loading(index)


def test_reset_with_copies_under_way(engine: Engine) -> None:
    """Pages that are stored stay known after SGLang has forgotten its own."""
    pages, seeds = torch.arange(50), list(range(50))
    contents = contents_of(engine, 50)
    engine.compute(pages, contents)
    engine.offload(pages, seeds)
    engine.linker.reset()
    assert engine.linker.num_completed_offloads() == 0
    engine.compute(pages, contents_of(engine, 50))
    engine.load("b", pages, seeds)
    engine.linker.start_layer_wise_loading()
    engine.linker.reset()
    engine.load("c", pages, seeds)
    index = engine.linker.start_layer_wise_loading()
    assert torch.equal(engine.forward(index, pages), contents)
    assert engine.linker.finish_layer_wise_loading(index)
