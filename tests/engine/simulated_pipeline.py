"""vLLM's scheduler and both halves of the connector, over ranks that only pretend to compute.

Real are vLLM's scheduler, its KV cache configuration, its order of the worker's hooks and its joining of all
ranks' outputs. A rank "computes" by writing into its KV tensors, for each token, a number that follows from
the layer and all tokens up to it; before that it looks whether the numbers of all earlier tokens are there.
Ranks run behind each other by random numbers of steps, and a copy ends at a random later moment, as on GPUs.
"""

import copy
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_configs,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

from kvbm.runtime import rank as rank_module
from kvbm.transfer.copy import Transfer
from kvbm.vllm_integration.connector import KvbmConnector
from tests.engine.harness import KVBM
from tests.engine.lazy_loads import LazyCopyEngine

BLOCK = 4
VOCABULARY = 1000


class Later(Transfer):
    """A copy that the device makes at a moment of its own, at once or steps later."""

    def __init__(self, chance: random.Random, copy_now: Any, *args: Any) -> None:
        self._chance, self._copy, self._args = chance, copy_now, args
        self._done = False
        _ = self.is_over

    @property
    def is_over(self) -> bool:
        if not self._done and self._chance.random() < 0.3:
            self._copy(*self._args)
            self._done = True
        return self._done


class LateCopyEngine(LazyCopyEngine):
    chance: random.Random

    def start_offload(self, device_blocks: Any, host_slots: Any, after: object = None) -> Transfer:
        return Later(self.chance, self.offload, device_blocks, host_slots, after)

    def start_onboard(self, device_blocks: Any, host_slots: Any, after: object = None) -> Transfer:
        self.fill(device_blocks)  # nobody may read them yet
        if self.chance.random() < 0.1:
            raise OSError("injected")
        return Later(self.chance, self.onboard, device_blocks, host_slots, after)


def next_token(tokens: Sequence[int]) -> int:
    return hash((7, *tokens)) % VOCABULARY


def number(tokens: Sequence[int], layer: int, shard: int) -> float:
    """What the KV of the last of `tokens` is."""
    return float(hash((layer, shard, *tokens)) % (1 << 24))


@dataclass
class Step:
    output: Any
    tokens: dict[str, list[int]]  # of each request, up to the last one computed
    start: dict[str, int]
    emits: dict[str, int]  # who gets a token, and which
    done: dict[int, ModelRunnerOutput] = field(default_factory=dict)  # by rank


