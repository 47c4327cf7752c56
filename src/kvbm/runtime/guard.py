"""No error inside reaches the engine."""

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, Concatenate, Protocol, TypeVar

logger = logging.getLogger(__name__)


class Guarded(Protocol):
    """lock: held for a guarded call. off_reason: set by the first error, after which nothing is cached."""

    lock: threading.RLock
    off_reason: str | None


_G = TypeVar("_G", bound=Guarded)
_T = TypeVar("_T")


def off_on_error(
    default: Callable[[], Any],
) -> Callable[[Callable[Concatenate[_G, ...], _T]], Callable[Concatenate[_G, ...], _T]]:
    """An error turns caching off, with one log entry; that call and all later ones answer `default()`."""

    def decorate(
        method: Callable[Concatenate[_G, ...], _T],
    ) -> Callable[Concatenate[_G, ...], _T]:
        @functools.wraps(method)
        def guarded(self: _G, *args: Any, **kwargs: Any) -> _T:
            with self.lock:
                if self.off_reason is not None:
                    return default()
                try:
                    return method(self, *args, **kwargs)
                except Exception:
                    logger.exception(
                        "KVBM: internal error in %s; caching is off from here on", method.__name__
                    )
                    self.off_reason = f"internal error in {method.__name__}"
                    return default()

        return guarded

    return decorate
