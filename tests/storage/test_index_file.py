"""What the index's file says after a commit: read from the file, as the next run would after a crash."""

from pathlib import Path

import numpy as np
import pytest

from kvbm.storage.index_file import SavedIndex, State, read_index
from tests.storage.harness import Host, Opened, identity, open_disk

SLOTS = 1000


def saved(folder: Path) -> SavedIndex:
    index = read_index(folder / "drive-0" / "index.kvbm")
    assert index is not None
    return index


def slots_with(index: SavedIndex, state: State) -> list[int]:
    return np.flatnonzero(index.entries["state"] == state).tolist()


@pytest.mark.parametrize(
    "slots", [[7], [0, 1, 5, 300, 301, 999], list(range(SLOTS)), list(range(0, SLOTS, 120))]
)
def test_a_commit_says_what_is_safe(tmp_path: Path, slots: list[int]) -> None:
    host = Host(SLOTS, identity(100).record_bytes)
    store = open_disk(tmp_path, identity(100), SLOTS, host.memory, host.slot_bytes)
    it = Opened(store, host)
    it.recover()
    for slot in reversed(slots):
        it.write(slot, slot)
    assert slots_with(saved(tmp_path), State.PENDING) == slots
    again = slots[len(slots) // 2]
    it.write(again, 5000)  # within one commit: the first of the two is passed over
    store.commit()
    index = saved(tmp_path)
    assert slots_with(index, State.STORED) == slots
    expected = [5000 if slot == again else slot for slot in slots]
    assert index.entries["low"][slots].tolist() == expected
    it.write(again, 6000)
    assert slots_with(saved(tmp_path), State.PENDING) == [again]
    store.close()
    assert slots_with(saved(tmp_path), State.STORED) == slots


def test_what_is_written_again_during_a_commit_is_not_safe(tmp_path: Path) -> None:
    host = Host(4, identity().record_bytes)
    store = open_disk(tmp_path, identity(), 4, host.memory, host.slot_bytes)
    it = Opened(store, host)
    it.recover()
    it.write(1, 1)
    it.write(2, 2)
    sync = store._io.sync

    def sync_late(fd: int) -> None:
        sync(fd)
        if not it.holds(2, 3):
            it.write(2, 3)

    store._io.sync = sync_late
    store.commit()
    index = saved(tmp_path)
    assert slots_with(index, State.STORED) == [1]
    assert slots_with(index, State.PENDING) == [2]
    store.close()
