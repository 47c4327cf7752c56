"""A rank's store takes over what another number of ranks has stored beside it, and leaves theirs as it is."""

import fcntl
import hashlib
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvbm.errors import StorageError
from kvbm.storage import adoption
from kvbm.storage.adoption import Adoption
from kvbm.storage.containers import Allocation, rank_folder
from kvbm.storage.disk_store import DiskStore
from kvbm.storage.file_io import PosixFileIo
from kvbm.storage.index_file import ENTRY, State, checks
from kvbm.storage.process import Channel
from kvbm.storage.reply_count import ReplyCount
from kvbm.storage.split import Part, Split
from kvbm.storage.store import Bytes, Identity
from tests.storage.harness import NAMESPACE, Host, digest, key, number_of
from tests.storage.test_split import record

SPLIT = Split(4, (Part(10, 48), Part(3, 500)))
SLOTS = 24


class Rank:
    """One rank's store, and what it found."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: int,
        *,
        slots: int = SLOTS,
        drives: int = 1,
        namespace: bytes = NAMESPACE,
        split: Split = SPLIT,
        alive: Callable[[], bool] = lambda: True,
        io: PosixFileIo | None = None,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        who = Identity(namespace, split.record_bytes(ranks), rank, ranks)
        self.host = Host(1, who.record_bytes)
        folders = [rank_folder(folder / f"drive-{i}", rank, ranks) for i in range(drives)]
        for each in folders:
            each.mkdir(parents=True, exist_ok=True)
        self.store = DiskStore(
            folders,
            who,
            slots,
            self.host.memory,
            slot_bytes=self.host.slot_bytes,
            io=io,
            how=Allocation(o_direct=False),
            adoption=Adoption(split, alive),
        )
        found = self.store.recover()
        self.found = {
            int(slot): number_of(hash_) for slot, hash_ in zip(found.slots, found.hashes, strict=True)
        }

    def want(self, number: int) -> Bytes:
        return record(SPLIT, number, self.rank, self.ranks)

    def write(self, slot: int, number: int) -> None:
        self.host.data(0)[:] = self.want(number)
        self.store.write(slot, key(number), self.host.slots[0], digest(self.host.data(0)))

    def holds(self, slot: int, number: int) -> bool:
        self.host.slots[0] = 0xEE
        try:
            self.store.read(slot, key(number), self.host.slots[0])
        except StorageError:
            return False
        assert (self.host.data(0) == self.want(number)).all(), f"wrong bytes for {number}"
        return True


@contextmanager
def ranks_of(folder: Path, ranks: int, **how: object) -> Iterator[list[Rank]]:
    """All ranks of an engine, one after the other."""
    opened = [Rank(folder, rank, ranks, **how) for rank in range(ranks)]  # type: ignore[arg-type]
    try:
        yield opened
    finally:
        for each in opened:
            each.store.close()


def stored(folder: Path, ranks: int, records: dict[int, int], **how: object) -> None:
    """records: slot to number."""
    with ranks_of(folder, ranks, **how) as engine:
        for rank in engine:
            for slot, number in records.items():
                rank.write(slot, number)


def files_of(folder: Path, ranks: int) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for rank in range(ranks)
        for path in rank_folder(folder / "drive-0", rank, ranks).iterdir()
    }


def place(folder: Path, rank: int, ranks: int, slot: int) -> tuple[Path, int]:
    stride = 4096 + Host(1, SPLIT.record_bytes(ranks)).slot_bytes
    own = rank_folder(folder / "drive-0", rank, ranks)
    return own / f"records-{slot % 4:02d}.kvbm", 4096 + slot // 4 * stride


def flip(folder: Path, rank: int, ranks: int, slot: int, at: int) -> None:
    path, offset = place(folder, rank, ranks, slot)
    with path.open("r+b") as file:
        file.seek(offset + at)
        byte = file.read(1)[0]
        file.seek(offset + at)
        file.write(bytes([byte ^ 4]))


RECORDS = {slot: 100 + slot for slot in range(0, SLOTS, 2)}


@pytest.mark.parametrize("drives", [1, 2])
@pytest.mark.parametrize(
    ("theirs", "ours"), [(1, 2), (2, 1), (4, 2), (2, 4), (1, 8), (8, 1), (8, 2), (4, 8), (4, 1)]
)
def test_every_rank_gets_its_heads_in_the_same_slots(
    tmp_path: Path, theirs: int, ours: int, drives: int
) -> None:
    stored(tmp_path, theirs, RECORDS, drives=drives)
    before = files_of(tmp_path, theirs)
    for _ in range(2):  # taken over, and found again
        with ranks_of(tmp_path, ours, drives=drives) as engine:
            for rank in engine:
                assert rank.found == RECORDS
                assert all(rank.holds(slot, number) for slot, number in RECORDS.items())
            engine[0].write(1, 7)
            assert engine[0].holds(1, 7)
            engine[0].store.discard(1)
    assert files_of(tmp_path, theirs) == before


def test_their_order_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    with ranks_of(tmp_path, 2) as engine:
        for slot, number in ((7, 1), (3, 2), (9, 3)):
            for rank in engine:
                rank.write(slot, number)
            now += 61 if number == 2 else 0
    with ranks_of(tmp_path, 1) as (one,):
        assert list(one.found.items()) == [(3, 2), (7, 1), (9, 3)]
        now -= 3600
        one.write(0, 4)
    with ranks_of(tmp_path, 1) as (one,):
        assert list(one.found) == [0, 3, 7, 9]


# ---- what can't be had is left out


@pytest.mark.parametrize("at", [20, 60, 4096, 4096 + 700])
def test_a_damaged_record_is_left_out(tmp_path: Path, at: int) -> None:
    stored(tmp_path, 2, RECORDS)
    flip(tmp_path, 1, 2, 4, at)
    with ranks_of(tmp_path, 1) as (one,):
        assert one.found == {slot: number for slot, number in RECORDS.items() if slot != 4}
        assert not one.holds(4, 104)
    with ranks_of(tmp_path, 4) as engine:
        lacking = [rank for rank in engine if 4 not in rank.found]
        assert [rank.rank for rank in lacking] == [2, 3]  # whose heads the damaged record has
        assert all(rank.found.keys() | {4} == RECORDS.keys() for rank in engine)


def test_what_one_of_their_ranks_lacks_no_rank_takes(tmp_path: Path) -> None:
    with ranks_of(tmp_path, 2) as engine:
        for rank in engine:
            for slot, number in RECORDS.items():
                rank.write(slot, number)
        engine[1].store.discard(6)
        engine[0].write(8, 999)
        engine[1].write(8, 998)
    with ranks_of(tmp_path, 4) as engine:
        for rank in engine:
            assert rank.found == {slot: number for slot, number in RECORDS.items() if slot not in (6, 8)}


def test_another_model_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stored(tmp_path, 1, RECORDS, namespace=b"another one here")
    with ranks_of(tmp_path, 2) as engine:
        assert [rank.found for rank in engine] == [{}, {}]
    assert caplog.text.count("of another model, geometry or engine") == 2


def test_a_number_of_ranks_that_the_heads_do_not_allow(tmp_path: Path) -> None:
    stored(tmp_path, 3, RECORDS, split=Split(3, SPLIT.parts))
    with ranks_of(tmp_path, 2) as engine:
        assert [rank.found for rank in engine] == [{}, {}]


def test_a_running_engine_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with ranks_of(tmp_path, 2) as theirs:
        for rank in theirs:
            rank.write(3, 1)
            rank.store.commit()
        theirs[0].store.close()  # one of its ranks has gone
        with ranks_of(tmp_path, 1) as (one,):
            assert one.found == {}
            assert "rank-1-of-2 open" in caplog.text
        Rank(tmp_path, 0, 2).store.close()
    with ranks_of(tmp_path, 1) as (one,):
        assert one.found == {3: 1}


def test_ranks_read_the_same_files_at_once(tmp_path: Path) -> None:
    stored(tmp_path, 1, RECORDS)
    with (rank_folder(tmp_path / "drive-0", 0, 1) / "lock").open() as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        with ranks_of(tmp_path, 2) as engine:
            assert [rank.found for rank in engine] == [RECORDS] * 2


@pytest.mark.parametrize("what", ["index", "records"])
def test_files_that_are_not_whole_are_left_alone(tmp_path: Path, what: str) -> None:
    stored(tmp_path, 1, RECORDS)
    own = rank_folder(tmp_path / "drive-0", 0, 1)
    if what == "index":
        os.truncate(own / "index.kvbm", 4096 + 40 * SLOTS - 1)
    else:
        os.truncate(own / "records-03.kvbm", 10_000)
    before = files_of(tmp_path, 1)
    with ranks_of(tmp_path, 2) as engine:
        assert [rank.found for rank in engine] == [{}, {}]
    assert files_of(tmp_path, 1) == before


def test_what_a_killed_engine_was_writing_is_checked_and_taken(tmp_path: Path) -> None:
    stored(tmp_path, 1, RECORDS)
    entries = np.memmap(rank_folder(tmp_path / "drive-0", 0, 1) / "index.kvbm", ENTRY, "r+", 4096)
    pending = entries[2:4].copy()
    pending["state"] = State.PENDING
    pending["check"] = checks(pending)
    entries[2] = pending[0]
    entries.flush()
    with ranks_of(tmp_path, 2) as engine:
        assert [rank.found for rank in engine] == [RECORDS] * 2


def test_an_error_of_ours_does_not_keep_the_tier_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("not foreseen")

    stored(tmp_path, 1, RECORDS)
    monkeypatch.setattr(adoption, "choose", fail)
    with ranks_of(tmp_path, 2) as engine:
        assert [rank.found for rank in engine] == [{}, {}]
        assert "not foreseen" in caplog.text
        engine[1].write(0, 1)
        assert engine[1].holds(0, 1)


# ---- what is ours stays


def test_what_lies_here_already_stays(tmp_path: Path) -> None:
    stored(tmp_path, 1, {0: 10, 1: 11, 2: 12, 3: 13})
    rank_folder(tmp_path / "drive-0", 0, 1).rename(tmp_path / "aside")
    stored(tmp_path, 2, {0: 20, 9: 11})
    (tmp_path / "aside").rename(rank_folder(tmp_path / "drive-0", 0, 1))
    with ranks_of(tmp_path, 2) as engine:
        for rank in engine:
            assert rank.found == {0: 20, 9: 11, 2: 12, 3: 13}  # 10: its slot is taken, 11: is here
            assert all(rank.holds(slot, number) for slot, number in rank.found.items())


def test_slots_that_a_smaller_cache_lacks(tmp_path: Path) -> None:
    stored(tmp_path, 1, RECORDS)
    with ranks_of(tmp_path, 2, slots=10) as engine:
        for rank in engine:
            assert rank.found == {slot: number for slot, number in RECORDS.items() if slot < 10}


def test_what_was_cleared_does_not_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_800_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    stored(tmp_path, 1, RECORDS)
    with ranks_of(tmp_path, 2) as engine:
        assert engine[0].found == RECORDS
        for rank in engine:
            rank.store.clear()
    for _ in range(2):
        with ranks_of(tmp_path, 2) as engine:
            assert [rank.found for rank in engine] == [{}, {}]
    # But what was stored since then does.
    now += 1
    stored(tmp_path, 1, {1: 50})
    with ranks_of(tmp_path, 2) as engine:
        assert [rank.found for rank in engine] == [{1: 50}] * 2


def test_what_they_have_cleared_is_not_taken(tmp_path: Path) -> None:
    with ranks_of(tmp_path, 1) as (one,):
        for slot, number in RECORDS.items():
            one.write(slot, number)
        one.store.clear()
        one.write(5, 55)
    with ranks_of(tmp_path, 2) as engine:
        assert [rank.found for rank in engine] == [{5: 55}] * 2


def test_what_they_were_just_clearing_is_not_taken(tmp_path: Path) -> None:
    """The power went when the records were invalid and the index did not say so yet."""
    stored(tmp_path, 1, RECORDS)
    index = rank_folder(tmp_path / "drive-0", 0, 1) / "index.kvbm"
    before = index.read_bytes()
    with ranks_of(tmp_path, 1) as (one,):
        one.store.clear()
    index.write_bytes(before)
    with ranks_of(tmp_path, 2) as engine:
        assert [rank.found for rank in engine] == [{}, {}]


# ---- it ends at any moment


def test_an_engine_that_ends_is_not_held_up(tmp_path: Path) -> None:
    stored(tmp_path, 1, RECORDS)
    answers = iter([True] * 5)
    with ranks_of(tmp_path, 2, alive=lambda: next(answers, False)) as engine:
        first = engine[0].found
        assert 0 < len(first) <= 5
        assert engine[1].found == {}
    with ranks_of(tmp_path, 2) as engine:  # the next start goes on
        assert [rank.found for rank in engine] == [RECORDS] * 2


def test_it_takes_a_minute_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path, 1, RECORDS)
    monkeypatch.setattr(adoption, "_PATIENCE_S", 0.0)
    with ranks_of(tmp_path, 2) as engine:
        assert [rank.found for rank in engine] == [{}, {}]


def test_an_engine_that_ended_is_noticed_before_its_requests_are_read() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours, ReplyCount())
    assert channel.is_open()
    theirs.send(b"a request that waits")
    assert channel.is_open()
    theirs.close()
    assert not channel.is_open()


@pytest.mark.parametrize("writes", [1, 4, 7])
def test_kill_9_leaves_whole_records(tmp_path: Path, writes: int) -> None:
    stored(tmp_path, 2, RECORDS)
    process = multiprocessing.get_context("spawn").Process(target=_adopt_and_die, args=(tmp_path, writes))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with ranks_of(tmp_path, 1, alive=lambda: False) as (one,):
        assert writes - 1 <= len(one.found) < len(RECORDS)
        assert one.found.items() <= RECORDS.items()
        assert all(one.holds(slot, number) for slot, number in one.found.items())
    with ranks_of(tmp_path, 1) as (one,):
        assert one.found == RECORDS


def _adopt_and_die(folder: Path, writes: int) -> None:
    adoption._THREADS = 1
    adoption._COMMIT_EVERY = 3
    seen = 0

    class Io(PosixFileIo):
        def write(self, fd: int, offset: int, buffers: Sequence[Bytes]) -> None:
            nonlocal seen
            if len(buffers) == 2:  # a header and a record
                seen += 1
                if seen == writes:
                    super().write(fd, offset, [buffers[0], buffers[1][:1000]])  # torn
                    os.kill(os.getpid(), signal.SIGKILL)
            super().write(fd, offset, buffers)

    Rank(folder, 0, 1, io=Io())
