"""A small TensorRT-LLM: its executor's loop in the order of its calls, with a model that forgives nothing.

A token's KV is a digest of the token, the adapter and the KV before it, the next token one of all KV bytes of
the prefix, on all ranks. So one wrong byte changes what is said. Device blocks that are given out hold noise.
"""

import hashlib
import importlib
import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

LAYERS, BLOCK, WIDTH = 2, 4, 8  # width: bytes of a token in one half of a layer
VOCABULARY = 997


@dataclass
class Request:
    """What a connector sees of a request is `handle`."""

    request_id: int
    tokens: list[int]
    max_new: int
    salt: str | None = None
    adapter: int | None = None
    priority: int | None = None
    prompt: int = 0
    known: int = 0  # tokens that the executor has seen; later ones are still in flight
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    reported_blocks: int = 0
    reported_tokens: int = 0
    reported: bool = False
    matched: int = 0
    cancelled: bool = False

    @property
    def handle(self) -> Any:
        return SimpleNamespace(
            request_id=self.request_id,
            get_tokens=lambda beam: self.tokens[: self.known],
            cache_salt=self.salt,
            lora_task_id=self.adapter,
        )

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt : self.prompt + self.max_new]


class Executor:
    """llm_args: None for an engine without connector. chunk: tokens of a prompt computed in a step.

    reuse: whether the device finds its own blocks again. overlap: a step is planned before the tokens of the
    one before it are known. grouped: the KV cache is described by layer groups.
    """

    def __init__(
        self,
        here: Any,
        llm_args: Any | None,
        *,
        ranks: int = 1,
        num_blocks: int = 64,
        chunk: int = 1 << 30,
        reuse: bool = False,
        overlap: bool = False,
        grouped: bool = False,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self._here = here
        self._chunk, self._reuse, self._overlap, self._grouped = chunk, reuse, overlap, grouped
        self.kv = [
            torch.zeros((num_blocks, LAYERS, 2, BLOCK * WIDTH), dtype=torch.uint8) for _ in range(ranks)
        ]
        self._noise = np.random.default_rng(0)
        self.free = list(range(num_blocks))
        self._cached: dict[tuple[Any, ...], int] = {}  # prefix to device block
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._loading: dict[int, Request] = {}
        self._saving: dict[int, Request] = {}
        self._new_loading: list[int] = []
        self._new_saving: list[int] = []
        self._done: list[tuple[set[int], set[int]]] = [(set(), set()) for _ in range(ranks)]
        self.finished: list[Request] = []
        self._ids = 0
        self.leader: Any = None
        self.workers: list[Any] = []
        if llm_args is not None:
            module = importlib.import_module("kvbm.trtllm_integration.connector")
            here.rank = 0
            self.leader = module.DynamoKVBMConnectorLeader(llm_args)
            for rank in range(ranks):
                here.rank = rank
                worker = module.DynamoKVBMConnectorWorker(llm_args)
                self.workers.append(worker)
                if grouped:
                    worker.register_kv_cache_layout(layout_of(self.kv[rank]))
                else:
                    worker.register_kv_caches(self.kv[rank])

    # ---- what users do ----

    def add(self, prompt: Sequence[int], max_new: int = 4, **more: Any) -> Request:
        self._ids += 1
        request = Request(self._ids, list(prompt), max_new, prompt=len(prompt), known=len(prompt), **more)
        self.waiting.append(request)
        return request

    def run(self, steps: int = 20000) -> None:
        """Until all requests have ended and their blocks are free."""
        for _ in range(steps):
            if not (self.waiting or self.running or self._loading or self._saving):
                return
            self.step()
        raise AssertionError("requests are stuck")

    def generate(self, prompt: Sequence[int], max_new: int = 4, **more: Any) -> list[int]:
        request = self.add(prompt, max_new, **more)
        self.run()
        return request.output

    def cancel(self, request: Request) -> None:
        request.cancelled = True

    def forget(self) -> None:
        """The device forgets what it could find again."""
        self._cached.clear()

    def close(self) -> None:
        for worker in self.workers:
            worker.side.close()
        if self.leader is not None:
            self.leader.side.close()

    # ---- the loop ----

    def step(self) -> None:
        self._end_cancelled()
        batch = self._schedule()
        if batch:
            batch = self._prepare(batch)
        if batch:
            self._forward(batch)
            for request in list(batch):
                seen = len(request.tokens) - (
                    1 if self._overlap and request.computed >= request.prompt else 0
                )
                request.known = max(request.known, seen)
                if request.known >= request.prompt + request.max_new:
                    self._end(request)
        self._poll()

    def _end_cancelled(self) -> None:
        self.waiting = [request for request in self.waiting if not request.cancelled]
        for request in [*self.running, *self._loading.values()]:
            if request.cancelled and request.request_id not in self._saving:
                self._end(request)

    def _schedule(self) -> list[Request]:
        batch = list(self.running)
        for request in list(self.waiting):
            need = -(-(request.prompt + request.max_new + 1) // BLOCK)
            promised = sum(
                -(-(other.prompt + other.max_new + 1) // BLOCK) - len(other.blocks)
                for other in (*self.running, *self._loading.values())
            )
            if len(self.free) - promised < need:
                break
            self.waiting.remove(request)
            self.running.append(request)
            batch.append(request)
        return batch

    def _prepare(self, batch: list[Request]) -> list[Request]:
        module = importlib.import_module("kvbm.trtllm_integration.compat").interface()
        output = module.SchedulerOutput()
        for request in batch:
            if not request.blocks:
                self._admit(request)
            else:
                self._grow(request)
        for request in batch:
            if request.request_id in self._new_loading:
                continue
            generates = request.computed >= request.prompt
            tokens = request.tokens[: request.known]
            new_blocks = request.blocks[request.reported_blocks :]
            data = module.RequestData(
                request.request_id,
                tokens[request.reported_tokens :],
                new_blocks,
                len(tokens) - 1 if generates else request.computed,
                1 if generates else min(self._chunk, request.prompt - request.computed),
            )
            if request.priority is not None:
                data.priorities = [request.priority] * len(new_blocks)
            request.reported_blocks, request.reported_tokens = len(request.blocks), len(tokens)
            (output.cached_requests if request.reported else output.new_requests).append(data)
            request.reported = True
        for id_ in self._new_loading:
            request = next(other for other in batch if other.request_id == id_)
            self.running.remove(request)
            self._loading[id_] = request
        if self.leader is not None:
            self.calls["build_connector_meta"] += 1
            metadata = self.leader.build_connector_meta(output)
            assert metadata
            wire = pickle.dumps(metadata)
            for worker in self.workers:
                worker.bind_connector_meta(pickle.loads(wire))
            for worker in self.workers:
                self.calls["start_load_kv"] += 1
                worker.start_load_kv(None)
        return [request for request in batch if request.request_id not in self._new_loading]

    def _admit(self, request: Request) -> None:
        computed = 0
        if self._reuse:
            while computed + BLOCK < request.prompt:
                found = self._cached.get(self._key(request, computed + BLOCK))
                if found is None or found not in self.free:
                    break
                self.free.remove(found)
                request.blocks.append(found)
                computed += BLOCK
        matched = 0
        if self.leader is not None:
            self.calls["get_num_new_matched_tokens"] += 1
            matched, waits = self.leader.get_num_new_matched_tokens(request.handle, computed)
            assert waits or not matched
            assert matched or not waits
            if waits:
                self._new_loading.append(request.request_id)
        request.matched = matched
        request.computed = computed + matched
        assert request.computed < request.prompt
        while len(request.blocks) * BLOCK < request.prompt:
            self._take_block(request)
        if self.leader is not None:
            self.calls["update_state_after_alloc"] += 1
            self.leader.update_state_after_alloc(request.handle, list(request.blocks))

    def _grow(self, request: Request) -> None:
        while len(request.blocks) * BLOCK < len(request.tokens):
            self._take_block(request)

    def _take_block(self, request: Request) -> None:
        block = self.free.pop(0)
        self._cached = {key: other for key, other in self._cached.items() if other != block}
        for kv in self.kv:
            kv[block] = torch.from_numpy(self._noise.integers(0, 256, kv[block].shape, np.uint8))
        request.blocks.append(block)

    # ---- the model ----

    def _forward(self, batch: list[Request]) -> None:
        for rank, kv in enumerate(self.kv):
            for layer in range(LAYERS):
                if self.workers:
                    self.calls["wait_for_layer_load"] += 1
                    self.workers[rank].wait_for_layer_load(layer, None)
            for request in batch:
                for position in range(request.computed, self._until(request)):
                    self._compute(kv, rank, request, position)
            for layer in range(LAYERS):
                if self.workers:
                    self.calls["save_kv_layer"] += 1
                    self.workers[rank].save_kv_layer(layer, None)
            if self.workers:
                self.calls["wait_for_save"] += 1
                self.workers[rank].wait_for_save(None)
        for request in batch:
            request.computed = self._until(request)
            if request.computed == len(request.tokens):
                request.tokens.append(self._next_token(request))

    def _until(self, request: Request) -> int:
        end = len(request.tokens)
        return min(end, request.computed + self._chunk) if request.computed < request.prompt else end

    @staticmethod
    def _at(kv: torch.Tensor, request: Request, position: int) -> np.ndarray:
        """View of a token's KV: layers, K and V, bytes."""
        at = position % BLOCK * WIDTH
        return kv[request.blocks[position // BLOCK], :, :, at : at + WIDTH].numpy()

    def _compute(self, kv: torch.Tensor, rank: int, request: Request, position: int) -> None:
        before = self._at(kv, request, position - 1).tobytes() if position else b""
        seed = f"{rank} {request.tokens[position]} {request.adapter}".encode()
        value = hashlib.shake_128(before + seed).digest(LAYERS * 2 * WIDTH)
        self._at(kv, request, position)[:] = np.frombuffer(value, np.uint8).reshape(LAYERS, 2, WIDTH)

    def _next_token(self, request: Request) -> int:
        digest = hashlib.blake2b()
        for kv in self.kv:
            for position in range(request.computed):
                digest.update(self._at(kv, request, position).tobytes())
        return int.from_bytes(digest.digest()[:4], "little") % VOCABULARY

    # ---- ends ----

    @staticmethod
    def _key(request: Request, end: int) -> tuple[Any, ...]:
        return (request.salt, request.adapter, *request.tokens[:end])

    def _end(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
        self.finished.append(request)
        saving = False
        if self.leader is not None and request.blocks:
            self.calls["request_finished"] += 1
            saving = self.leader.request_finished(request.handle, list(request.blocks))
        if saving:
            self._saving[request.request_id] = request
            self._new_saving.append(request.request_id)
        else:
            assert request.request_id not in self._loading, "blocks are freed that a load writes to"
            self._free(request)

    def _free(self, request: Request) -> None:
        if self._reuse:
            for end in range(BLOCK, min(request.computed, len(request.tokens)) + 1, BLOCK):
                self._cached.setdefault(self._key(request, end), request.blocks[end // BLOCK - 1])
        self.free += request.blocks
        request.blocks = []

    def _poll(self) -> None:
        if self.leader is None:
            return
        saving, self._new_saving = self._new_saving, []
        loading, self._new_loading = self._new_loading, []
        for rank, worker in enumerate(self.workers):
            self.calls["get_finished"] += 1
            saved, loaded = worker.get_finished(list(saving), list(loading))
            own = self._done[rank]
            assert not own[0] & set(saved)
            assert not own[1] & set(loaded)
            assert set(saved) <= set(self._saving), "an id that was not given"
            assert set(loaded) <= set(self._loading), "an id that was not given"
            own[0].update(saved)
            own[1].update(loaded)
        for id_ in set.intersection(*(own[1] for own in self._done)):
            request = self._loading.pop(id_)
            if id_ not in self._saving:
                self.running.append(request)
        for id_ in set.intersection(*(own[0] for own in self._done)):
            request = self._saving.pop(id_)
            assert id_ not in self._loading, "blocks are freed that a load writes to"
            self._free(request)
        everywhere = [set.intersection(*(own[kind] for own in self._done)) for kind in (0, 1)]
        for own in self._done:
            own[0].difference_update(everywhere[0])
            own[1].difference_update(everywhere[1])


def layout_of(kv: torch.Tensor, **changes: Any) -> Any:
    """A KV cache as one layer group with a region for each layer."""
    regions = []
    for layer in range(kv.shape[1]):
        part = kv.view(kv.shape[0], kv.shape[1], -1)[:, layer]
        regions.append(
            SimpleNamespace(
                base=part.data_ptr(),
                size=part.shape[1],
                stride=part.stride(0),
                num_slots=kv.shape[0],
                buffers=(SimpleNamespace(layer_id=layer, role="key", expansion=1),),
                as_tensor=lambda part=part: part,
            )
        )
    group = {
        "layer_group_id": 0,
        "layer_ids": tuple(range(kv.shape[1])),
        "window_size": None,
        "regions": tuple(regions),
        "replicated_regions": (),
    }
    return SimpleNamespace(
        tokens_per_block=BLOCK, groups=(SimpleNamespace(**{**group, **changes}),), gpu_pool_mapping_bytes=None
    )
