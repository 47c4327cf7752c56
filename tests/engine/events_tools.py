"""A router under test: it subscribes to an engine's KV events, and the truth it is compared with.

Functions whose first argument is `llm` are executed in the engine's process.
"""

import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from tests.engine import scenarios
from tests.engine.harness import Engine

Held = dict[str, set[int]]
Sequence_ = tuple[tuple[int, ...], str | None]
"""Tokens and salt."""

MEDIA = ("GPU", "CPU", "STORAGE")
_END = (-1).to_bytes(8, "big", signed=True)


def free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


class Subscriber:
    """What vLLM publishes, as it comes; and a router's view of it. `options` belong to the engine."""

    def __init__(self) -> None:
        from vllm.config.kv_events import KVEventsConfig
        from vllm.distributed.kv_events import KVEventBatch

        self._port, self._replay_port = free_ports()
        self.options = {
            "kv_events_config": KVEventsConfig(
                enable_kv_cache_events=True,
                publisher="zmq",
                endpoint=f"tcp://*:{self._port}",
                replay_endpoint=f"tcp://127.0.0.1:{self._replay_port}",
                topic="kv",
            )
        }
        self._decode = msgspec.msgpack.Decoder(KVEventBatch).decode
        self.received: list[tuple[int, bytes]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()  # before the engine binds: then the first message is not missed

    def _receive(self) -> None:
        subscriber = zmq.Context.instance().socket(zmq.SUB)
        subscriber.reconnect_ivl = 20
        subscriber.connect(f"tcp://127.0.0.1:{self._port}")
        subscriber.subscribe(b"kv")
        while not self._stop.is_set():
            if subscriber.poll(50):
                topic, number, payload = subscriber.recv_multipart()
                assert topic == b"kv"
                self.received.append((int.from_bytes(number, "big"), payload))
        subscriber.close(linger=0)

    def sync(self, engine: Engine, deadline_s: float = 20.0) -> None:
        """Wait until all that the engine has published is here."""
        last = engine.call(last_published)
        end = time.monotonic() + deadline_s
        while not self.received or self.received[-1][0] < last:
            if time.monotonic() > end:
                raise TimeoutError(f"message {last} does not come: {len(self.received)} are here")
            time.sleep(0.01)

    def batches(self) -> list[Any]:
        return [self._decode(payload) for _, payload in self.received]

    def events(self) -> list[Any]:
        return [event for batch in self.batches() for event in batch.events]

    def replay(self, first: int) -> list[tuple[int, bytes]]:
        """What a subscriber that comes late is given."""
        client = zmq.Context.instance().socket(zmq.DEALER)
        client.connect(f"tcp://127.0.0.1:{self._replay_port}")
        client.send_multipart([b"", first.to_bytes(8, "big")])
        got: list[tuple[int, bytes]] = []
        while True:
            if not client.poll(10_000):
                raise TimeoutError("no replay")
            _, _topic, number, payload = client.recv_multipart()
            if number == _END:
                client.close(linger=0)
                return got
            got.append((int.from_bytes(number, "big"), payload))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def rebuild(events: Sequence[Any]) -> Held:
    """What a router believes: an index for each medium, and AllBlocksCleared means everything."""
    known: Held = {medium: set() for medium in MEDIA}
    for event in events:
        kind = type(event).__name__
        if kind == "AllBlocksCleared":
            for names in known.values():
                names.clear()
        elif kind == "BlockStored":
            assert len(event.token_ids) == event.block_size * len(event.block_hashes)
            assert not known[event.medium].intersection(event.block_hashes)
            known[event.medium].update(event.block_hashes)
        else:
            for name in event.block_hashes:
                known[event.medium].remove(name)
    return known


def stored_blocks(events: Sequence[Any]) -> dict[tuple[str, int], tuple[Any, ...]]:
    """All that was said of each block when it was announced, by medium and name."""
    from vllm.distributed.kv_events import BlockStored

    said = {}
    for event in events:
        if isinstance(event, BlockStored):
            size = event.block_size
            for i, name in enumerate(event.block_hashes):
                parent = event.block_hashes[i - 1] if i else event.parent_block_hash
                extra = event.extra_keys[i] if event.extra_keys else None
                said[event.medium, name] = (
                    parent,
                    tuple(event.token_ids[i * size : (i + 1) * size]),
                    extra,
                    (size, event.lora_id, event.lora_name, event.group_idx, event.kv_cache_spec_kind),
                )
    return said


# ---- in the engine's process


def last_published(llm: Any) -> int:
    publisher = scenarios.scheduler(llm).kv_event_publisher
    end = time.monotonic() + 10
    while publisher._event_queue.unfinished_tasks:
        if time.monotonic() > end:
            raise TimeoutError("the publisher does not come to rest")
        time.sleep(0.01)
    return publisher._buffer[-1][0] if publisher._buffer else -1


def names(llm: Any, sequences: Sequence[Sequence_]) -> dict[bytes, int]:
    """vLLM's name of every full block of the sequences, by ours; both computed apart from the connector."""
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash
    from vllm.v1.request import Request

    core = llm.llm_engine.engine_core.engine_core
    found: dict[bytes, int] = {}
    for tokens, salt in sequences:
        request = Request(
            "names",
            list(tokens),
            SamplingParams(max_tokens=1),
            None,
            cache_salt=salt,
            block_hasher=core.request_block_hasher,
        )
        ours = scenarios.hashes(llm, tokens, salt)
        theirs: list[Any] = [maybe_convert_block_hash(hash_) for hash_ in request.block_hashes]
        found.update(zip([own.tobytes() for own in ours], theirs, strict=True))
    return found


def held(llm: Any, sequences: Sequence[Sequence_]) -> Held:
    """What the device cache really holds, and the tiers of the blocks of `sequences`."""
    import numpy as np
    from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

    from kvbm.logic.pool import BlockState

    by_hash = names(llm, sequences)
    cache = scenarios.scheduler(llm).kv_cache_manager.block_pool.cached_block_hash_to_block._cache
    on_device: set[Any] = {maybe_convert_block_hash(get_block_hash(key)) for key in cache}
    found: Held = {"GPU": on_device}
    lead = scenarios.leader(llm)
    for medium, pool in (("CPU", lead.pool), ("STORAGE", lead.disk.pool)):
        slots = np.arange(pool.capacity)
        slots = slots[pool.states(slots) == BlockState.REGISTERED]
        hashes = [own.tobytes() for own in pool.hashes(slots)]
        found[medium] = {by_hash[own] for own in hashes if own in by_hash}
    return found


def counts(llm: Any) -> dict[str, int]:
    lead = scenarios.leader(llm)
    merger = scenarios.side(llm)._events._merger
    return {
        "host evictions": lead.pool.evictions,
        "disk evictions": lead.disk.pool.evictions,
        "host blocks": lead.pool.num_registered,
        "disk blocks": lead.disk.pool.num_registered,
        "remembered": len(merger),
        "expected": len(merger._expected),
        "failed": scenarios.side(llm)._events.failed,
    }


def hooks(llm: Any) -> dict[str, Any]:
    """What an engine without events has of them: nothing."""
    pool = scenarios.scheduler(llm).kv_cache_manager.block_pool
    return {
        "merging": scenarios.side(llm)._events is not None,
        "hooked": "take_events" in vars(pool) or "emit_cached_block_events" in vars(pool),
        "subscribers": [
            subscriber.__qualname__
            for subscribers in scenarios.leader(llm).pool._subscribers.values()
            for subscriber in subscribers
        ],
    }
