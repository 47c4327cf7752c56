"""Stores are emptied when weights change: SGLang flushes its own tiers then and tells no backend of it.

All methods that change weights are wrapped, in this process, where SGLang has them. While one runs the
stores take and give nothing, and when the outermost has returned, with SGLang's queues flushed, they are
cleared: what was computed with the old weights is not served.
"""

import functools
import logging
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

from kvbm.sglang_integration import compat

logger = logging.getLogger(__name__)

_CHANGES = re.compile(
    r"(update_weights_from|load_weights_from|receive_weights_from|(begin|end)_weight_update)"
)


class WeightWatch:
    """Tells its watchers when weights change. `changing` is true meanwhile."""

    def __init__(self) -> None:
        self._watchers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._depth = 0
        self._lock = threading.Lock()
        self._wrapped: set[type] = set()

    @property
    def changing(self) -> bool:
        return self._depth > 0

    def add(self, watcher: Any) -> None:
        """Call `watcher.clear()` after each change of weights, as long as it lives."""
        with self._lock:
            for updater in set(compat.weight_updaters()) - self._wrapped:
                names = [name for name, value in vars(updater).items() if callable(value)]
                for name in filter(_CHANGES.match, names):
                    setattr(updater, name, self._telling(getattr(updater, name)))
                    self._wrapped.add(updater)
            if not self._wrapped:
                logger.warning(
                    "KVBM: this SGLang changes weights in a way that KVBM does not hear of: clear the "
                    "storage backend (POST /hicache/storage-backend/clear) after each change"
                )
            self._watchers.add(watcher)

    def _telling(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def told(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                if self._depth == 1:  # still: what comes from other threads is refused until they are empty
                    for watcher in list(self._watchers):
                        watcher.clear()
                self._depth -= 1

        return told


weight_watch = WeightWatch()
