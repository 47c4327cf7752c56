"""All that differs between the vLLM versions we run on (0.26 to 0.33)."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvbm.errors import UnsupportedEngineError

OLDEST = (0, 26)
NEWEST = (0, 33)


def check_engine_version(version: str, *, allow_untested: bool) -> None:
    """Refuse a vLLM that this file was not written for: its connector interface changes without notice."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return
    if not allow_untested:
        raise UnsupportedEngineError(
            f"vLLM {version} is not among the versions that KVBM is tested with "
            f"({OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}). Install one of those, or set "
            f"KVBM_ALLOW_UNTESTED_ENGINE=1 to try this one."
        )


def transfer_results(finished_recving: set[str], failed_recving: set[str]) -> Any:
    """vLLM 0.30 and later: finished and failed receives in one snapshot, failures named by request."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    return KVConnectorTransferResults(finished_recving=finished_recving, failed_recving=failed_recving)


def hold_blocks(block_pool: Any, block_ids: Iterable[int]) -> None:
    """Keep device blocks from being given out, as if one more request used them."""
    block_pool.touch(_blocks(block_pool, block_ids))


def release_blocks(block_pool: Any, block_ids: Sequence[int]) -> None:
    """Undo `hold_blocks`. The tail is offered for reuse before the head."""
    block_pool.free_blocks(_blocks(block_pool, reversed(block_ids)))


def before_reset(block_pool: Any, prepare: Callable[[], None]) -> None:
    """Call `prepare` before the pool's prefix cache is reset.

    vLLM refuses a reset, or raises, while a block is in use, and has no hook to tell a connector in time.
    """
    reset = block_pool.reset_prefix_cache

    def prepared_reset() -> bool:
        prepare()
        return reset()

    block_pool.reset_prefix_cache = prepared_reset


def _blocks(block_pool: Any, block_ids: Iterable[int]) -> list[Any]:
    # The null block is shared by all requests and has no count worth keeping.
    return [block for block in (block_pool.blocks[id_] for id_ in block_ids) if not block.is_null]
