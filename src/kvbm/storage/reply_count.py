"""How many replies the I/O process has sent, in memory that it shares with the worker.

An engine asks for replies in every step, mostly in vain. To ask a socket takes 26 us with caches as cold as a
pause of 5 ms leaves them, to look here 4.
"""

import mmap
import os


class ReplyCount:
    """One side writes, the other reads. `fd` is the file to hand over, until `close`; the memory remains."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("kvbm-replies") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, mmap.PAGESIZE)
        self._sent = memoryview(mmap.mmap(self.fd, mmap.PAGESIZE)).cast("q")
        self._received = 0

    def close(self) -> None:
        os.close(self.fd)

    def add_sent(self) -> None:
        """One thread at a time."""
        self._sent[0] += 1

    def add_received(self) -> None:
        self._received += 1

    @property
    def is_due(self) -> bool:
        return self._sent[0] > self._received
