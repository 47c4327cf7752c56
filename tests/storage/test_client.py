"""The worker's end and a real I/O process: what becomes of batches when it dies, hangs or is busy."""

import logging
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.storage.messages import Status
from kvbm.storage.store import Identity
from tests.storage.harness import NAMESPACE, Host, key, open_disk
from tests.storage.rank import DISK_SLOTS, RECORD_BYTES, Rank, numbers, rank, wait_gone

ALL = numbers(range(DISK_SLOTS))


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def kill(it: Rank, how: int = signal.SIGKILL) -> int:
    pid = it.pid
    os.kill(pid, how)
    return pid


def wait_for_another_process(it: Rank, old: int) -> None:
    it.wait(lambda: it.client.pid not in (None, old) and it.client.ready)


# ---- work


def test_records_make_the_round_trip_and_are_found_by_the_next_process(tmp_path: Path) -> None:
    with rank(tmp_path) as it:
        assert it.found_records() == {}
        assert it.wrote(ALL)
        assert it.held(ALL) == ALL
        assert it.held(numbers(range(4), plus=1)) == {}
    with rank(tmp_path) as it:
        assert it.found_records() == ALL
        assert it.held(ALL) == ALL


def test_more_records_are_found_than_fit_one_message(tmp_path: Path) -> None:
    slots = 10_000
    host = Host(1, 100)
    folder = tmp_path / "drive-0"
    store = open_disk(tmp_path, Identity(NAMESPACE, 100), slots, host.memory, host.slot_bytes, o_direct=False)
    store.recover()
    for slot in range(slots):
        store.write(slot, key(slot), host.slots[0])
    store.close()
    it = Rank(folder, disk_slots=slots, record_bytes=100, slot_bytes=4096)
    it.wait_ready()
    assert it.found_records() == numbers(range(slots))
    it.close()


def test_a_result_says_which_records_failed_and_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with rank(tmp_path) as it:
        assert it.wrote(numbers(range(4)))
        with (tmp_path / "records-01.kvbm").open("r+b") as file:
            file.seek(4096 + 4096 + 17)
            file.write(bytes([file.read(1)[0] ^ 4]))
        with caplog.at_level(logging.WARNING):
            result = it.result(it.read(numbers(range(4))))
            it.wait(lambda: "checksum" in caplog.text)
        assert result.status == Status.DAMAGED
        assert result.failed.tolist() == [1]
        assert int(result.checksums[1]) == 0
        assert it.checked(numbers(range(4)), result) == {0: 0, 2: 2, 3: 3}


def test_a_record_that_changed_in_host_memory_is_not_written(tmp_path: Path) -> None:
    with rank(tmp_path) as it:
        os.kill(it.pid, signal.SIGSTOP)
        id_ = it.write(numbers(range(3)))
        it.data(1)[7] ^= 1
        os.kill(it.pid, signal.SIGCONT)
        result = it.result(id_)
        assert (result.status, result.failed.tolist()) == (Status.DAMAGED, [1])
        assert it.held(numbers(range(3))) == {0: 0, 2: 2}


def test_discard_and_clear(tmp_path: Path) -> None:
    with rank(tmp_path) as it:
        assert it.wrote(ALL)
        it.client.discard(np.array([3, 5], np.int32))
        left = {slot: number for slot, number in ALL.items() if slot not in (3, 5)}
        assert it.held(ALL) == left
    with rank(tmp_path) as it:
        assert it.found_records() == left
        it.client.clear()
        assert it.held(ALL) == {}
        assert it.wrote({9: 9})
    with rank(tmp_path) as it:
        assert it.found_records() == {9: 9}
        assert it.held(ALL) == {9: 9}


