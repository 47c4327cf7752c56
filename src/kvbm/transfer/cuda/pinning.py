"""Pins a host arena in the background, so that an engine need not wait for tens of gigabytes at its start."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection

from kvbm.transfer.arena import HostArena

logger = logging.getLogger(__name__)

# Every launch of the process waits while a chunk is registered: 32 MiB take 1.2 ms on an H200.
_CHUNK_BYTES = 32 << 20
# Between chunks the engine's launches get their turn, so many times as long as a registration took.
_PAUSE = 4


def slots_per_chunk(slot_bytes: int) -> int:
    """Slots that are registered together. No single DMA may cross from one registration into the next."""
    return max(1, _CHUNK_BYTES // slot_bytes)


class PinnedArena:
    """Touches the arena's memory with several threads and registers it chunk by chunk, lowest slots first.

    register(address, bytes) and unregister(address) may raise; `enter_thread` is called first in the thread
    that registers. cpus: where the touching threads run, so that the kernel places the memory on their NUMA
    node; empty for anywhere. The constructor returns when the first chunk, touched here, is ready.
    """

    def __init__(
        self,
        arena: HostArena,
        *,
        register: Callable[[int, int], None],
        unregister: Callable[[int], None],
        enter_thread: Callable[[], None] = lambda: None,
        cpus: Collection[int] = (),
        threads: int = 4,
    ) -> None:
        self._arena = arena
        self._register = register
        self._unregister = unregister
        self._enter_thread = enter_thread
        self._cpus = cpus
        self._step = slots_per_chunk(arena.slot_bytes)
        self._chunks = -(-arena.num_slots // self._step)
        self._touched = [threading.Event() for _ in range(self._chunks)]
        self._next = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._registered: list[int] = []
        self._errors: dict[int, Exception] = {}  # of touching, by chunk
        self.ready_slots = 0
        arena.touch(0, self._slots_until(0))
        self._add(0)
        self._next = 1
        self._threads = [
            threading.Thread(target=self._touch, name=f"kvbm-touch-{i}", daemon=True)
            for i in range(min(threads, self._chunks - 1))
        ]
        if self._threads:
            self._threads.append(threading.Thread(target=self._pin, name="kvbm-pin", daemon=True))
        for thread in self._threads:
            thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until all memory is ready, or given up; False after the timeout."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Stop, and unregister: CUDA refuses what comes to lie where registered memory was unmapped."""
        self._stopped.set()
        for touched in self._touched:
            touched.set()
        self.wait(10.0)
        while self._registered:
            with contextlib.suppress(Exception):  # the others can be given back none the less
                self._unregister(self._registered.pop())

    # ---- the threads ----

    def _touch(self) -> None:
        if self._cpus:
            with contextlib.suppress(OSError):  # the cgroup's CPUs may have changed: any place will do
                os.sched_setaffinity(0, self._cpus)  # of this thread alone
        while not self._stopped.is_set():
            with self._lock:
                chunk, self._next = self._next, self._next + 1
            if chunk >= self._chunks:
                return
            try:
                self._arena.touch(chunk * self._step, self._slots_until(chunk))
            except Exception as error:
                self._errors[chunk] = error
            self._touched[chunk].set()

    def _pin(self) -> None:
        try:
            self._enter_thread()
            for chunk in range(1, self._chunks):
                self._touched[chunk].wait()
                if self._stopped.is_set():
                    return
                if chunk in self._errors:
                    raise self._errors[chunk]
                started = time.perf_counter()
                self._add(chunk)
                self._stopped.wait(_PAUSE * (time.perf_counter() - started))
        except Exception as error:
            self._stopped.set()
            logger.warning(
                "KVBM: only %d of %d blocks of the host tier can be pinned (%s): the rest is not used. "
                "Raise the locked-memory limit (ulimit -l), or lower DYN_KVBM_CPU_CACHE_GB.",
                self.ready_slots,
                self._arena.num_slots,
                error,
            )

    def _add(self, chunk: int) -> None:
        first, last = chunk * self._step, self._slots_until(chunk)
        address = self._arena.address + first * self._arena.slot_bytes
        self._register(address, (last - first) * self._arena.slot_bytes)
        self._registered.append(address)
        self.ready_slots = last

    def _slots_until(self, chunk: int) -> int:
        return min((chunk + 1) * self._step, self._arena.num_slots)
