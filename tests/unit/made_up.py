"""Measurements of no engine, every number another, for the tests of what is made of them."""

from typing import Any

from kvbm.logic.edges import Edge
from kvbm.observe.measurements import EdgeState, Measurements, TierState
from kvbm.observe.requests import HitRate, Totals

OFFLOADS = ((3, 1, 0.02), (5, 0, 20.0), (7, 0, 0.001))  # blocks, failed, seconds
LOADS = ((11, 2, 0.3),)
WRITES = ((13, 0, 0.004), (17, 3, 0.7))
READS = ((19, 0, 1.5),)


def edge(operations: tuple[tuple[int, int, float], ...]) -> Edge:
    result = Edge()
    for operation in operations:
        result.done(*operation)
    return result


def measurements(disk: bool = True, **changes: Any) -> Measurements:
    tiers = [TierState("host", 100, 80, 50, 30, 21, 1000)]
    edges = [
        EdgeState("offload", edge(OFFLOADS), 1000, 4, {"cancelled": 1}),
        EdgeState("onboard", edge(LOADS), 1000, 6, {"corrupt": 2}),
    ]
    if disk:
        tiers.append(TierState("disk", 400, 400, 300, 100, 22, 1024))
        edges.append(EdgeState("write", edge(WRITES), 1024, 8, {"timeout": 2, "error": 1}))
        edges.append(EdgeState("read", edge(READS), 1024, 9, {}))
    values: dict[str, Any] = {
        "engine": "engine-1",
        "block_size": 16,
        "ready": True,
        "off_reason": None,
        "disk_off_reason": None,
        "tiers": tiers,
        "edges": edges,
        "totals": Totals(
            requests=31,
            prompt_tokens=4000,
            device_tokens=320,
            host_tokens=480,
            disk_tokens=160,
            saved_s=2.5,
            host_blocks=32,
            disk_blocks=14,
        ),
        "host_rate": HitRate(3, 4),
        "disk_rate": HitRate(1, 5),
        "requests_not_cached": {"pooling request": 2, 'a "quoted"\nreason \\': 1},
        "not_stored": 41,
        "not_admitted": 42,
        "not_written": 43,
        "declined": 44,
        "recovered": 45,
        "pinned": 46,
    }
    return Measurements(**{**values, **changes})