@pytest.mark.parametrize("seed", range(8))
def test_a_clearing_is_one_of_all_writes_before_it(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with rank(tmp_path, threads=8) as it:
        ids = [it.write({slot: slot}) for slot in range(DISK_SLOTS)]
        time.sleep(chance.random() * 0.006)
        it.client.clear()
        late = it.write({0: 500}) if it.result(ids[0]) else 0
        for id_ in ids:
            it.result(id_)
        assert it.result(late).status == Status.DONE
    with rank(tmp_path) as it:
        assert it.found_records() == {0: 500}


def test_what_is_late_is_not_begun(tmp_path: Path) -> None:
    it = Rank(tmp_path, clock=Clock(), threads=1).wait_ready()
    assert it.wrote({0: 0})
    result = it.result(it.write(numbers(range(1, DISK_SLOTS)), timeout_s=1e-6))
    assert result.status == Status.TIMEOUT
    assert len(result.failed) == DISK_SLOTS - 1
    assert it.result(it.read({0: 0}, timeout_s=1e-6)).status == Status.TIMEOUT
    assert it.held(ALL) == {0: 0}
    it.close()


def test_the_socket_is_asked_when_there_is_a_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rank(tmp_path) as it:
        asked = []
        receive = it.client._receive

        def counted(*args: Any, **kwargs: Any) -> None:
            asked.append(args)
            receive(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(it.client, "_receive", counted)
            patch.setattr("kvbm.storage.client._LOOK_EVERY", 10**9)  # nor by looking after the process
            for _ in range(100):
                it.poll()
            assert not asked
            assert it.wrote({1: 11, 2: 12})
            assert it.held({1: 11, 2: 12}) == {1: 11, 2: 12}
            assert 2 <= len(asked) <= 4  # with log lines


# ---- a process that dies


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_process_costs_its_batches_and_nothing_else(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with rank(tmp_path) as it:
        assert it.wrote(numbers(range(16)))
        ids = {it.write({slot: slot}): slot for slot in range(16, DISK_SLOTS)}
        reads = [it.read(numbers(range(16)), wipe=i == 0) for i in range(10)]
        time.sleep(chance.random() * 0.003)
        old = kill(it)
        for id_ in [*ids, *reads]:
            assert it.result(id_).status in (Status.DONE, Status.UNAVAILABLE)
        for id_ in (it.write({0: 100}), it.read({1: 1})):  # nobody is there now
            assert it.result(id_, 0.5).status == Status.UNAVAILABLE
            assert it.results[id_].failed.tolist() == [0]
        wait_for_another_process(it, old)
        done = {slot: slot for id_, slot in ids.items() if it.results[id_].status == Status.DONE}
        expected = numbers(range(16)) | done
        assert it.held(expected) == expected
        assert it.wrote({0: 200})
        assert it.held({0: 200}) == {0: 200}
        assert it.found_records() == {}  # of the first process: later ones find what is known


def test_a_process_that_dies_again_and_again_is_started_less_often(tmp_path: Path) -> None:
    clock = Clock()
    it = Rank(tmp_path, clock=clock).wait_ready()
    for pause in (1.0, 2.0, 4.0, 8.0):
        old = kill(it)
        it.wait(lambda: it.client.pid is None)
        clock.now += pause - 0.1
        for _ in range(20):
            it.poll()
            time.sleep(0.005)
        assert it.client.pid is None
        clock.now += 0.2
        wait_for_another_process(it, old)
        clock.now += 5
    clock.now += 1000  # it lived long
    old = kill(it)
    it.wait(lambda: it.client.pid is None)
    clock.now += 1.1
    wait_for_another_process(it, old)
    it.close()


def test_a_process_that_hangs_is_killed_after_twice_the_timeout(tmp_path: Path) -> None:
    with rank(tmp_path) as it:
        assert it.wrote(numbers(range(8)))
        old = kill(it, signal.SIGSTOP)
        begin = time.monotonic()
        ids = [it.read(numbers(range(8)), timeout_s=0.4), it.write({9: 9}, timeout_s=20.0)]
        for id_ in ids:
            assert it.result(id_).status == Status.UNAVAILABLE
        assert 0.8 <= time.monotonic() - begin < 3.0
        assert wait_gone(old, 1.0) < 1.0
        wait_for_another_process(it, old)
        assert it.held(numbers(range(8))) == numbers(range(8))


def test_batches_are_not_taken_as_hanging_while_a_new_process_looks_for_records(tmp_path: Path) -> None:
    with rank(tmp_path) as it:
        assert it.wrote({0: 0})
        old = kill(it)
        it.wait(lambda: it.client.pid not in (None, old))
        new = kill(it, signal.SIGSTOP)  # as slow as can be
        if not it.client.ready:
            assert it.result(it.read({0: 0}, timeout_s=0.05), 0.5).status == Status.UNAVAILABLE
            time.sleep(0.2)
            it.poll()
        os.kill(new, signal.SIGCONT)
        it.wait(lambda: it.client.ready)
        assert it.pid == new
        assert it.held({0: 0}) == {0: 0}


def test_more_batches_than_a_busy_process_takes_fail_at_once(tmp_path: Path) -> None:
    with rank(tmp_path) as it:
        os.kill(it.pid, signal.SIGSTOP)
        ids = [it.write({slot % DISK_SLOTS: slot}, checksums=False) for slot in range(3000)]
        it.poll()
        refused = len(it.results)
        assert 0 < refused < 3000
        os.kill(it.pid, signal.SIGCONT)
        for id_ in ids:
            it.result(id_)
        assert sum(result.status == Status.DONE for result in it.results.values()) == 3000 - refused


# ---- what must not be lost


@pytest.mark.parametrize("moment", ["before", "unread", "down"])
def test_clear_and_discard_survive_a_killed_process(tmp_path: Path, moment: str) -> None:
    for what in ("clear", "discard"):
        folder = tmp_path / what
        with rank(folder) as it:
            assert it.wrote(numbers(range(8)))
            old = it.pid
            if moment == "unread":
                os.kill(old, signal.SIGSTOP)
            elif moment == "down":
                kill(it)
                it.wait(lambda: it.client.pid is None)
            if what == "clear":
                it.client.clear()
            else:
                it.client.discard(np.array([1, 2], np.int32))
            if moment != "down":
                kill(it)
            wait_for_another_process(it, old)
            if what == "discard" and moment != "down":
                continue  # it may be lost with the process: found out when it is read
            left = {} if what == "clear" else {slot: slot for slot in range(8) if slot not in (1, 2)}
            assert it.held(numbers(range(8))) == left
            assert it.wrote({2: 77})
        with rank(folder) as it:
            assert it.found_records() == {**left, 2: 77}


def test_a_clearing_survives_an_engine_that_ends_while_the_process_is_down(tmp_path: Path) -> None:
    with rank(tmp_path) as it:
        assert it.wrote(numbers(range(8)))
        os.kill(it.pid, signal.SIGSTOP)
        it.client.clear()
        kill(it)
    with rank(tmp_path) as it:
        assert it.found_records() == {}


def test_a_discard_that_had_to_wait_does_not_hit_a_later_write(tmp_path: Path) -> None:
    with rank(tmp_path) as it:
        assert it.wrote({5: 5})
        os.kill(it.pid, signal.SIGSTOP)
        for _ in range(600):  # more than the socket takes
            it.client.discard(np.array([5], np.int32))
        id_ = it.write({5: 55})
        os.kill(it.pid, signal.SIGCONT)
        while it.result(id_).status == Status.UNAVAILABLE:
            id_ = it.write({5: 55})
        time.sleep(0.1)
        assert it.held({5: 55}) == {5: 55}


# ---- a store that can't be had


def test_a_refused_store_fails_every_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "file"
    folder.write_text("")
    with caplog.at_level(logging.ERROR):
        it = Rank(tmp_path / "fine", folders=[str(folder / "sub")])
        it.wait(lambda: it.client.refused is not None)
    assert "Not a directory" in str(it.client.refused)
    assert "can't be used" in caplog.text
    assert it.result(it.write({0: 0})).status == Status.UNAVAILABLE
    it.client.clear()
    it.client.discard(np.array([1], np.int32))
    it.wait(lambda: it.client.pid is None)
    time.sleep(1.2)
    it.poll()
    assert it.client.pid is None  # it is not tried again
    assert it.result(it.read({0: 0})).status == Status.UNAVAILABLE
    it.close()


def test_two_engines_on_one_folder(tmp_path: Path) -> None:
    """The second waits, as the first may be about to end, and then says who has it."""
    with rank(tmp_path) as first:
        assert first.wrote({0: 0})
        second = Rank(tmp_path)
        second.wait(lambda: second.client.refused is not None, 20.0)
        assert f"in use by another engine (process {os.getpid()})" in str(second.client.refused)
        second.close()
        third = Rank(tmp_path)
        time.sleep(0.5)
        third.poll()
        assert not third.client.ready
    assert third.wait_ready().held({0: 0}) == {0: 0}
    third.close()


def test_a_clearing_that_fails_is_tried_again(tmp_path: Path) -> None:
    with rank(tmp_path) as it:
        assert it.wrote(numbers(range(8)))
        old = it.pid
        resource.prlimit(old, resource.RLIMIT_FSIZE, (0, 0))  # each write to a file fails with EFBIG
        it.client.clear()
        wait_for_another_process(it, old)
        assert it.held(numbers(range(8))) == {}
    with rank(tmp_path) as it:
        assert it.found_records() == {}


def test_slots_of_odd_sizes(tmp_path: Path) -> None:
    assert RECORD_BYTES % 4096
    with rank(tmp_path, threads=1, disk_slots=7) as it:
        assert it.wrote(numbers(range(7)))
        assert it.held(numbers(range(7))) == numbers(range(7))
