"""A rank as storage sees it: host memory, and the real client with its real I/O process."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kvbm.storage.client import BatchResult, StorageClient
from kvbm.storage.messages import Batch, Options, Status
from kvbm.storage.store import Bytes, Found
from kvbm.transfer.arena import HostArena
from tests.storage.harness import NAMESPACE, content, digest, key

RECORD_BYTES = 5000
DISK_SLOTS = 64
HOST_SLOTS = 64


def options_of(folder: Path, **changes: Any) -> Options:
    standard: dict[str, Any] = {
        "folders": [str(folder)],
        "namespace": NAMESPACE,
        "rank": 0,
        "ranks": 1,
        "record_bytes": RECORD_BYTES,
        "slot_bytes": 8192,
        "host_slots": HOST_SLOTS,
        "disk_slots": DISK_SLOTS,
        "backend": "posix",
        "threads": 4,
        "zerofill_fallback": False,
        "o_direct": True,
        "open_direct": False,
        "min_free_bytes": 0,
    }
    return Options(**{**standard, **changes})


class Rank:
    """Writes and reads records that numbers stand for, each through the host slot of the same number."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic, **changes: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.arena = HostArena(HOST_SLOTS, RECORD_BYTES)
        self.client = StorageClient(options_of(folder, **changes), self.arena.fd, clock=clock)
        self.results: dict[int, BatchResult] = {}
        self.found: list[Found] = []
        self._last = 0

    # ---- requests

    def write(self, records: dict[int, int], *, timeout_s: float = 30.0, checksums: bool = True) -> int:
        """records: disk slot to number."""
        digests = []
        for slot, number in records.items():
            self.data(slot)[:] = content(number, RECORD_BYTES)
            digests.append(digest(self.data(slot)))
        known = np.array(digests, np.uint64).tobytes() if checksums else b""
        return self._submit(True, records, timeout_s, known)

    def read(self, records: dict[int, int], *, timeout_s: float = 30.0, wipe: bool = True) -> int:
        """wipe: the slots, which no other batch may be using."""
        for slot in records if wipe else ():
            self.data(slot)[:] = 0xEE
        return self._submit(False, records, timeout_s, b"")

    def _submit(self, write: bool, records: dict[int, int], timeout_s: float, checksums: bytes) -> int:
        self._last += 1
        slots = np.array(list(records), np.int32).tobytes()
        hashes = b"".join(key(number).hash for number in records.values())
        groups = bytes(len(records))
        self.client.submit(Batch(self._last, write, slots, slots, hashes, groups, checksums, timeout_s))
        return self._last

    def data(self, slot: int) -> Bytes:
        return self.arena.slots[slot, :RECORD_BYTES]

    # ---- answers

    def poll(self) -> None:
        replies = self.client.poll()
        for result in replies.results:
            assert result.id not in self.results, "a batch got two results"
            self.results[result.id] = result
        self.found += replies.found

    def wait(self, until: Callable[[], bool], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < end, f"nothing in {seconds} s"
            self.poll()
            time.sleep(0.002)

    def wait_ready(self) -> "Rank":
        self.wait(lambda: self.client.ready or self.client.refused is not None)
        assert self.client.refused is None
        return self

    def result(self, id_: int, seconds: float = 30.0) -> BatchResult:
        self.wait(lambda: id_ in self.results, seconds)
        return self.results[id_]

    def wrote(self, records: dict[int, int]) -> bool:
        return self.result(self.write(records)).status == Status.DONE

    def held(self, records: dict[int, int]) -> dict[int, int]:
        """Those of the records that are there. Wrong bytes fail the test."""
        if not records:
            return {}
        result = self.result(self.read(records))
        return self.checked(records, result)

    def checked(self, records: dict[int, int], result: BatchResult) -> dict[int, int]:
        served = {}
        for i, (slot, number) in enumerate(records.items()):
            if i in result.failed:
                continue
            assert (self.data(slot) == content(number, RECORD_BYTES)).all(), f"wrong bytes for {number}"
            assert int(result.checksums[i]) == digest(self.data(slot))
            served[slot] = number
        return served

    def found_records(self) -> dict[int, int]:
        return {
            int(slot): int(hash_[0])
            for found in self.found
            for slot, hash_ in zip(found.slots, found.hashes, strict=True)
        }

    @property
    def pid(self) -> int:
        assert self.client.pid is not None
        return self.client.pid

    def close(self) -> None:
        self.client.close()
        self.arena.close()


@contextmanager
def rank(folder: Path, **changes: Any) -> Iterator[Rank]:
    it = Rank(folder, **changes)
    try:
        yield it.wait_ready()
    finally:
        it.close()


def numbers(slots: Sequence[int], plus: int = 0) -> dict[int, int]:
    return {slot: slot + plus for slot in slots}


def is_gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_gone(pid: int, seconds: float) -> float:
    """Seconds until a process had ended."""
    begin = time.monotonic()
    while not is_gone(pid):
        assert time.monotonic() < begin + seconds, f"process {pid} still runs after {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - begin
