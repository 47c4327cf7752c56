"""KV events of what KVBM's tiers hold: SGLang itself publishes none for storage backends.

In SGLang's format, by its own publisher, at an endpoint of our own. Hashes are the first 8 bytes of a page's
hash, as SGLang's events have them, so a router joins them with those of the device.
"""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from kvbm.errors import ConfigError
from kvbm.logic.pool import BlockEvent, EventKind
from kvbm.runtime.block_store import BlockStore
from kvbm.sglang_integration import compat

# SGLang's names: its own host tier is CPU_PINNED.
_MEDIUM_OF_TIER = {"host": "EXTERNAL", "disk": "DISK"}


def publish_events(
    store: BlockStore, settings: Mapping[str, Any], *, page_size: int, dp_rank: int
) -> Callable[[], None]:
    """Publish what `store` stores and removes from now on; returns what ends it.

    settings: as of SGLang's --kv-events-config. The publisher has a queue and a thread of its own.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError('"kv_events" is an object like that of SGLang\'s --kv-events-config.')
    try:
        types, publisher = compat.event_publisher(json.dumps({"publisher": "zmq", **settings}), dp_rank)
    except (ValueError, TypeError) as error:
        raise ConfigError(f'"kv_events" is not understood by SGLang: {error}') from error

    def publish(event: BlockEvent) -> None:
        hashes = event.hashes[:, 0].astype("<u8").view(">i8").tolist()
        medium = _MEDIUM_OF_TIER[event.tier]
        if event.kind == EventKind.STORED:
            # A backend is told neither the tokens nor the page before.
            told = types.BlockStored(
                block_hashes=hashes,
                parent_block_hash=None,
                token_ids=[],
                block_size=page_size,
                lora_id=None,
                medium=medium,
            )
        else:
            told = types.BlockRemoved(block_hashes=hashes, medium=medium)
        publisher.publish(types.KVEventBatch(ts=time.time(), events=[told], attn_dp_rank=dp_rank))

    unsubscribe = store.subscribe(publish)

    def end() -> None:
        unsubscribe()
        publisher.shutdown()

    return end
