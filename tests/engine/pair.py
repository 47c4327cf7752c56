"""The same engine with KVBM and without, in two processes that are kept for the next pair.

Importing vLLM takes ten times as long as starting a small model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engine import features
from tests.engine.features import Query
from tests.engine.harness import BLOCK_SIZE, ENGINE, KVBM, Child
from tests.engine.scenarios import Ran


class Pair:
    def __init__(self) -> None:
        self._kvbm, self._plain = Child(), Child()

    @contextmanager
    def engines(
        self,
        model: Path,
        *,
        kvbm: dict[str, Any] | None = None,
        plain: dict[str, Any] | None = None,
        **options: Any,
    ) -> Iterator["Pair"]:
        """Both engines of a model, for the time of a `with`.

        kvbm: settings, by default a host tier. plain: options of the engine without, which caches nothing.
        """
        common = {**ENGINE, **options}
        connector = {**KVBM, "kv_connector_extra_config": kvbm or {"host.cache_gb": 0.1}}
        given = (
            {**common, "kv_transfer_config": connector},
            {**common, "enable_prefix_caching": False, **(plain or {})},
        )
        children = (self._kvbm, self._plain)
        try:
            starts = [
                child.begin(features.start, str(model), options)
                for child, options in zip(children, given, strict=True)
            ]
            for started in starts:
                started()
            yield self
        finally:
            for child in children:
                child.call(features.stop)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """In the engine with KVBM."""
        return self._kvbm.call(features.use, function, *args)

    def plain(self, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """Start it in the engine without; the returned function waits."""
        return self._plain.begin(features.use, function, *args)

    def serves(self, queries: Sequence[Query]) -> tuple[Ran, Ran]:
        """Cold and from the host: all answers are those of the engine without, and tokens were served."""
        want = self.plain(features.run, queries)
        cold = self.call(features.run, queries)
        host = self.call(features.again, features.run, queries)
        assert [cold.tokens, host.tokens] == [want().tokens] * 2
        # Of a preempted request vLLM does not count what is loaded for it again.
        assert host.onboarded * BLOCK_SIZE >= host.external_hits > 0
        assert (host.after.off_reason, host.after.failures) == (None, {})
        assert host.after.not_cached == cold.before.not_cached
        assert (host.after.pins, host.after.followed, host.after.has_work) == (0, 0, False)
        assert host.after.free_device_blocks == host.after.device_blocks
        return cold, host

    def close(self) -> None:
        for child in (self._kvbm, self._plain):
            child.close()
