"""The CUDA copy engine, bit for bit, on vLLM's layouts. Run on a GPU machine: pytest -m gpu tests/gpu"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvbm.errors import LayoutError  # noqa: E402
from kvbm.transfer.arena import HostArena, available_memory  # noqa: E402
from kvbm.transfer.calibration import Method  # noqa: E402
from kvbm.transfer.cuda.engine import CudaCopyEngine  # noqa: E402
from kvbm.transfer.layout import recognise, tensor_view  # noqa: E402
from kvbm.transfer.proof import prove  # noqa: E402
from kvbm.transfer.records import HostRecords  # noqa: E402

pytestmark = pytest.mark.gpu

BLOCKS, LAYERS = 64, 4


def packed(dtype):
    """vLLM 0.26 FlashAttention 3: (blocks, heads, tokens, 2 * dim), heads inside tokens."""
    return [
        torch.empty_strided((BLOCKS, 8, 16, 256), (32768, 256, 2048, 1), dtype=dtype) for _ in range(LAYERS)
    ]


def apart(dtype):
    """K and V apart: (2, blocks, tokens, heads, dim)."""
    return [torch.empty((2, BLOCKS, 16, 8, 128), dtype=dtype) for _ in range(LAYERS)]


def latent(dtype):
    """MLA: (blocks, tokens, dim)."""
    return [torch.empty((BLOCKS, 16, 576), dtype=dtype) for _ in range(LAYERS)]


def cross_layer(dtype):
    """All layers of a block together: views of (blocks, layers, tokens, heads, 2 * dim)."""
    whole = torch.empty((BLOCKS, LAYERS, 16, 8, 256), dtype=dtype)
    return [whole[:, i] for i in range(LAYERS)]


def odd(dtype):
    """Pieces whose size is no multiple of the kernel's tile, and differs from layer to layer."""
    return [torch.empty((BLOCKS, 16, 72 + 24 * i), dtype=dtype) for i in range(LAYERS)]


class Setup:
    """Tensors full of random bits, and an engine for them."""

    def __init__(self, make, dtype, method=None, slots=40):
        with torch.device("cuda"):
            self.tensors = make(dtype)
        for tensor in self.tensors:
            values = torch.randint(0, 256, (*tensor.shape[:-1], tensor.shape[-1] * tensor.element_size()))
            tensor.copy_(values.to(torch.uint8).view(dtype))
        self.block_dim = 1 if make is apart else 0
        block_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors) // BLOCKS
        views = (tensor_view(str(i), t) for i, t in enumerate(self.tensors))
        self.layout = recognise(views, BLOCKS, block_bytes)
        self.arena = HostArena(slots, self.layout.record_bytes)
        self.engine = CudaCopyEngine(self.layout, self.arena, self.tensors[0].device, method=method)
        self.engine.wait_ready()
        self.before = self.bits()

    def stage_three(self):
        """More blocks than the staging memory holds, as with long prompts."""
        for lane in self.engine._lanes.values():
            lane.half_bytes = 3 * self.arena.slot_bytes

    def bits(self):
        return [
            tensor.movedim(self.block_dim, 0).contiguous().view(torch.uint8).cpu() for tensor in self.tensors
        ]

    def assert_moved(self, source, target):
        """The target blocks hold what the source blocks held, all others what they held."""
        for old, new in zip(self.before, self.bits(), strict=True):
            expected = old.clone()
            expected[target] = old[source]
            assert torch.equal(new, expected)