class Rank:
    def __init__(self, config: VllmConfig, kv_cache_config: Any, rank: int) -> None:
        self.rank = rank
        self.config = copy.copy(config)
        self.config.parallel_config = copy.copy(config.parallel_config)
        self.config.parallel_config.rank = rank
        tensor_parallel = config.parallel_config.tensor_parallel_size
        self.stage, self.shard = divmod(rank, tensor_parallel)
        names = kv_cache_config.kv_cache_groups[0].layer_names
        self.caches = {name: torch.zeros(kv_cache_config.num_blocks, 1, BLOCK, 2) for name in names}
        self.connector = KvbmConnector(self.config, KVConnectorRole.WORKER, kv_cache_config)
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
        self.hooks = ActiveKVConnector(self.config, self.caches)
        self.tables: dict[str, list[int]] = {}
        self.steps = 0

    def run(self, step: Step) -> ModelRunnerOutput:
        """What vLLM's model runner does with a step."""
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector
        self.steps += 1
        output = copy.copy(step.output)
        output.kv_connector_metadata = copy.deepcopy(output.kv_connector_metadata)  # each process has its own
        if not output.total_num_scheduled_tokens:
            return self.hooks.no_forward(output)
        self._update_tables(output)
        with set_forward_context({"any": "metadata"}, self.config):
            self.hooks.pre_forward(output)
            for layer, (name, cache) in enumerate(self.caches.items()):
                self.connector.wait_for_layer_load(name)
                self._compute(step, layer, cache)
            self.hooks.finish_forward()
        transfers = self.hooks.post_forward(output.finished_req_ids)
        ids = list(output.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={id_: i for i, id_ in enumerate(ids)},
            sampled_token_ids=[[step.emits[id_]] if id_ in step.emits else [] for id_ in ids],
            kv_connector_output=transfers,
        )

    def _update_tables(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = list(new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for id_, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if id_ in cached.resumed_req_ids:
                self.tables[id_] = list(blocks[0])
            elif blocks is not None:
                self.tables[id_] += blocks[0]

    def _compute(self, step: Step, layer: int, cache: torch.Tensor) -> None:
        for id_, tokens in step.tokens.items():
            table, start = self.tables[id_], step.start[id_]
            for position in range(len(tokens)):
                place = cache[table[position // BLOCK], 0, position % BLOCK]
                right = number(tokens[: position + 1], layer, self.rank)
                if position < start:
                    assert place.tolist() == [right] * 2, f"rank {self.rank}, {id_}, token {position}"
                else:
                    place[:] = right

    @property
    def _engine(self) -> Any:
        side: Any = self.connector.worker_side
        return side._worker._records._engine

    @property
    def loads_in_step(self) -> int:
        return self._engine.seen["in step"]

    @property
    def record_bytes(self) -> int:
        return self._engine.arena.record_bytes


class Pipeline:
    """An engine of stages x shards ranks. layers: of the model; they are shared out as vLLM does it."""

    def __init__(
        self,
        model: Path,
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
        *,
        stages: int,
        shards: int,
        asynchronous: bool,
        device_blocks: int = 24,
        host_blocks: int = 40,
    ) -> None:
        self.chance = random.Random(seed)
        monkeypatch.setattr(LateCopyEngine, "chance", self.chance, raising=False)
        monkeypatch.setattr(rank_module, "CpuCopyEngine", LateCopyEngine)
        extra = {"host.num_blocks": host_blocks, "host.checksum": False}
        config = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            tensor_parallel_size=shards,
            pipeline_parallel_size=stages,
            distributed_executor_backend="mp",
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=88,
            max_num_batched_tokens=32,
            max_num_seqs=8,
            num_gpu_blocks_override=device_blocks,
            kv_transfer_config={**KVBM, "kv_connector_extra_config": extra},  # pyright: ignore[reportArgumentType]
        ).create_engine_config()
        monkeypatch.setattr(VllmConfig, "use_v2_model_runner", property(lambda _: asynchronous))
        config.cache_config.block_size = BLOCK
        config.cache_config.kv_cache_layout = "LBHNC"
        config.scheduler_config.async_scheduling = asynchronous
        layers = config.model_config.get_total_num_hidden_layers()
        specs = []
        for stage in range(stages):
            own = range(*get_pp_indices(layers, stage, stages))
            spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
            specs += [{f"model.layers.{i}.attn": spec for i in own}] * shards
        configs = get_kv_cache_configs(config, specs, [1 << 20] * len(specs))
        for each in configs:
            each.kv_cache_layout = "LBHNC"
        config.cache_config.num_gpu_blocks = configs[0].num_blocks
        self.ranks = [Rank(config, each, rank) for rank, each in enumerate(configs)]
        self.shards = shards
        init_none_hash(sha256)
        self.scheduler = (AsyncScheduler if asynchronous else Scheduler)(
            vllm_config=config,
            kv_cache_config=generate_scheduler_kv_cache_config(configs),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            log_stats=True,
        )
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        connector: Any = self.scheduler.connector
        self.side = connector.scheduler_side
        self.leader = self.side.leader
        assert self.leader is not None
        self.aggregator = KVOutputAggregator.from_connector(connector, len(self.ranks))
        self.depth = config.max_concurrent_batches
        self.steps: deque[Step] = deque()
        self.truth: dict[str, list[int]] = {}
        self.finished: list[list[int]] = []
        self.counts = dict.fromkeys(("preempted", "aborted", "behind"), 0)

    def ask(self, id_: str, prompt: list[int], max_tokens: int) -> None:
        self.truth[id_] = list(prompt)
        self.scheduler.add_request(
            Request(
                id_,
                prompt,
                SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0),
                None,
                block_hasher=self._hasher,
            )
        )

    def abort(self) -> None:
        if self.scheduler.requests:
            self.counts["aborted"] += 1
            id_ = self.chance.choice(sorted(self.scheduler.requests))
            self.scheduler.finish_requests([id_], RequestStatus.FINISHED_ABORTED)

    @property
    def unfinished(self) -> bool:
        return bool(self.steps) or self.scheduler.has_requests()

    def move(self) -> bool:
        """One random thing that may happen next; False: nothing can."""
        moves = [rank for rank in self.ranks if self._may_run(rank)]
        choices: list[Any] = [*moves]
        if len(self.steps) < self.depth and self.scheduler.has_requests():
            choices += ["schedule"] * len(self.ranks)
        if self.steps and len(self.steps[0].done) == len(self.ranks):
            choices += ["receive"] * 2
        if not choices:
            return False
        chosen = self.chance.choice(choices)
        if chosen == "schedule":
            self._schedule()
        elif chosen == "receive":
            self._receive()
        else:
            step = self.steps[self._position(chosen)]
            # Copied, as on its way to another process: vLLM's empty output is one object.
            step.done[chosen.rank] = copy.deepcopy(chosen.run(step))
            done = [rank.steps for rank in self.ranks]
            self.counts["behind"] = max(self.counts["behind"], max(done) - min(done))
        return True

    def _position(self, rank: Rank) -> int:
        return sum(rank.rank in step.done for step in self.steps)

    def _may_run(self, rank: Rank) -> bool:
        position = self._position(rank)
        if position == len(self.steps):
            return False
        step = self.steps[position]
        before = range((rank.stage - 1) * self.shards, rank.stage * self.shards) if rank.stage else ()
        return not step.output.total_num_scheduled_tokens or all(other in step.done for other in before)

    def _schedule(self) -> None:
        output = self.scheduler.schedule()
        self.counts["preempted"] += len(output.preempted_req_ids or ())
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        step = Step(output, {}, starts, {})
        for id_, count in output.num_scheduled_tokens.items():
            truth, end = self.truth[id_], starts[id_] + count
            while len(truth) <= end:
                truth.append(next_token(truth))
            step.tokens[id_] = truth[:end]
            if not self.scheduler.requests[id_].is_prefill_chunk:
                step.emits[id_] = truth[end]
        self.steps.append(step)

    def _receive(self) -> None:
        step = self.steps.popleft()
        outputs: list[Any] = [step.done[rank.rank] for rank in self.ranks]
        joined: Any = self.aggregator.aggregate(outputs, output_rank=len(outputs) - self.shards)
        before = dict(self.scheduler.requests)
        self.scheduler.update_from_output(step.output, joined)
        for id_ in sorted(before.keys() - self.scheduler.requests.keys()):
            self.finished.append(list(before[id_].all_token_ids))
            assert self.finished[-1] == self.truth[id_][: len(self.finished[-1])]

    def close(self) -> None:
        for rank in self.ranks:
            rank.connector.shutdown()
        self.side.close()
        kv_transfer_state._KV_CONNECTOR_AGENT = None
