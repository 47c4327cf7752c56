"""An older SGLang's HiCache controller, host pool and storage threads with KVBM behind them, in a process of
its own (two versions of a package don't fit in one): see test_older.py.

Nothing is copied between device and host pool, and no tree or scheduler is there: pages are written into the
host pool, stored, overwritten and brought back. The report is JSON on the last line.
"""

import contextlib
import functools
import hashlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import sgl_kernel
import torch
import transformers

PAGE, LAYERS, HEADS, HEAD, SIZE = 16, 2, 2, 8, 512
POOLS = (("page_first", True), ("layer_first", False))
END = time.monotonic() + 90  # of the process, which must not hang a test
Tokens = list[int]


def prepare() -> None:
    """What those versions need that are older than what they find installed here."""
    kernels: Any = ModuleType("sgl_kernel.kvcacheio")
    kernels.__getattr__ = sgl_kernel.__getattr__
    sys.modules["sgl_kernel.kvcacheio"] = kernels
    configs: Any = transformers.AutoConfig
    register = configs.register
    # transformers has some of their models by now
    configs.register = lambda name, config, exist_ok=False: register(name, config, exist_ok=True)
    memory = psutil.virtual_memory
    psutil.virtual_memory = lambda: memory()._replace(available=1 << 40)  # 10 GB must be left free


def start_ranks() -> tuple[Any, Any]:
    """One rank, in real groups: that of tensor parallelism, and what has to live as long as they do."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", device="cpu"))
    parallel_state.init_distributed_environment(
        1, 0, distributed_init_method=f"file://{sys.argv[1]}/ranks", local_rank=0, backend="gloo"
    )
    parallel_state.initialize_model_parallel(backend="gloo")
    place = None
    try:  # 0.5.18 and later ask this instead of the groups
        from sglang.srt.runtime_context import get_parallel

        place = get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
        place.__enter__()
    except (ImportError, AttributeError):
        pass
    return parallel_state.get_tp_group().cpu_group, place


class Controller:
    """SGLang's, with KVBM as its backend and an empty host pool."""

    def __init__(self, group: Any, layout: str, zero_copy: bool, kvbm: dict[str, Any]) -> None:
        from sglang.srt.managers.cache_controller import HiCacheController
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        try:
            from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # 0.5.18 and later
        except ImportError:
            from sglang.srt.mem_cache.memory_pool_host import MHATokenToKVPoolHost

        device = MHATokenToKVPool(
            SIZE, PAGE, torch.float32, HEADS, HEAD, LAYERS, "cpu", False, start_layer=0, end_layer=LAYERS - 1
        )
        self.pool = MHATokenToKVPoolHost(device, 2.0, 0, PAGE, layout, pin_memory=False)
        self.controller = HiCacheController(
            SimpleNamespace(get_kvcache=lambda: device),
            self.pool,
            PAGE,
            group,
            threading.Event(),
            write_policy="write_through",
            io_backend="kernel",
            storage_backend="dynamic",
            prefetch_threshold=PAGE,
            model_name="dummy",
            storage_backend_extra_config={
                "backend_name": "kvbm",
                "module_path": "kvbm.sglang_integration.hicache",
                "class_name": "KvbmStorage",
                "kvbm": kvbm,
                **({"interface_v1": 1} if zero_copy else {}),
            },
        )
        assert self.backend._store.wait_found(20)

    @property
    def backend(self) -> Any:
        return self.controller.storage_backend

    def store(self, tokens: Tokens) -> int:
        """How many pages SGLang takes for stored."""
        slots = self._slots(tokens)
        for page, content in enumerate(_contents(tokens)):
            self.pool.set_from_flat_data_page(
                int(slots[page * PAGE]), content.view(self.pool.get_dummy_flat_data_page().dtype)
            )
        self.controller.write_storage(slots, tokens, self.keys(tokens))
        done = self.controller.ack_backup_queue.get(timeout=20)
        self.pool.free(slots)
        return done.completed_tokens // PAGE

    def load(self, tokens: Tokens) -> int:
        """How many leading pages come back, with the bytes that were stored."""
        self.pool.kv_buffer.fill_(-1)
        slots = self._slots(tokens)
        controller = self.controller
        if hasattr(controller, "prefetch_hit_queue"):  # 0.5.18 and later: allocated when hits are known
            operation = controller.prefetch("request", tokens)
            operation = controller.prefetch_hit_queue.get(timeout=20)
            if not operation.hash_value:
                self.pool.free(slots)
                return 0
            operation.host_indices = slots[: len(operation.hash_value) * PAGE]
            controller.prefetch_buffer.put(operation)
        else:
            operation = controller.prefetch("request", slots, tokens)
        pages = self._loaded(operation)
        for page, content in enumerate(_contents(tokens)[:pages]):
            found = self.pool.get_data_page(int(slots[page * PAGE]))
            assert torch.equal(found.contiguous().view(-1).view(torch.float32), content), page
        self.pool.free(slots)
        return pages

    def _loaded(self, operation: Any) -> int:
        acks = getattr(self.controller, "ack_prefetch_queue", None)  # 0.5.20 and later
        pages = 0
        while time.monotonic() < END:
            if acks is not None:
                ack = acks.get(timeout=20)
                pages = (ack.completed_tokens or 0) // PAGE or pages
                if ack.completed_req:
                    return pages
                continue
            if not self.controller.__dict__.get("prefetch_revoke_queue", queue.Queue()).empty():
                self.controller.prefetch_revoke_queue.get()
                return 0
            wanted = len(operation.hash_value) * PAGE
            if wanted and (operation.completed_tokens == wanted or operation.is_terminated()):
                return operation.completed_tokens // PAGE
            time.sleep(0.002)
        raise TimeoutError("SGLang's prefetch does not end")

    def keys(self, tokens: Tokens) -> list[str]:
        found, last = [], None
        for begin in range(0, len(tokens), PAGE):
            last = self.controller.get_hash_str(tokens[begin : begin + PAGE], last)
            found.append(last)
        return found

    def _slots(self, tokens: Tokens) -> torch.Tensor:
        slots = self.pool.alloc(len(tokens))
        assert slots is not None
        return slots

    def close(self) -> None:
        self.controller.detach_storage_backend()


