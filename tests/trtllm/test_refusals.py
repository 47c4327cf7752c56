"""What is not understood is not cached, and the reason is said."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvbm.errors import CapacityError
from tests.trtllm.conftest import Make
from tests.trtllm.executor import BLOCK, LAYERS, WIDTH, Executor, layout_of
from tests.trtllm.test_connector import PROMPT, warmed


def assert_off(engine: Executor, plain: Make, reason: str) -> None:
    ranks = len(engine.workers)
    expected = plain(ranks=ranks).generate(PROMPT, 3)
    for _ in range(3):
        request = engine.add(PROMPT, 3)
        engine.run()
        assert (request.matched, request.output) == (0, expected)
    assert reason in engine.leader.side.refused


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("pipeline_parallel_size", 2, "pipeline parallelism"),
        ("context_parallel_size", 2, "context parallelism"),
        ("max_beam_width", 4, "beam search"),
        ("enable_attention_dp", True, "attention data parallelism"),
        ("sparse_attention_config", object(), "sparse attention"),
        ("kv.host_cache_size", 1 << 30, "host_cache_size"),
        ("kv.enable_block_reuse", False, "enable_block_reuse"),
        ("kv.max_attention_window", [512, 4096], "attention windows"),
        ("kv.dtype", "nvfp4", "NVFP4"),
        ("model", "/nowhere/at/all", "config.json"),
    ],
)
def test_engine(make: Make, plain: Make, llm_args: Any, name: str, value: Any, reason: str) -> None:
    section, _, key = name.rpartition(".")
    setattr(llm_args.kv_cache_config if section else llm_args, key, value)
    assert_off(make(), plain, reason)


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("config.json", '{"vision_config": {}}', "multimodal"),
        ("config.json", "{", "config.json"),
        ("hf_quant_config.json", '{"quantization": {"kv_cache_quant_algo": "NVFP4"}}', "NVFP4"),
    ],
)
def test_model(
    make: Make, plain: Make, llm_args: Any, tmp_path: Any, file: str, text: str, reason: str
) -> None:
    (tmp_path / "model" / file).write_text(text)
    assert_off(make(), plain, reason)


def test_full_windows_are_none(make: Make, llm_args: Any) -> None:
    llm_args.kv_cache_config.max_attention_window = [llm_args.max_seq_len]
    assert warmed(make()).leader.side.refused is None


def test_without_a_size(make: Make, plain: Make) -> None:
    assert_off(make(env={"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": ""}), plain, "DYN_KVBM_CPU_CACHE_GB")


def _region(layout: Any, **changes: Any) -> Any:
    return SimpleNamespace(**{**vars(layout.groups[0].regions[0]), **changes})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layout: {"groups": layout.groups * 2}, "2 layer groups"),
        (lambda layout: {"tokens_per_block": 2 * BLOCK}, "tokens"),
    ],
)
def test_layout(make: Make, plain: Make, change: Any, reason: str) -> None:
    engine = make()
    layout = layout_of(engine.kv[0])
    engine.workers[0].register_kv_cache_layout(SimpleNamespace(**{**vars(layout), **change(layout)}))
    assert_off(engine, plain, reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (lambda layout: {"window_size": 128}, "attention windows"),
        (lambda layout: {"replicated_regions": (_region(layout),)}, "beside that of keys and values"),
        (
            lambda layout: {"regions": (layout.groups[0].regions[0], _region(layout, num_slots=7))},
            "different numbers of slots",
        ),
        (
            lambda layout: {"regions": (_region(layout, buffers=(SimpleNamespace(expansion=2),)),)},
            "beside that of keys and values",
        ),
    ],
)
def test_layer_group(make: Make, plain: Make, llm_args: Any, changes: Any, reason: str) -> None:
    # Its size in GB: without the size of a block there is no number of them.
    engine = make(env={"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "", "DYN_KVBM_CPU_CACHE_GB": "0.001"})
    changed = layout_of(engine.kv[0], **changes(layout_of(engine.kv[0])))
    engine.workers[0].side.close()
    engine.workers[0] = type(engine.workers[0])(llm_args)
    engine.workers[0].register_kv_cache_layout(changed)
    assert_off(engine, plain, reason)


def test_ranks_of_different_sizes(make: Make, plain: Make) -> None:
    engine = make(ranks=2)
    wider = torch.zeros((64, LAYERS, 2, 2 * BLOCK * WIDTH), dtype=torch.uint8)
    engine.workers[1].register_kv_caches(wider)
    assert_off(engine, plain, "bytes a block")


def test_a_rank_that_does_not_have_the_settings(
    make: Make, plain: Make, here: Any, llm_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MPI does not hand on every variable of the environment."""
    engine = make(ranks=2)
    monkeypatch.delenv("DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS")
    here.rank = 1
    worker = type(engine.workers[1])(llm_args)
    worker.register_kv_caches(engine.kv[1])
    engine.workers[1].side.close()
    engine.workers[1] = worker
    assert_off(engine, plain, "rank 1: KVBM is not configured")


def test_a_leader_that_can_not_be_reached(make: Make, plain: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from another machine: nothing is ever promised."""
    engine = make(ranks=2)
    build = engine.leader.side.build

    def elsewhere(output: Any) -> Any:
        metadata = build(output)
        metadata.address = "kvbm-nobody"
        return metadata

    monkeypatch.setattr(engine.leader.side, "build", elsewhere)
    expected = plain(ranks=2).generate(PROMPT, 3)
    assert [engine.generate(PROMPT, 3) for _ in range(3)] == [expected] * 3
    assert engine.leader.side.leader is None


def test_more_than_the_machine_has(make: Make) -> None:
    with pytest.raises(CapacityError, match="DYN_KVBM_CPU_CACHE_GB"):
        make(env={"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(10**9)})
