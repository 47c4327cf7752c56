"""Arrays that grow at the end: per-block state without one Python object per block."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class GrowingArray:
    """Rows of `width` values (a vector where it is 0), appended in amortised constant time."""

    __slots__ = ("_count", "_rows")

    def __init__(self, dtype: Any, width: int = 0) -> None:
        self._rows: NDArray[Any] = np.empty((16, width) if width else 16, dtype)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> NDArray[Any]:
        """View of the rows so far; valid until the next `append`."""
        return self._rows[: self._count]

    def append(self, rows: ArrayLike) -> None:
        added = np.asarray(rows, self._rows.dtype)
        end = self._count + len(added)
        if end > len(self._rows):
            grown = np.empty((max(end, 2 * len(self._rows)), *self._rows.shape[1:]), self._rows.dtype)
            grown[: self._count] = self.rows
            self._rows = grown
        self._rows[self._count : end] = added
        self._count = end

    def cut(self, count: int) -> None:
        """Keep the first `count` rows."""
        self._count = min(count, self._count)
