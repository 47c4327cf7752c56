"""The CUDA copy engine, bit for bit, on vLLM's layouts. Run on a GPU machine: pytest -m gpu tests/gpu"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvbm.transfer.arena import HostArena  # noqa: E402
from kvbm.transfer.cuda.engine import CudaCopyEngine  # noqa: E402
from kvbm.transfer.layout import recognise, tensor_view  # noqa: E402
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


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).cpu()


@pytest.mark.parametrize("make", [packed, apart, latent, cross_layer])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_round_trip(make, dtype):
    with torch.device("cuda"):
        tensors = make(dtype)
    for tensor in tensors:
        values = torch.randint(0, 256, (*tensor.shape[:-1], tensor.shape[-1] * tensor.element_size()))
        tensor.copy_(values.to(torch.uint8).view(dtype))
    block_dim = 1 if make is apart else 0
    block_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) // BLOCKS
    layout = recognise((tensor_view(str(i), t) for i, t in enumerate(tensors)), BLOCKS, block_bytes)
    arena = HostArena(40, layout.record_bytes)
    records = HostRecords(arena, CudaCopyEngine(layout, arena, tensors[0].device))
    before = [as_bytes(t.movedim(block_dim, 0)) for t in tensors]
    rng = np.random.default_rng(0)
    source, slots = rng.permutation(30)[:20], rng.permutation(40)[:20]
    target = 30 + rng.permutation(30)[:20]
    records.offload(source, slots, records.fence())
    assert records.onboard(target, slots, records.fence()).all()
    for old, tensor in zip(before, tensors, strict=True):
        new = as_bytes(tensor.movedim(block_dim, 0))
        expected = old.clone()
        expected[target] = old[source]
        assert torch.equal(new, expected)


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
