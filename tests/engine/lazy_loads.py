"""A CPU copy engine that copies by itself, as the CUDA one does, but lets itself be watched and broken.

`use_lazy_loads` puts it in place of `CpuCopyEngine`, in the process that is about to start an engine. In a
load inside a step the bytes of a layer move when its forward pass is about to run, and no earlier: until then
the blocks hold rubbish, so that whoever reads too early, or reads what is not loaded, says something else.
"""

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbm.transfer.arena import HostArena
from kvbm.transfer.copy import CpuCopyEngine, InStepLoad, Transfer
from kvbm.transfer.layout import KvLayout
from kvbm.transfer.pieces import PieceTable

RUBBISH = 0x5A  # as float32: 1.5e16


class Copying(Transfer):
    """Any other copy: a thread stands for the device."""

    def __init__(self, copy: Callable[..., None], *args: Any) -> None:
        self._thread = threading.Thread(target=copy, args=args, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()


class LazyCopyEngine(CpuCopyEngine):
    copies_by_itself = True

    def __init__(self, layout: KvLayout, arena: HostArena) -> None:
        super().__init__(layout, arena)
        self.layout = layout
        self.arena = arena
        self.table = PieceTable(layout)
        self.seen: Counter[str] = Counter()
        self.layers_seen: list[str] = []
        # faults
        self.skipped_layer = ""
        self.deaf = False  # before_layer does nothing
        self.raises_at: set[str] = set()  # "start", or the name of a layer
        self.never_over = False  # the copy ends later than the step, as on a GPU

    def start_offload(self, device_blocks: Any, host_slots: Any, after: object = None) -> Transfer:
        return Copying(self.offload, device_blocks, host_slots, after)

    def start_onboard(self, device_blocks: Any, host_slots: Any, after: object = None) -> Transfer:
        return Copying(self.onboard, device_blocks, host_slots, after)

    def start_in_step(
        self, device_blocks: NDArray[np.integer], host_slots: NDArray[np.integer]
    ) -> InStepLoad:
        self.seen["in step"] += 1
        self.seen["early"] += not in_forward_pass()
        self.seen["blocks in step"] += len(host_slots)
        if "start" in self.raises_at:
            self.fill(device_blocks)
            raise OSError("injected")
        return LazyLoad(self, device_blocks.tolist(), host_slots.tolist())

    def onboard(self, device_blocks: Any, host_slots: Any, after: object = None) -> None:
        self.seen["waiting"] += 1
        super().onboard(device_blocks, host_slots, after)

    def move(self, span: tuple[int, int], blocks: list[int], slots: list[int]) -> None:
        """Pieces span[0] .. span[1]-1 of the blocks."""
        for piece in range(*span):
            size, offset = int(self.table.size[piece]), int(self.table.offset[piece])
            for block, slot in zip(blocks, slots, strict=True):
                record = self.arena.address + slot * self.arena.slot_bytes
                ctypes.memmove(self.address(piece, block), record + offset, size)

    def fill(self, blocks: Any) -> None:
        for piece in range(len(self.table)):
            for block in blocks:
                ctypes.memset(self.address(piece, int(block)), RUBBISH, int(self.table.size[piece]))

    def address(self, piece: int, block: int) -> int:
        return int(self.table.address[piece] + block * self.table.block_stride[piece])


class LazyLoad(InStepLoad):
    def __init__(self, engine: LazyCopyEngine, blocks: list[int], slots: list[int]) -> None:
        self._engine = engine
        self._blocks = blocks
        self._slots = slots
        self._missing = set(engine.layout.layers.values())
        engine.fill(blocks)

    def before_layer(self, name: str) -> None:
        engine = self._engine
        engine.layers_seen.append(name)
        if name in engine.raises_at:
            raise OSError("injected")
        span = engine.layout.layers[name]
        if not engine.deaf and name != engine.skipped_layer and span in self._missing:
            engine.seen["layers on time"] += 1
            self._move(span)

    def before_all(self) -> None:
        engine = self._engine
        engine.seen["calls for all"] += 1
        for span in sorted(self._missing):
            if span != engine.layout.layers.get(engine.skipped_layer):
                engine.seen["layers at the end"] += 1
                self._move(span)

    def _move(self, span: tuple[int, int]) -> None:
        self._missing.discard(span)
        self._engine.move(span, self._blocks, self._slots)

    @property
    def is_over(self) -> bool:
        skipped = self._engine.layout.layers.get(self._engine.skipped_layer)
        return not self._engine.never_over and self._missing <= {skipped}


def in_forward_pass() -> bool:
    from vllm.forward_context import is_forward_context_available

    return is_forward_context_available()


def use_lazy_loads() -> None:
    from kvbm.runtime import rank

    module: Any = rank
    module.CpuCopyEngine = LazyCopyEngine


def use_lazy_loads_as_of_many_ranks() -> None:
    """The scheduler's process has no rank: no load is started before its step."""
    from kvbm.vllm_integration import compat

    use_lazy_loads()
    module: Any = compat
    module.connector_of_worker = lambda: None


# ---- scenarios; the first argument is the `vllm.LLM`


def engine(llm: Any) -> LazyCopyEngine:
    from tests.engine.scenarios import copy_engine

    found = copy_engine(llm)
    assert isinstance(found, LazyCopyEngine)
    return found


def watch(llm: Any) -> None:
    """Count from zero."""
    engine(llm).seen.clear()
    engine(llm).layers_seen.clear()


def watched(llm: Any) -> Counter[str]:
    return engine(llm).seen


def layers_seen(llm: Any) -> list[str]:
    return engine(llm).layers_seen


def layer_names(llm: Any) -> list[str]:
    return list(engine(llm).layout.layers)


def break_loads(llm: Any, faults: dict[str, Any]) -> None:
    """Set the attributes of `LazyCopyEngine` that are named."""
    for name, value in faults.items():
        assert hasattr(engine(llm), name)
        setattr(engine(llm), name, value)


def as_one_graph(llm: Any) -> None:
    """Say of forward passes that they are one CUDA graph, in which nobody calls the connector."""
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group

    connector: Any = get_kv_transfer_group()
    side = connector.worker_side
    connector.start_load_kv = lambda *_, **__: side.start_loads(by_layer=False)
    connector.wait_for_layer_load = lambda _: None


def mend(llm: Any) -> None:
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group

    for hook in ("start_load_kv", "wait_for_layer_load"):
        vars(get_kv_transfer_group()).pop(hook, None)
    break_loads(llm, {"skipped_layer": "", "deaf": False, "raises_at": set(), "never_over": False})
