"""What vLLM shows of KVBM itself: in its `/metrics`, and in the line that it logs of KV transfers.

The scheduler's connector hands out what has happened since the last step; vLLM adds that up in its front end.
Latencies in buckets, reasons and queues are in KVBM's own metrics only (`observe/metrics.py`).
"""

import logging
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvbm.logic.edges import Edge
from kvbm.observe.requests import RequestLog
from kvbm.runtime.leader import Leader

logger = logging.getLogger(__name__)

COUNTERS = {
    "saved_tokens": ("tier", "Tokens that were loaded from a tier of KVBM and not computed."),
    "saved_prefill_seconds": ("", "Seconds that the engine would have computed on these tokens."),
    "moved_bytes": ("edge", "Bytes of blocks that arrived, of all ranks together."),
    "transfer_seconds": ("edge", "Seconds from the orders of transfers to the last rank's report."),
    "transfers": ("edge", "Transfers that are over."),
    "failed_blocks": ("edge", "Blocks whose transfer failed."),
    "evicted_blocks": ("tier", "Blocks that left a tier because others needed room."),
    "requests_not_cached": ("", "Requests that KVBM doesn't cache."),
}
GAUGES = {
    "hit_rate": ("tier", "Of the blocks that the last finished requests asked of a tier, the part it had."),
    "usage": ("tier", "Part of a tier that is taken by blocks that can be loaded."),
}

_Numbers = tuple[float, ...]
_EDGE_KEYS = ("moved_bytes", "transfer_seconds", "transfers", "failed_blocks")
_HOST_KEYS = (
    "saved_tokens:host",
    "saved_tokens:disk",
    "saved_prefill_seconds",
    "requests_not_cached",
    "evicted_blocks:host",
    *(f"{key}:{edge}" for edge in ("offload", "onboard") for key in _EDGE_KEYS),
)
_DISK_KEYS = ("evicted_blocks:disk", *(f"{key}:{edge}" for edge in ("write", "read") for key in _EDGE_KEYS))


