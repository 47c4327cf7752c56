"""KVBM between SGLang's device pages and its own tiers, without SGLang's host pool (SGLang 0.5.23).

    --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic
    --unified-cache-external-linker-config '{"linker": "KvbmLinker",
      "linker_module_path": "kvbm.sglang_integration.linker",
      "linker_extra_config": {"kvbm": {"host": {"cache_gb": 100}}}}'

SGLang aborts the requests of a load that fails, so what is promised is held: `lookup` answers with blocks
that lie intact in host memory and pins them for the request. What the disk has of a prompt is brought to
host memory meanwhile, for whoever asks next. All ranks are called alike and must answer `load` and `offload`
alike: these answers depend on the calls alone, never on a rank's own memory, disk or time.
"""

import contextlib
import functools
import itertools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker

from kvbm.errors import LayoutError
from kvbm.logic.fetch import NO_SLOTS
from kvbm.logic.hashing import Hashes
from kvbm.logic.index import Slots
from kvbm.logic.operations import Direction, Operation
from kvbm.runtime.block_store import BlockStore, StatsLog
from kvbm.runtime.rank import make_copy_engine
from kvbm.runtime.worker import Worker
from kvbm.sglang_integration import compat
from kvbm.sglang_integration.events import publish_events
from kvbm.sglang_integration.exchange import page_namespace
from kvbm.sglang_integration.identity import Place, engine_namespace, hashes_of, read_config
from kvbm.sglang_integration.weights import weight_watch
from kvbm.transfer.arena import HostArena
from kvbm.transfer.calibration import Method
from kvbm.transfer.copy import CopyEngine, InStepLoad
from kvbm.transfer.layout import KvLayout, recognise, tensor_view
from kvbm.transfer.proof import prove

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# Requests whose blocks are held from `lookup` on. SGLang does not tell of those that it gives up.
_MAX_HELD = 256
_WAIT_S = 5e-5


