"""Which way of copying is fastest: measured once on the user's device, and kept."""

import json
import os
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


# A kernel keeps SMs from the model for as long as the bus takes: on an H200 offloading by kernel made a cold
# prefill 4 % slower. It has to be so much faster than the copy engines to be chosen.
_KERNEL_HANDICAP = 1.5


@dataclass(frozen=True, slots=True)
class MethodTable:
    """For each direction ("offload", "onboard") the best method by number of blocks, ascending."""

    rows: Mapping[str, Sequence[tuple[int, Method]]]

    def choose(self, direction: str, blocks: int) -> Method:
        """The method measured for the nearest number of blocks, in proportion."""
        rows = self.rows[direction]
        return min(rows, key=lambda row: max(blocks, row[0]) / max(1, min(blocks, row[0])))[1]


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
    budget does not pay either. A kernel's times count half as much again, see _KERNEL_HANDICAP.
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
                    handicap = _KERNEL_HANDICAP if method is Method.KERNEL else 1.0
                    took = (after - before) * handicap
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