@dataclass
class KvbmStats(KVConnectorStats):
    """data: numbers by metric, or metric:label. Counters count since the last such object."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for key, value in other.data.items():
            self.data[key] = value if _metric(key) in GAUGES else self.data.get(key, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        get = self.data.get
        line = {
            "KVBM tokens from host": get("saved_tokens:host", 0),
            "from disk": get("saved_tokens:disk", 0),
            "GB offloaded": round(get("moved_bytes:offload", 0) / 1e9, 3),
            "onboarded": round(get("moved_bytes:onboard", 0) / 1e9, 3),
            "written": round(get("moved_bytes:write", 0) / 1e9, 3),
            "read": round(get("moved_bytes:read", 0) / 1e9, 3),
            "host hit rate": round(get("hit_rate:host", 0.0), 3),
            "disk hit rate": round(get("hit_rate:disk", 0.0), 3),
        }
        failed = sum(value for key, value in self.data.items() if _metric(key) == "failed_blocks")
        return {**line, "failed blocks": failed} if failed else line

    def is_empty(self) -> bool:
        return not self.data


class StatsSource:
    """Of one leader. Called in every step, on the scheduler's thread; block sizes are those on all ranks."""

    def __init__(self, leader: Leader, log: RequestLog, block_bytes: int, disk_block_bytes: int) -> None:
        self._leader = leader
        self._log = log
        self._block_bytes = block_bytes
        self._disk_block_bytes = disk_block_bytes
        self._keys = (*_HOST_KEYS, *(_DISK_KEYS if leader.disk is not None else ()))
        self._last: _Numbers = (0,) * len(self._keys)
        self._last_state: _Numbers = ()
        self._broken = False

    def take(self) -> KvbmStats | None:
        """What has happened since the last call; None where nothing has."""
        if self._broken:
            return None
        try:
            return self._take()
        except Exception:
            logger.exception("KVBM: an internal error in counting for vLLM's metrics, which ends here")
            self._broken = True
            return None

    def _take(self) -> KvbmStats | None:
        counts, state = self._counts(), self._state()
        if counts == self._last and state == self._last_state:
            return None
        data: dict[str, Any] = {
            key: now - before
            for key, now, before in zip(self._keys, counts, self._last, strict=True)
            if now != before
        }
        self._last, self._last_state = counts, state
        self._add_state(data)
        return KvbmStats(data)

    def _counts(self) -> _Numbers:
        """In the order of the keys."""
        leader, totals, size = self._leader, self._log.totals, self._block_bytes
        stats = leader.stats
        numbers = (
            totals.host_tokens,
            totals.disk_tokens,
            totals.saved_s,
            sum(leader.not_cached.values()),
            leader.pool.evictions,
            *_of_edge(stats.offload, size),
            *_of_edge(stats.onboard, size),
        )
        disk = leader.disk
        if disk is None:
            return numbers
        size = self._disk_block_bytes
        return (
            *numbers,
            disk.pool.evictions,
            *_of_edge(disk.stats.write, size),
            *_of_edge(disk.stats.read, size),
        )

    def _state(self) -> _Numbers:
        """What the gauges are made of."""
        leader, log = self._leader, self._log
        state = (
            log.host_rate.hits,
            log.host_rate.wanted,
            log.disk_rate.hits,
            log.disk_rate.wanted,
            leader.pool.num_registered,
            leader.pool.usable,
        )
        disk = leader.disk
        return state if disk is None else (*state, disk.pool.num_registered, disk.pool.usable)

    def _add_state(self, data: dict[str, Any]) -> None:
        pools = {"host": self._leader.pool}
        data["hit_rate:host"] = self._log.host_rate.value
        if self._leader.disk is not None:
            pools["disk"] = self._leader.disk.pool
            data["hit_rate:disk"] = self._log.disk_rate.value
        for tier, pool in pools.items():
            data[f"usage:{tier}"] = pool.num_registered / pool.usable if pool.usable else 0.0


class KvbmPromMetrics(KVConnectorPromMetrics):
    """In vLLM's front end. vLLM's requests hang on it, so it never raises."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._metrics: dict[str, Any] = {}
        self._children: dict[tuple[int, str], Any] = {}
        try:
            self._register()
        except Exception:
            logger.exception("KVBM: vLLM's /metrics will lack KVBM's: they could not be registered")
            self._metrics.clear()

    def _register(self) -> None:
        for name, (label, text) in COUNTERS.items():
            labels = [*self._labelnames, label] if label else self._labelnames
            self._metrics[name] = self._counter_cls(f"vllm:kvbm_{name}_total", text, labelnames=labels)
        for name, (label, text) in GAUGES.items():
            labels = [*self._labelnames, label]
            more: dict[str, Any] = {"multiprocess_mode": "mostrecent"}  # not declared by the common base
            self._metrics[name] = self._gauge_cls(f"vllm:kvbm_{name}", text, labelnames=labels, **more)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        try:
            for key, value in transfer_stats_data.items():
                self._observe(engine_idx, key, value)
        except Exception:
            logger.exception("KVBM: an internal error in vLLM's metrics of KVBM, which end here")
            self._metrics.clear()

    def _observe(self, engine_idx: int, key: str, value: float) -> None:
        metric, _, label = key.partition(":")
        if metric not in self._metrics:
            return
        child = self._children.get((engine_idx, key))
        if child is None:
            labels = [*self.per_engine_labelvalues[engine_idx], *([label] if label else [])]
            child = self._children[engine_idx, key] = self._metrics[metric].labels(*labels)
        if metric in GAUGES:
            child.set(value)
        else:
            child.inc(value)


def _metric(key: str) -> str:
    return key.partition(":")[0]


def _of_edge(edge: Edge, block_bytes: int) -> _Numbers:
    """In the order of _EDGE_KEYS."""
    return edge.blocks * block_bytes, edge.seconds, edge.operations, edge.failed