def _contents(tokens: Tokens) -> list[torch.Tensor]:
    """Of each page: it depends on all tokens up to there."""
    pages = []
    for end in range(PAGE, len(tokens) + 1, PAGE):
        seed = int.from_bytes(hashlib.sha256(repr(tokens[:end]).encode()).digest()[:6], "little")
        generator = torch.Generator().manual_seed(seed)
        pages.append(torch.randn(2 * LAYERS * PAGE * HEADS * HEAD, generator=generator))
    return pages


def tokens(first: int, pages: int) -> Tokens:
    return list(range(first, first + pages * PAGE))


def round_trip(make: Callable[..., Controller]) -> dict[str, Any]:
    one = make({"host": {"num_blocks": 40}})
    seen: dict[str, Any] = {}
    short, long = tokens(0, 3), tokens(0, 5)
    seen["before"] = one.load(short)
    seen["stored"] = one.store(short)
    seen["loaded"] = one.load(short)
    seen["longer"] = one.load(long)
    seen["other"] = one.load(tokens(7000, 3))
    keys = one.keys(tokens(0, 3))
    absent = one.keys(tokens(9000, 1))
    seen["gap"] = [one.backend.batch_exists(keys[:1] + absent + keys[1:]), one.backend.batch_exists(keys)]
    seen["exists"] = [one.backend.exists(keys[2]), one.backend.exists(absent[0])]
    one.backend.clear()
    seen["cleared"] = one.load(short)
    # An error inside: SGLang's threads go on.
    store, one.backend._store.put, one.backend._store.store = one.backend._store, _raise, _raise
    seen["failed_store"] = one.store(short)
    del store.put, store.store
    seen["stored_again"] = one.store(short)
    store.get = store.load = _raise
    seen["failed_load"] = one.load(short)
    del store.get, store.load
    seen["loaded_again"] = one.load(short)
    one.controller.reset()
    seen["after_reset"] = one.load(short)
    one.close()
    return seen


def _raise(*_: Any) -> None:
    raise OSError("injected")


def restart(make: Callable[..., Controller], folder: Path) -> dict[str, Any]:
    kvbm = {"disk": {"num_blocks": 40, "dir": str(folder)}}
    one = make(kvbm)
    stored = one.store(tokens(0, 3))
    one.close()
    one = make(kvbm)
    seen = {"stored": stored, "loaded": one.load(tokens(0, 3))}
    one.close()
    return seen


def weights(make: Callable[..., Controller]) -> dict[str, Any]:
    """What was stored before a change of weights is not served after it."""
    from kvbm.sglang_integration import compat
    from kvbm.sglang_integration.weights import weight_watch

    one = make({"host": {"num_blocks": 40}})
    one.store(tokens(0, 3))
    names = [
        f"{owner.__name__}.{name}"
        for owner in compat.weight_updaters()
        for name in vars(owner)
        if name == "update_weights_from_disk"
    ]
    owner = next(o for o in compat.weight_updaters() if "update_weights_from_disk" in vars(o))
    with contextlib.suppress(Exception):  # fails, but may have changed something
        owner.update_weights_from_disk(SimpleNamespace())
    seen = {"hooks": names, "changing": weight_watch.changing, "during": one.load(tokens(0, 3))}
    one.controller.reset()
    seen |= {"flushed": not weight_watch.changing, "after": one.load(tokens(0, 3))}
    one.store(tokens(0, 3))
    seen["anew"] = one.load(tokens(0, 3))
    one.close()
    return seen


def main() -> None:
    prepare()
    import sglang

    from kvbm.sglang_integration import compat

    group, _place = start_ranks()
    folder = Path(sys.argv[1])
    report: dict[str, Any] = {"version": compat.version(), "file": sglang.__file__}
    for layout, zero_copy in POOLS:
        make = functools.partial(Controller, group, layout, zero_copy)
        name = f"{layout}-{'zero_copy' if zero_copy else 'generic'}"
        report[name] = round_trip(make)
        report[f"{name}-disk"] = restart(make, folder / name)
    report["weights"] = weights(functools.partial(Controller, group, *POOLS[0]))
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
