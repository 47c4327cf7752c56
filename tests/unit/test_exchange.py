"""Records that do not depend on the engine: their names, their form, and where they are kept apart."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from kvbm.config import load_config
from kvbm.errors import LayoutError
from kvbm.logic.hashing import page_hasher
from kvbm.runtime.exchange import element_view, exchange_namespace, is_dense
from kvbm.runtime.leader import Leader
from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CpuCopyEngine
from kvbm.transfer.layout import recognise, tensor_view

TOKENS = list(range(70000, 70040))


def sglang_keys(tokens: list[int], page: int, seed: bytes = b"") -> list[str]:
    """As SGLang 0.5.23 makes them (measured): a chain of SHA-256 over tokens of 32 bits."""
    keys, last = [], seed
    for start in range(0, len(tokens) // page * page, page):
        last = hashlib.sha256(last + np.array(tokens[start : start + page], "<u4").tobytes()).digest()
        keys.append(last.hex())
    return keys


def hex_of(hashes: np.ndarray) -> list[str]:
    return [row.astype("<u8").tobytes().hex() for row in hashes]


class TestNames:
    def test_are_the_first_half_of_sglangs(self) -> None:
        hasher = page_hasher(16)
        hasher.extend(TOKENS[:20])
        hasher.extend(TOKENS[hasher.num_tokens :])
        assert hex_of(hasher.hashes) == [key[:32] for key in sglang_keys(TOKENS, 16)]
        assert len(hasher) == 2

    def test_with_a_salt(self) -> None:
        seed = hashlib.sha256(b"sglang-cache-namespace-v1\0\1" + (4).to_bytes(8, "little") + b"mine").digest()
        hasher = page_hasher(16, salt="mine")
        hasher.extend(TOKENS)
        assert hex_of(hasher.hashes) == [key[:32] for key in sglang_keys(TOKENS, 16, seed)]

    def test_what_others_do_not_know_is_named_otherwise(self) -> None:
        config = load_config(host__num_blocks=8, disk__num_blocks=8, disk__exchange=True, environ={})
        leader = Leader(config, namespace=bytes(16), block_size=16, num_slots=8, ranks=1)
        page = page_hasher(16)
        page.extend(TOKENS)
        assert (leader.hashes_of(TOKENS, None) == page.hashes).all()
        adapter = leader._hasher(None, "an adapter")
        adapter.extend(TOKENS)
        leader.new_weights("others")
        of_epoch = leader.hashes_of(TOKENS, None)
        for other in (adapter.hashes, of_epoch):
            assert not set(hex_of(other)) & set(hex_of(page.hashes))


class TestNamespace:
    FACTS = {  # noqa: RUF012
        "dtype": torch.float16,
        "quantization": None,
        "layers": 4,
        "block_shape": (16, 2, 64),
        "rank": 0,
        "ranks": 1,
    }

    def test_each_fact_counts(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        first = exchange_namespace(str(tmp_path), None, **self.FACTS)
        assert first == exchange_namespace(str(tmp_path), None, **self.FACTS)
        others = {
            "dtype": torch.bfloat16,
            "quantization": "fp8",
            "layers": 5,
            "block_shape": (32, 2, 64),
            "rank": 1,
            "ranks": 2,
        }
        seen = {first}
        for name, value in others.items():
            seen.add(exchange_namespace(str(tmp_path), None, **{**self.FACTS, name: value}))
        (tmp_path / "config.json").write_text('{"rope_theta": 1}')
        seen.add(exchange_namespace(str(tmp_path), None, **self.FACTS))
        (tmp_path / "model.safetensors").write_bytes(b"weights")
        seen.add(exchange_namespace(str(tmp_path), None, **self.FACTS))
        assert len(seen) == 1 + len(others) + 2


class TestForm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
    def test_elements_arrive_in_the_order_of_the_view(self, dtype: torch.dtype) -> None:
        blocks, heads, tokens, size = 5, 2, 4, 8
        memory = torch.randn(blocks, heads, size, tokens).to(dtype)
        layout = recognise([tensor_view("k", memory)], blocks, memory[0].nbytes)
        arena = HostArena(3, layout.record_bytes)
        view = element_view(memory).transpose(0, 3, 1, 2)
        engine = CpuCopyEngine(layout, arena, [view])
        before = view.copy()
        engine.offload(np.array([4, 1]), np.array([2, 0]))
        assert arena.records()[2].tobytes() == np.ascontiguousarray(before[4]).tobytes()
        view[...] = 0
        engine.onboard(np.array([3, 0]), np.array([2, 0]))
        assert (view[3] == before[4]).all()
        assert (view[0] == before[1]).all()
        assert not view[[1, 2, 4]].any()

    def test_views_of_another_size_are_refused(self) -> None:
        memory = torch.zeros(5, 4, 8)
        layout = recognise([tensor_view("k", memory)], 5, memory[0].nbytes)
        with pytest.raises(LayoutError, match="The views hold"):
            CpuCopyEngine(layout, HostArena(3, layout.record_bytes), [element_view(memory)[:, :2]])

    def test_dense(self) -> None:
        assert is_dense((16, 2, 64), torch.empty(9, 16, 2, 64).stride()[1:])
        assert is_dense((16, 1, 64), (64, 7, 1))
        assert not is_dense((16, 2, 64), torch.empty(9, 2, 16, 64).transpose(1, 2).stride()[1:])
