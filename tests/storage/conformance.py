"""What every RecordStore promises (kvbm/storage/store.py), as tests.

A module of tests for a kind of storage subclasses `Conformance` and gives it a fixture `backend`.
"""

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from kvbm.errors import DamagedRecordError, StorageError
from kvbm.storage.store import Identity
from tests.storage.harness import Backend, Host, Opened, as_dict, content, digest, identity, key, opened

SLOTS = 16


class Conformance:
    """Every test gets the fixture `backend`."""

    # ---- what is written can be read

    @pytest.mark.parametrize("record_bytes", [1, 4095, 4096, 5000, 12289, 1 << 20])
    def test_records_come_back_bit_by_bit(self, backend: Backend, tmp_path: Path, record_bytes: int) -> None:
        who = identity(record_bytes)
        with opened(backend, tmp_path, who=who) as it:
            for slot in range(SLOTS):
                it.write(slot, 100 + slot, group=slot % 2)
            assert all(it.holds(slot, 100 + slot, group=slot % 2) for slot in range(SLOTS))
        with opened(backend, tmp_path, who=who) as it:
            assert all(it.holds(slot, 100 + slot, group=slot % 2) for slot in range(SLOTS))

    def test_a_record_comes_back_to_another_place_in_memory(self, backend: Backend, tmp_path: Path) -> None:
        with opened(backend, tmp_path) as it:
            it.write(3, 1)
            target = it.host.slots[9]
            assert it.store.read(3, key(1), target) == digest(content(1, 5000))
            assert (it.host.data(9) == content(1, 5000)).all()

    def test_threads_work_on_slots_of_their_own(self, backend: Backend, tmp_path: Path) -> None:
        left: dict[int, int] = {}
        wrong: list[str] = []

        def work(it: Opened, slot: int) -> None:
            chance = random.Random(slot)
            held = None
            for step in range(60):
                number = 1000 * slot + step
                dice = chance.random()
                if dice < 0.5:
                    it.write(slot, number)
                    held = number
                elif dice < 0.6:
                    it.store.discard(slot)
                    held = None
                if held is not None and not it.holds(slot, held):
                    wrong.append(f"slot {slot} lost {held} in step {step}")
                if it.holds(slot, number + 500):
                    wrong.append(f"slot {slot} holds what was never written")
            if held is not None:
                left[slot] = held

        with opened(backend, tmp_path) as it:
            threads = [threading.Thread(target=work, args=(it, slot)) for slot in range(SLOTS)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                it.store.commit()
                time.sleep(0.01)
            for thread in threads:
                thread.join()
        assert not wrong
        with opened(backend, tmp_path, recover=False) as it:
            assert it.recover() == left

    # ---- what is not there is not served

    def test_an_empty_slot_has_nothing(self, backend: Backend, tmp_path: Path) -> None:
        with opened(backend, tmp_path, recover=False) as it:
            assert it.recover() == {}
            assert not it.holds(0, 1)
            assert not it.holds(SLOTS - 1, 0)

    def test_another_name_is_refused(self, backend: Backend, tmp_path: Path) -> None:
        with opened(backend, tmp_path) as it:
            it.write(5, 1, group=1)
            assert not it.holds(5, 2, of=1, group=1)
            assert not it.holds(5, 1, group=0)
            assert not it.holds(6, 1, group=1)
            assert it.holds(5, 1, group=1)

    @pytest.mark.parametrize(
        "other",
        [
            identity(namespace=b"another one here"),
            identity(rank=1, ranks=2),
            identity(rank=0, ranks=2),
            identity(record_bytes=5001),  # takes the same room
            identity(record_bytes=20000),
        ],
        ids=["namespace", "rank", "ranks", "record-bytes", "slot-bytes"],
    )
    def test_another_identity_finds_nothing(self, backend: Backend, tmp_path: Path, other: Identity) -> None:
        with opened(backend, tmp_path) as it:
            for slot in range(SLOTS):
                it.write(slot, slot)
        with opened(backend, tmp_path, who=other, recover=False) as it:
            assert it.recover() == {}
            assert not any(it.holds(slot, slot) for slot in range(SLOTS))
            it.write(0, 77)
            assert it.holds(0, 77)
        with opened(backend, tmp_path, recover=False) as it:
            assert 0 not in it.recover()
            assert not it.holds(0, 77)
            assert not it.holds(0, 0)

    def test_bytes_that_changed_before_the_write_are_refused(self, backend: Backend, tmp_path: Path) -> None:
        with opened(backend, tmp_path) as it:
            record = it.host.filled(2, 1)
            checksum = digest(it.host.data(2))
            record[100] ^= 1
            with pytest.raises(DamagedRecordError):
                it.store.write(2, key(1), record, checksum)
            assert not it.holds(2, 1)
        with opened(backend, tmp_path, recover=False) as it:
            assert it.recover() == {}

    # ---- what is replaced or removed stays away

    def test_the_last_write_to_a_slot_counts(self, backend: Backend, tmp_path: Path) -> None:
        with opened(backend, tmp_path) as it:
            for number in range(5):
                it.write(1, number)
            it.write(2, 50)
            it.write(2, 50, of=51)
            assert it.holds(1, 4)
            assert not any(it.holds(1, number) for number in range(4))
            assert it.holds(2, 50, of=51)
        with opened(backend, tmp_path, recover=False) as it:
            assert it.recover() == {1: 4, 2: 50}
            assert it.holds(1, 4)
            assert it.holds(2, 50, of=51)

    def test_what_is_discarded_is_gone_for_good(self, backend: Backend, tmp_path: Path) -> None:
        with opened(backend, tmp_path) as it:
            for slot in range(4):
                it.write(slot, slot)
            it.store.commit()
            for slot in (0, 1, 9):  # 9 holds nothing
                it.store.discard(slot)
            assert [it.holds(slot, slot) for slot in range(4)] == [False, False, True, True]
            it.write(1, 11)
        with opened(backend, tmp_path, recover=False) as it:
            assert it.recover() == {1: 11, 3: 3, 2: 2}
            assert not it.holds(0, 0)
            assert it.holds(1, 11)

    def test_what_is_cleared_is_gone_for_good(self, backend: Backend, tmp_path: Path) -> None:
        with opened(backend, tmp_path) as it:
            for slot in range(SLOTS):
                it.write(slot, slot)
            it.store.clear()
            assert not any(it.holds(slot, slot) for slot in range(SLOTS))
            it.write(0, 20)
            it.write(5, 25)
            it.store.discard(0)
            it.store.commit()
            assert it.holds(5, 25)
        for _ in range(2):
            with opened(backend, tmp_path, recover=False) as it:
                assert it.recover() == {5: 25}
                assert not any(it.holds(slot, slot) for slot in range(SLOTS))
                assert it.holds(5, 25)

    def test_clearing_while_threads_write(self, backend: Backend, tmp_path: Path) -> None:
        """What had been written before is gone; of what is being written nothing wrong is left."""
        ended: dict[int, float] = {}
        stop = threading.Event()

        def work(it: Opened, slot: int) -> None:
            number = 1000 * slot
            while not stop.is_set():
                number += 1
                try:
                    it.write(slot, number)
                except StorageError:
                    continue  # the store says so itself
                ended[number] = time.monotonic()

        for attempt in range(3):
            folder = tmp_path / str(attempt)
            stop.clear()
            with opened(backend, folder) as it:
                threads = [threading.Thread(target=work, args=(it, slot)) for slot in range(SLOTS)]
                for thread in threads:
                    thread.start()
                time.sleep(0.03)
                cleared = time.monotonic()
                it.store.clear()
                time.sleep(0.01)
                stop.set()
                for thread in threads:
                    thread.join()
            with opened(backend, folder, recover=False) as it:
                found = it.recover()
                assert found
                assert all(ended[number] > cleared for number in found.values())
                assert all(it.holds(slot, number) for slot, number in found.items())

    # ---- what was stored is found again

    def test_an_earlier_run_is_found_oldest_first(
        self, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 1_800_000_000.0  # begins a minute
        monkeypatch.setattr(time, "time", lambda: now)
        with opened(backend, tmp_path) as it:
            for slot, number in ((7, 1), (3, 2), (9, 3)):
                it.write(slot, number)
                now += 1
            now += 60
            it.write(1, 4)
            it.write(0, 5)
            now += 60
            it.write(3, 6)  # in place of 2
        with opened(backend, tmp_path, recover=False) as it:
            # Of one minute the last first.
            assert list(it.recover().items()) == [(9, 3), (7, 1), (0, 5), (1, 4), (3, 6)]
            now -= 3600  # a clock set back
            it.write(5, 7)
        with opened(backend, tmp_path, recover=False) as it:
            assert list(it.recover()) == [5, 9, 7, 0, 1, 3]

    def test_groups_are_found_with_their_records(self, backend: Backend, tmp_path: Path) -> None:
        with opened(backend, tmp_path) as it:
            it.write(0, 1, group=0)
            it.write(1, 1, group=3)
        with opened(backend, tmp_path, recover=False) as it:
            found = it.store.recover()
            assert dict(zip(found.slots.tolist(), found.groups.tolist(), strict=True)) == {0: 0, 1: 3}
            assert as_dict(found) == {0: 1, 1: 1}

    def test_a_block_that_was_written_twice_is_found_once(self, backend: Backend, tmp_path: Path) -> None:
        with opened(backend, tmp_path) as it:
            for slot, number in ((4, 1), (5, 2), (6, 1), (7, 1)):
                it.write(slot, number)
        with opened(backend, tmp_path, recover=False) as it:
            found = it.recover()
            assert sorted(found.values()) == [1, 2]
            assert all(it.holds(slot, number) for slot, number in found.items())

    def test_a_killed_process_leaves_what_it_wrote(self, backend: Backend, tmp_path: Path) -> None:
        process = multiprocessing.get_context("spawn").Process(
            target=_write_and_die, args=(backend, tmp_path)
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        with opened(backend, tmp_path, recover=False) as it:
            assert it.recover() == {0: 30, 2: 2, 3: 33, 4: 4}
            assert all(it.holds(slot, number) for slot, number in {0: 30, 2: 2, 3: 33, 4: 4}.items())
            it.write(1, 50)
            assert it.holds(1, 50)


def _write_and_die(backend: Backend, folder: Path) -> None:
    who = identity()
    host = Host(SLOTS, who.record_bytes)
    it = Opened(backend.open(folder, who, SLOTS, host.memory, host.slot_bytes), host)
    it.recover()
    for slot in range(4):
        it.write(slot, slot)
    it.store.commit()
    it.write(0, 30)  # from here on without a commit
    it.store.discard(1)
    it.write(3, 33)
    it.write(4, 4)
    os.kill(os.getpid(), signal.SIGKILL)
