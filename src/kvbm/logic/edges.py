"""How much moved between two tiers, and how long it took."""

from bisect import bisect_left
from dataclasses import dataclass, field

# Seconds. Upper bounds of the buckets of a latency histogram; what is longer goes to one more.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class Edge:
    """Operations between two tiers that are over. seconds: from the order to the last rank's report."""

    operations: int = 0
    blocks: int = 0  # that arrived
    failed: int = 0
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def done(self, blocks: int, failed: int, seconds: float) -> None:
        self.operations += 1
        self.blocks += blocks
        self.failed += failed
        self.seconds += seconds
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