LAYOUTS = [packed, apart, latent, cross_layer, odd]
DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]
rng = np.random.default_rng(0)
SOURCE, SLOTS = rng.permutation(30)[:20], rng.permutation(40)[:20]
TARGET = 30 + rng.permutation(30)[:20]


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("make", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(make, dtype, method):
    setup = Setup(make, dtype, method)
    records = HostRecords(setup.arena, setup.engine)
    records.offload(SOURCE, SLOTS, records.fence())
    assert records.onboard(TARGET, SLOTS, records.fence()).all()
    setup.assert_moved(SOURCE, TARGET)
    setup.engine.close()


@pytest.mark.parametrize("make", LAYOUTS)
def test_records_are_those_of_every_method(make):
    """What one method stored, each other can load: methods change with the number of blocks."""
    setup = Setup(make, torch.bfloat16)
    stored = []
    for method in Method:
        setup.arena.slots[:] = 0
        setup.engine.start("offload", SOURCE, SLOTS, setup.engine.fence(), method).wait()
        stored.append(setup.arena.records()[SLOTS].copy())
    assert stored[0].any()
    for other in stored[1:]:
        assert (other == stored[0]).all()
    setup.engine.close()


@pytest.mark.parametrize("method", [None, *Method])
@pytest.mark.parametrize("make", LAYOUTS)
def test_a_load_inside_a_step(make, method):
    """Work given to the stream behind a layer's mark reads what was loaded; before the mark nothing waits."""
    setup = Setup(make, torch.bfloat16, method)
    setup.stage_three()
    setup.engine.offload(SOURCE, SLOTS, setup.engine.fence())
    load = setup.engine.start_in_step(TARGET, SLOTS)
    seen = []
    for layer, tensor in enumerate(setup.tensors):
        load.before_layer(str(layer))
        seen.append(tensor.movedim(setup.block_dim, 0)[TARGET].clone())
    load.before_all()
    torch.cuda.synchronize()
    assert load.is_over
    for old, new in zip(setup.before, seen, strict=True):
        assert torch.equal(new.contiguous().view(torch.uint8).cpu(), old[SOURCE])
    setup.assert_moved(SOURCE, TARGET)
    setup.engine.close()


def test_whose_call_it_is():
    """Equal for one thread on one stream: a load may be started before its step only from there."""
    setup = Setup(packed, torch.bfloat16)
    seen = [setup.engine.caller()]
    with torch.cuda.stream(torch.cuda.Stream()):
        seen.append(setup.engine.caller())
    thread = threading.Thread(target=lambda: seen.append(setup.engine.caller()))
    thread.start()
    thread.join()
    assert len(set(seen)) == 3
    assert setup.engine.caller() == seen[0]
    setup.engine.close()


@pytest.mark.parametrize("method", list(Method))
def test_a_load_inside_a_step_waits_for_what_came_before(method):
    """A kernel still running when the load is ordered must not overwrite what it brings."""
    setup = Setup(packed, torch.bfloat16, method)
    setup.engine.offload(SOURCE, SLOTS, setup.engine.fence())
    busy = torch.rand((8192, 8192), device="cuda")
    for _ in range(20):
        busy = busy @ busy / 8192
    for tensor in setup.tensors:
        tensor[TARGET] = 0
    setup.engine.start_in_step(TARGET, SLOTS).before_all()
    torch.cuda.synchronize()
    setup.assert_moved(SOURCE, TARGET)
    setup.engine.close()


@pytest.mark.parametrize("method", list(Method))
def test_many_copies_at_once(method):
    """Both directions from several threads, more blocks than the staging memory holds."""
    setup = Setup(packed, torch.bfloat16, method, slots=BLOCKS)
    setup.stage_three()
    source, target = np.arange(0, BLOCKS, 2), np.arange(1, BLOCKS, 2)

    def copy(part):
        blocks, slots = source[part], source[part] // 2
        setup.engine.offload(blocks, slots, setup.engine.fence())
        setup.engine.onboard(target[part], slots, None)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            list(pool.map(copy, [slice(i, None, 4) for i in range(4)]))
    setup.assert_moved(source, target)
    setup.engine.close()


@pytest.mark.parametrize("make", [packed, apart, cross_layer])
def test_the_layout_is_proven(make):
    setup = Setup(make, torch.bfloat16)
    caches = {str(i): tensor for i, tensor in enumerate(setup.tensors)}
    prove(caches, setup.layout, setup.engine, setup.arena)
    setup.assert_moved([], [])  # nothing is left behind
    setup.engine._pieces.address[1 if make is packed else 0] += 64  # the device and the table disagree
    assert setup.engine._piece_copies is not None
    setup.engine._piece_copies._pieces[0, 1 if make is packed else 0] += 64
    with pytest.raises(LayoutError, match="did not survive"):
        prove(caches, setup.layout, setup.engine, setup.arena)
    setup.engine.close()


def test_memory_is_pinned_while_it_is_used_and_given_back():
    available = available_memory() or 0
    setup = Setup(packed, torch.bfloat16)
    arena = HostArena(int(4e9 // setup.arena.slot_bytes), setup.layout.record_bytes)
    engine = CudaCopyEngine(setup.layout, arena, setup.tensors[0].device)
    assert 0 < engine.ready_slots < arena.num_slots
    slots = np.arange(20)
    engine.offload(SOURCE, slots, engine.fence())
    engine.onboard(TARGET, slots, engine.fence())
    setup.assert_moved(SOURCE, TARGET)
    engine.wait_ready()
    assert engine.ready_slots == arena.num_slots
    last = np.arange(arena.num_slots - 20, arena.num_slots)
    engine.offload(SOURCE, last, engine.fence())
    assert (arena.records()[last] == arena.records()[slots]).all()
    engine.close()
    arena.close()
    assert (available_memory() or 0) > available - 1e9
    setup.engine.close()


def test_copies_during_a_graph_capture():
    """An engine captures its graphs while our threads copy and pin."""
    setup = Setup(packed, torch.bfloat16)
    arena = HostArena(int(8e9 // setup.arena.slot_bytes), setup.layout.record_bytes)
    engine = CudaCopyEngine(setup.layout, arena, setup.tensors[0].device)
    x = torch.zeros(1024, device="cuda")
    errors = []

    def copy():
        try:
            for _ in range(50):
                engine.offload(SOURCE, np.arange(20), None)
                engine.onboard(SOURCE, np.arange(20), None)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=copy)
    thread.start()
    graphs = 0
    while thread.is_alive():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(200):
                x += 1
        graph.replay()
        graphs += 1
    thread.join()
    torch.cuda.synchronize()
    assert not errors
    assert graphs > 1
    assert (x == 200 * graphs).all()
    setup.assert_moved([], [])
    engine.close()
    setup.engine.close()


def test_offload_waits_for_the_fence():
    """Bytes written by work submitted before the fence are those that arrive."""
    with torch.device("cuda"):
        (tensor,) = [torch.zeros((BLOCKS, 16, 8, 256), dtype=torch.float32)]
        busy = torch.rand((8192, 8192))
    block_bytes = tensor.numel() * tensor.element_size() // BLOCKS
    layout = recognise([tensor_view("0", tensor)], BLOCKS, block_bytes)
    arena = HostArena(8, layout.record_bytes)
    engine = CudaCopyEngine(layout, arena, tensor.device)
    for _ in range(20):
        busy = busy @ busy / 8192
    tensor += 7
    engine.offload(np.arange(8), np.arange(8), engine.fence())
    assert (arena.records().copy().view(np.float32) == 7).all()
