"""What was computed with other weights is not served: SGLang tells no backend that weights have changed.

The methods that change weights, and the one with which SGLang empties its own tiers, are wrapped in this
process, where SGLang has them. From a change on the stores take and give nothing, until SGLang has flushed:
before that it may still store what the old weights computed. Then the stores are cleared.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from kvbm.sglang_integration import compat

logger = logging.getLogger(__name__)

_CHANGES = (
    *("update_weights_from_disk", "update_weights_from_tensor", "update_weights_from_ipc"),
    *("update_weights_from_distributed", "load_weights_from_distributed", "begin_weight_update"),
)


class WeightWatch:
    """Clears its watchers when weights have changed. All but `changing` is used by one thread."""

    def __init__(self) -> None:
        self._watchers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._wrapped = False
        self.changing = False
        """Weights have changed and SGLang has not flushed since. Read by any thread."""

    def add(self, watcher: Any) -> None:
        """Call `watcher.clear()` after each change of weights, as long as it lives."""
        if not self._wrapped:
            self._wrapped = True
            changes = _wrap(compat.weight_updaters(), _CHANGES, before=self._begin)
            _wrap(compat.weight_updaters(), ("end_weight_update",), after=self._end)
            flushes = _wrap(compat.cache_controllers(), ("reset",), after=self.flushed)
            if not changes or not flushes:
                logger.warning(
                    "KVBM: this SGLang changes weights in a way that KVBM does not hear of: clear the "
                    "storage backend (POST /hicache/storage-backend/clear) after each change"
                )
        self._watchers.add(watcher)

    def flushed(self) -> None:
        """SGLang has emptied its own tiers and queues."""
        if self.changing:
            self._clear()
            self.changing = False

    def _begin(self) -> None:
        if not self.changing:
            logger.info("KVBM: the weights change: nothing is cached until SGLang's cache has been flushed")
        self.changing = True

    def _end(self) -> None:
        """The last of a session's changes; SGLang may have flushed before it."""
        if not self.changing:
            self._clear()

    def _clear(self) -> None:
        for watcher in list(self._watchers):
            watcher.clear()


def _wrap(
    classes: Iterable[type],
    names: tuple[str, ...],
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
) -> int:
    """Call `before` and `after` around the methods of these names; returns how many there are."""

    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before()
            try:
                return method(*args, **kwargs)
            finally:
                if after is not None:
                    after()

        return wrapped

    found = [(owner, name) for owner in classes for name in names if name in vars(owner)]
    for owner, name in found:
        setattr(owner, name, around(vars(owner)[name]))
    return len(found)


weight_watch = WeightWatch()
