"""Whether blocks are had sooner from a tier than by computing them again."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.groups import NOT_TO_BE_HAD


class Rate:
    """Amount per second, of late: a sample's weight falls by a tenth with each that follows."""

    _KEEP = 0.9

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    def sample(self, amount: float, seconds: float) -> None:
        self._amount = self._KEEP * self._amount + amount
        self._seconds = self._KEEP * self._seconds + seconds

    @property
    def value(self) -> float | None:
        """None while nothing was measured."""
        return self._amount / self._seconds if self._seconds > 0 else None


class LoadEstimate:
    """Compares reading with computing, both as measured. Times in seconds, from any clock.

    Nothing is declined before the rate of computing is known; a tier that was never read is tried with a few
    blocks.
    """

    # Steps of fewer tokens say more about the engine's overhead than about its speed.
    MIN_TOKENS = 128
    # A load has to promise this much more than it takes: the measured rates are those of a moment ago.
    MARGIN = 1.1
    # A tier that is never read is never measured again: after so long a small load is tried.
    RETRY_S = 30.0
    RETRY_BLOCKS = 16
    # The first load is a sample too: on an H100's host the whole of a prompt of 1,024 blocks would have taken
    # 1.05 s, where computing takes 0.5.
    FIRST_BLOCKS = 64
    # A request goes without what takes this much longer than it should.
    PATIENCE = 4.0
    PATIENCE_S = 1.0

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._reading = Rate()  # blocks
        self._computing = Rate()  # tokens
        self._read_at = 0.0

    def read(self, blocks: int, seconds: float, now: float) -> None:
        """So many blocks were read while the tier was busy for so long."""
        self._reading.sample(blocks, seconds)
        self._read_at = now

    def computed(self, tokens: int, seconds: float) -> None:
        """A step of the model."""
        if tokens >= self.MIN_TOKENS:
            self._computing.sample(tokens, seconds)

    @property
    def tokens_per_s(self) -> float | None:
        """How fast the model computes prompts; None while that was not measured."""
        return self._computing.value

    def patience_s(self, blocks: int) -> float:
        """How long to wait for so many blocks before the tier counts as stuck; infinite while unmeasured."""
        reading = self._reading.value
        return self.PATIENCE_S + self.PATIENCE * blocks / reading if reading else np.inf

    def paying(self, reads: NDArray[np.int64], queued: int, now: float) -> int:
        """How many of the first blocks of a prompt to load.

        reads: shape (n,), for the first 1 .. n blocks how many have to be read, or NOT_TO_BE_HAD; the others
        are in faster memory. queued: blocks to be read before these.
        """
        lengths = np.flatnonzero(reads != NOT_TO_BE_HAD) + 1
        if not len(lengths):
            return 0
        reads = reads[lengths - 1]
        reading, computing = self._reading.value, self._computing.value
        if computing is None or not reads[-1]:
            return int(lengths[-1])
        if reading is None:
            return self._with_reads(lengths, reads, self.FIRST_BLOCKS)
        # What can be had without reading.
        head = self._with_reads(lengths, reads, 0)
        read_s = self.MARGIN / reading if reading > 0 else np.inf
        gain = (lengths - head) * (self._block_size / computing)
        gain[reads > 0] -= (reads[reads > 0] + queued) * read_s
        best = int(np.argmax(gain))
        if gain[best] > 0:
            return int(lengths[best])
        if now - self._read_at > self.RETRY_S:
            return self._with_reads(lengths, reads, self.RETRY_BLOCKS)
        return head

    @staticmethod
    def _with_reads(lengths: NDArray[np.int64], reads: NDArray[np.int64], most: int) -> int:
        """The longest length that needs at most so many reads."""
        return int(lengths[reads <= most].max(initial=0))


class StepTimes:
    """How long the model takes for steps: they may be planned ahead, but it computes one after the other."""

    def __init__(self, estimate: LoadEstimate) -> None:
        self._estimate = estimate
        self._under_way: deque[tuple[float, int]] = deque(maxlen=64)  # planned when, tokens
        self._over_at = 0.0  # the last of all

    def planned(self, tokens: int, now: float) -> bool:
        """A step of so many tokens is given to the ranks; whether they shall say when it is over."""
        timed = tokens >= LoadEstimate.MIN_TOKENS
        if timed:
            self._under_way.append((now, tokens))
        return timed

    def over(self, timed: bool, now: float) -> None:
        """A step is over; timed: the ranks have said so of the oldest one that they should."""
        if timed and self._under_way:
            planned, tokens = self._under_way.popleft()
            self._estimate.computed(tokens, now - max(planned, self._over_at))
        self._over_at = now
