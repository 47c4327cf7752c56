"""Which way of copying is fastest: measured once on the user's device, and kept."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Method(StrEnum):
    """How a GPU's blocks and pinned records are copied."""

    DMA = "dma"  # the copy engines move every piece
    KERNEL = "kernel"  # a kernel reads or writes pinned memory itself
    STAGED = "staged"  # a kernel packs whole records in device memory, the copy engines move those


# What takes SMs from the model has to be so much faster to be chosen. A kernel takes them for as long as the
# bus takes: offloading by kernel made a cold prefill 4 % slower. Packing takes them for moments, but offloads
# come while the model computes, and nobody waits for them: a cold prompt of 16k cost 5.7 ms with it, 2.4 with
# DMA alone (H200, benchmarks/results/2026-12-01-h200.md).
_HANDICAPS = {
    ("offload", Method.KERNEL): 1.5,
    ("onboard", Method.KERNEL): 1.5,
    ("offload", Method.STAGED): 1.25,
}
# Loads inside a step go by DMA from 1 GiB on, 20 ms on the bus, if its copies are so large and not too many:
# ordering one takes 1 µs, a fifth of the time in which the bus moves 256 KiB.
_IN_STEP_BYTES, _IN_STEP_COPY_BYTES, _IN_STEP_COPIES = 1 << 30, 256 << 10, 16384


@dataclass(frozen=True, slots=True)
class MethodTable:
    """For each direction ("offload", "onboard") the best method by number of blocks, ascending.

    most_by_dma: blocks; more are staged where DMA is the best, as ordering them takes the engine's thread.
    """

    rows: Mapping[str, Sequence[tuple[int, Method]]]
    most_by_dma: int = sys.maxsize

    def choose(self, direction: str, blocks: int) -> Method:
        """The method measured for the nearest number of blocks, in proportion."""
        rows = self.rows[direction]
        best = min(rows, key=lambda row: max(blocks, row[0]) / max(1, min(blocks, row[0])))[1]
        return Method.STAGED if best is Method.DMA and blocks > self.most_by_dma else best


def in_step_method(
    blocks: int, record_bytes: int, groups: int, contiguous: bool, able: Sequence[Method]
) -> Method:
    """Of a load inside a step, in groups of layers, each of which may be contiguous in a block on the device.

    By DMA it takes 39.8 ms instead of 42.2, and 78.8 instead of 83.9 (2 and 4 GiB, H200), but 5 to 10 ms of
    the engine's thread instead of a half. These are hidden while it takes longer to arrive than to prepare
    the step that waits for it.
    """
    copies = blocks * groups
    size = blocks * record_bytes
    if Method.KERNEL in able and (
        size < _IN_STEP_BYTES or size < copies * _IN_STEP_COPY_BYTES or copies > _IN_STEP_COPIES
    ):
        return Method.KERNEL
    return Method.STAGED if Method.STAGED in able and not contiguous else Method.DMA


def always(method: Method) -> MethodTable:
    return MethodTable({direction: [(1, method)] for direction in ("offload", "onboard")})


def measure(
    copy: Callable[[str, Method, int], None],
    methods: Iterable[Method],
    counts: Iterable[int],
    *,
    clock: Callable[[], float],
    budget_s: float = 2.0,
) -> MethodTable | None:
    """Time copy(direction, method, blocks), best of three; None if the budget did not suffice.

    The first copy of each method is not counted: a kernel may have to be compiled for it, for which the
    budget does not pay either. What takes SMs has a handicap, see _HANDICAPS.
    """
    methods, counts = list(methods), sorted(counts)
    for method in methods:
        for direction in ("offload", "onboard"):
            copy(direction, method, counts[0])
    started = clock()
    rows: dict[str, list[tuple[int, Method]]] = {}
    for direction in ("offload", "onboard"):
        for count in counts:
            seconds: dict[Method, float] = {}
            for method in methods:
                for _ in range(3):
                    before = clock()
                    copy(direction, method, count)
                    after = clock()
                    took = (after - before) * _HANDICAPS.get((direction, method), 1.0)
                    seconds[method] = min(seconds.get(method, float("inf")), took)
                    if after - started > budget_s:
                        return None
            rows.setdefault(direction, []).append((count, min(seconds, key=lambda m: seconds[m])))
    return MethodTable(rows)


class CalibrationFile:
    """Tables by device, driver and shape of a block, in a file of the user's cache folder.

    It saves a moment at the next start, no more: whatever is wrong with it is passed over.
    """

    def __init__(self, path: Path | None = None) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self._path = path or Path(cache) / "kvbm" / "copy-methods.json"

    def load(self, key: str) -> MethodTable | None:
        try:
            stored = self._read()[key]
            rows = {
                direction: [(int(count), Method(method)) for count, method in stored[direction]]
                for direction in ("offload", "onboard")
            }
            return MethodTable(rows) if all(rows.values()) else None
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    def save(self, key: str, table: MethodTable) -> None:
        stored = self._read()
        stored[key] = {direction: list(rows) for direction, rows in table.rows.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._path.parent) as folder:
                new = Path(folder) / self._path.name
                new.write_text(json.dumps(stored, indent=1))
                new.replace(self._path)
        except OSError:
            pass

    def _read(self) -> dict[str, dict[str, list[tuple[int, str]]]]:
        try:
            stored = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return stored if isinstance(stored, dict) else {}