def _or_else(default: Any) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """An error of ours turns caching off and counts as `default`."""

    def decorate(method: Callable[..., _T]) -> Callable[..., _T]:
        @functools.wraps(method)
        def guarded(self: "KvbmLinker", *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception:
                logger.exception("KVBM: internal error in %s; caching is off from here on", method.__name__)
                self._off = True
                return default() if callable(default) else default

        return guarded

    return decorate


@dataclass(slots=True)
class _Held:
    """What a lookup has found for a request."""

    hashes: Hashes
    slots: Slots


@dataclass(slots=True)
class _Offload:
    slots: Slots = field(default_factory=lambda: NO_SLOTS)  # all that it holds
    new: Slots = field(default_factory=lambda: NO_SLOTS)  # to be written
    whole: bool = False  # there was room for all
    done: bool = False
    succeeded: bool = False


class _Load:
    """Of a batch, for all its requests together: its first layers can run when their part has arrived."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots  # pinned; requests may share some
        self.copy: InStepLoad | None = None  # that the device orders before the layers
        self.waited_for = False  # threads of ours carry it out
        self.failed = False


class _LayerCounter:
    """What SGLang's KV pool asks before it uses a layer of the batch that runs."""

    def __init__(self, before_layer: Callable[[int, int], None]) -> None:
        self.consumer_index = -1
        self._before_layer = before_layer

    def set_consumer(self, index: int) -> None:
        self.consumer_index = index

    def wait_until(self, threshold: int) -> None:
        if self.consumer_index >= 0:
            self._before_layer(self.consumer_index, threshold)


class KvbmLinker(UnifiedCacheLinker):
    """See the module. All calls from the scheduler's thread, in which SGLang also runs the model.

    Raises KvbmError at start, for a user's mistakes, and only then. A model that it can't keep is not cached.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
        **_: Any,  # of later versions
    ) -> None:
        config, kv_events = read_config(extra_config or {})
        kv_cache = params.token_to_kv_pool_allocator.get_kvcache()
        self.forward_stream = forward_stream
        self.layer_done_counter = _LayerCounter(self._before_layer)
        self.pools = {PoolName.KV: kv_cache}
        self._page_size = int(params.page_size)
        self._timeout_s = config.transfer.timeout_s
        self._ids = itertools.count()
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._queued: dict[str, tuple[Slots, NDArray[np.int64]]] = {}
        self._loads: dict[int, _Load] = {}
        self._offloads: deque[_Offload] = deque()
        self._by_operation: dict[int, _Offload | _Load] = {}
        self._end_events: Callable[[], None] | None = None
        self._refused = True  # the same on all ranks
        self._off = False
        try:
            tensors = _page_tensors(kv_cache, self._page_size, components, server_args)
            layout = _layout(tensors)
        except LayoutError as error:
            logger.warning("KVBM: nothing is cached: %s", error)
            return
        place = _place(params)
        facts = {
            "tensors": [
                [name, str(tensor.dtype), list(tensor.shape[1:])] for name, tensor in tensors.items()
            ],
            "type": type(kv_cache).__name__,
            "layers": [str(getattr(kv_cache, name, None)) for name in ("start_layer", "end_layer")],
        }
        first = next(iter(tensors.values()))
        device = first.device
        exchanged: bytes | None = None
        if config.disk.exchange:  # these records have that form: layers, keys and values, tokens, heads
            exchanged = page_namespace(first.dtype, len(tensors) // 2, tuple(first.shape[1:]), place)
        wanted = config.transfer.copy_method
        checksum = config.host.checksum

        def make_engine(arena: HostArena) -> CopyEngine:
            engine = make_copy_engine(layout, arena, device, None if wanted == "auto" else Method(wanted))
            prove(tensors, layout, engine, arena)
            return engine

        self._store = BlockStore(
            config,
            layout.record_bytes,
            make_engine,
            namespace=exchanged
            or engine_namespace(str(getattr(server_args, "model_path", "")), facts, place),
            checksum=device.type == "cpu" if checksum is None else checksum,
            rank=place.rank,
            ranks=place.ranks,
            replica=place.replica,
        )
        self._worker = Worker(self._store.records)
        self._log = StatsLog(self._store, config.observe.log_interval_s)
        self._names = [(f"{layer}.k", f"{layer}.v") for layer in range(len(tensors) // 2)]
        weight_watch.add(self)
        if kv_events is not None and place.rank == 0:
            self._end_events = publish_events(
                self._store, kv_events, page_size=self._page_size, dp_rank=place.replica
            )
        self._refused = False
        logger.info(
            "KVBM: rank %d of %d keeps %d pages of %d bytes in host memory",
            *(place.rank, place.ranks, self._store.pool.capacity, layout.record_bytes),
        )

    # ---- loads ----

    @_or_else(list)
    def lookup(self, rid: str, transfers: Sequence[Any]) -> list[int]:
        if self._refused or self._off or weight_watch.changing:
            return []
        hashes = hashes_of(_of_kv(transfers).keys)
        self._let_go(rid)
        slots = self._store.match(hashes, wait=False)
        self._held[rid] = _Held(hashes[: len(slots)], slots)  # also none: every rank counts the same requests
        if len(self._held) > _MAX_HELD:
            self._let_go(next(iter(self._held)))
        return list(range(1, len(slots) + 1))

    @_or_else(False)
    def load(self, rid: str, transfers: Sequence[Any]) -> bool:
        transfer = _of_kv(transfers)
        held = self._held.get(rid)
        if held is None or rid in self._queued:
            return False
        wanted = hashes_of(transfer.keys)
        count = len(wanted)
        if count > len(held.slots) or not np.array_equal(wanted, held.hashes[:count]):
            return False
        self._queued[rid] = held.slots[:count], self._pages(transfer)
        self._held[rid] = _Held(held.hashes[count:], held.slots[count:])
        self._let_go(rid)
        return True

    @_or_else(False)
    def cancel_queued_load(self, rid: str) -> bool:
        queued = self._queued.pop(rid, None)
        if queued is None:
            return False
        self._store.release(queued[0])
        return True

    def start_layer_wise_loading(self) -> int:
        queued, self._queued = self._queued, {}
        if not queued:
            return -1
        slots, pages = (np.concatenate(parts) for parts in zip(*queued.values(), strict=True))
        index = next(self._ids)
        load = self._loads[index] = _Load(slots)
        operation = Operation(
            index,
            Direction.ONBOARD,
            "",
            pages.astype(np.int32),
            slots.astype(np.int32),
            self._timeout_s,
        )
        try:
            with self._behind_forward():
                if self._worker.loads_in_step:
                    [load.copy] = self._worker.start_in_step([operation])
                else:
                    self._worker.submit([operation])
                    self._by_operation[index] = load
                    load.waited_for = True
        except Exception:  # LostLoadError, too: SGLang aborts these requests after the forward pass
            logger.exception("KVBM: a load could not be started")
            load.failed = True
        return index

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        load = self._loads.pop(counter_index, None)
        if load is None:
            return counter_index < 0
        while load.waited_for or not (load.copy is None or load.copy.is_over):
            self._poll()
            time.sleep(_WAIT_S)
        (self._store.release if load.failed else self._store.loaded)(load.slots)
        return not load.failed

    def _before_layer(self, index: int, layer: int) -> None:
        """In the forward pass, before a layer's pages are used. Raises nothing: see `finish_...`."""
        load = self._loads.get(index)
        if load is None:
            return
        try:
            if load.copy is not None:
                for name in self._names[layer]:
                    load.copy.before_layer(name)
            while load.waited_for and not load.failed:
                self._poll()
                time.sleep(_WAIT_S)
        except Exception:
            logger.exception("KVBM: a load failed")
            load.failed = True

    # ---- offloads ----

    def offload(self, transfers: Sequence[Any], session_id: str | None = None) -> bool:
        if self._refused:
            return False
        task = _Offload()
        self._offloads.append(task)
        try:
            self._start_offload(task, _of_kv(transfers))
        except Exception:
            logger.exception("KVBM: an offload could not be started")
            self._end_offload(task, failed=True)
        return True

    def _start_offload(self, task: _Offload, transfer: Any) -> None:
        pages = self._pages(transfer)
        slots, is_new = self._store.claim(hashes_of(transfer.keys))
        task.slots = slots[slots >= 0]
        new = np.flatnonzero(is_new)
        task.new = slots[new]
        task.whole = len(task.slots) == len(slots)
        if not len(new) or self._off or weight_watch.changing:
            self._end_offload(task, failed=len(new) > 0)
            return
        operation = Operation(
            next(self._ids),
            Direction.OFFLOAD,
            "",
            pages[new].astype(np.int32),
            slots[new].astype(np.int32),
            self._timeout_s,
        )
        self._by_operation[operation.id] = task
        with self._behind_forward():
            self._worker.submit([operation])

    @_or_else(0)
    def num_completed_offloads(self) -> int:
        if self._refused:
            return 0
        self._poll()
        self._log.tick()
        return sum(1 for _ in itertools.takewhile(lambda task: task.done, self._offloads))

    def pop_completed_offload(self) -> bool:
        return self._offloads.popleft().succeeded

    # ---- life ----

    @_or_else(None)
    def reset(self) -> None:
        """SGLang forgets its own blocks; those here stay, as their names say all that they depend on."""
        end = time.monotonic() + self._timeout_s
        for index in list(self._loads):
            self.finish_layer_wise_loading(index)
        while not all(task.done for task in self._offloads) and time.monotonic() < end:
            self._poll()
            time.sleep(_WAIT_S)
        self._offloads.clear()
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        for rid in list(self._held):
            self._let_go(rid)
        self.layer_done_counter.consumer_index = -1
        weight_watch.flushed()

    def clear(self) -> None:
        """The weights have changed."""
        for rid in list(self._held):
            self._let_go(rid)
        self._store.clear()

    def close(self) -> None:
        if self._refused:
            return
        self.reset()
        self._refused = True
        if self._end_events is not None:
            self._end_events()
        self._store.close(give_back=self._worker.close())

    # ---- inside ----

    def _poll(self) -> None:
        for completion in self._worker.poll():
            owner = self._by_operation.get(completion.operation_id)
            if completion.quiesced:
                self._by_operation.pop(completion.operation_id, None)
            failed = len(completion.failed) > 0
            if isinstance(owner, _Load):
                owner.failed |= failed
                if completion.quiesced:
                    owner.waited_for = False
            elif owner is not None:
                self._end_offload(owner, failed, completion.quiesced)

    def _end_offload(self, task: _Offload, failed: bool, quiesced: bool = True) -> None:
        if not task.done:
            task.done = True
            task.succeeded = task.whole and not failed
            if not failed:
                self._store.register(task.new)
        if quiesced:  # not before: a late copy would write into another block's memory
            self._store.release(task.slots)

    def _let_go(self, rid: str) -> None:
        held = self._held.pop(rid, None)
        if held is not None:
            self._store.release(held.slots)

    def _pages(self, transfer: Any) -> NDArray[np.int64]:
        """Pages of the device's tensors from SGLang's token slots."""
        firsts = transfer.device_indices[:: self._page_size].cpu().numpy()
        if len(firsts) != len(transfer.keys) or (firsts % self._page_size).any():
            raise LayoutError("SGLang's pages are not aligned, or not as many as their keys")
        return firsts // self._page_size

    def _behind_forward(self) -> contextlib.AbstractContextManager[Any]:
        """What is started in here comes behind what SGLang has given the device to do."""
        stream = self.forward_stream
        return (
            torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else contextlib.nullcontext()
        )


def _of_kv(transfers: Sequence[Any]) -> Any:
    if len(transfers) != 1 or transfers[0].name != PoolName.KV:
        raise LayoutError("a transfer of other pools than that of the KV")
    return transfers[0]


def _page_tensors(kv_cache: Any, page_size: int, components: set[Any], args: Any) -> dict[str, torch.Tensor]:
    """Keys and values of each layer as (pages, tokens of a page, ...); LayoutError for what is not kept."""
    if {component.name for component in components} != {"FULL"}:
        raise LayoutError("the model has state beside full attention")
    if getattr(args, "speculative_algorithm", None):
        raise LayoutError("speculative decoding has KV of a draft model, which is not kept")
    if type(kv_cache).__name__ != "MHATokenToKVPool":
        raise LayoutError(f"KV of SGLang's {type(kv_cache).__name__} is not known")
    tensors = {}
    for layer, pair in enumerate(zip(kv_cache.k_buffer, kv_cache.v_buffer, strict=True)):
        for which, tensor in zip("kv", pair, strict=True):
            if tensor.shape[0] % page_size:
                raise LayoutError(f"{tensor.shape[0]} slots are not whole pages of {page_size} tokens")
            tensors[f"{layer}.{which}"] = tensor.unflatten(0, (-1, page_size))
    return tensors


def _layout(tensors: dict[str, torch.Tensor]) -> KvLayout:
    pages = next(iter(tensors.values())).shape[0]
    size = sum(tensor.nbytes for tensor in tensors.values()) // pages
    return recognise((tensor_view(name, tensor) for name, tensor in tensors.items()), pages, size)


def _place(params: Any) -> Place:
    tp_rank, tp_size = 0, 1
    group = getattr(params, "attn_tp_cache_group", None) or getattr(params, "tp_cache_group", None)
    if group is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        tp_rank, tp_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    pp_rank, pp_size = int(params.pp_rank), int(params.pp_size)
    cp_rank, cp_size = int(params.attn_cp_rank), int(params.attn_cp_size)
    return Place(
        (pp_rank * cp_size + cp_rank) * tp_size + tp_rank, pp_size * cp_size * tp_size, compat.replica()
    )
