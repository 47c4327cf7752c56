"""Power cuts at any moment, also while a store gets over the one before, and damaged index files."""

import copy
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.storage.crash import (
    Event,
    Image,
    RecordingIo,
    UnsyncedIo,
    cut,
    flip_bits,
    kill,
    lay_out,
    take_image,
)
from tests.storage.harness import Host, Opened, identity, open_disk

SLOTS = 12
WHO = identity(record_bytes=1500)
INDEX = "drive-0/index.kvbm"


@dataclass
class Known:
    """What a test knows of a store. Each number is written to one slot only."""

    safe: dict[int, int] = field(default_factory=dict)  # slot to number: committed, not touched since
    written: dict[int, list[int]] = field(default_factory=dict)  # slot to all numbers, in order
    gone: set[int] = field(default_factory=set)  # cleared


class Run:
    """A store on an image, until its power is cut."""

    def __init__(self, image: Image, folder: Path, known: Known, numbers: "Numbers") -> None:
        self.base = image
        self.known = known
        self._numbers = numbers
        lay_out(image, folder)
        self.io = RecordingIo(folder, lambda: copy.deepcopy(self.known))
        host = Host(SLOTS, WHO.record_bytes)
        store = open_disk(folder, WHO, SLOTS, host.memory, host.slot_bytes, io=self.io, o_direct=False)
        self.it = Opened(store, host)
        self._current: dict[int, int] = {}
        for number in self.it.recover().values():
            assert number not in self.known.gone

    def close(self) -> None:
        self.it.store.close()

    def write(self, slot: int) -> None:
        number = self._numbers.next()
        self.known.safe.pop(slot, None)
        self._current[slot] = number
        self.known.written.setdefault(slot, []).append(number)
        self.it.write(slot, number)

    def discard(self, slot: int) -> None:
        self.known.safe.pop(slot, None)
        self._current.pop(slot, None)
        self.it.store.discard(slot)

    def clear(self) -> None:
        self.known.safe = {}
        self._current = {}
        self.it.store.clear()
        self.known.gone = {number for numbers in self.known.written.values() for number in numbers}

    def commit(self) -> None:
        self.it.store.commit()
        self.known.safe |= self._current

    def act(self, chance: random.Random, steps: int) -> None:
        for _ in range(steps):
            dice = chance.random()
            slot = chance.randrange(SLOTS)
            if dice < 0.6:
                self.write(slot)
            elif dice < 0.75:
                self.discard(slot)
            elif dice < 0.95:
                self.commit()
            else:
                self.clear()

    def cuts(self, chance: random.Random, count: int) -> list[tuple[Image, Known]]:
        """What may be left after power cuts at `count` moments, and what is known then."""
        events = self.io.events
        moments = [chance.randrange(len(events) + 1) for _ in range(count)]
        return [(cut(self.base, events, at, chance), self.known_at(events, at)) for at in moments]

    def known_at(self, events: list[Event], at: int) -> Known:
        """What is certain before event `at` is over."""
        return copy.deepcopy(events[at].note if at < len(events) else self.known)


class Numbers:
    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        self._last += 1
        return self._last


def look_at(image: Image, known: Known, folder: Path, *, all_readable: bool = False) -> None:
    """Check what a store makes of an image. all_readable: it must find nothing but whole records."""
    lay_out(image, folder)
    host = Host(SLOTS, WHO.record_bytes)
    store = open_disk(folder, WHO, SLOTS, host.memory, host.slot_bytes, io=UnsyncedIo(), o_direct=False)
    it = Opened(store, host)
    found = it.recover()
    for slot, number in known.safe.items():
        assert found.get(slot) == number, f"committed record {number} in slot {slot} is not found"
        assert it.holds(slot, number), f"committed record {number} in slot {slot} can't be read"
    for slot, number in found.items():
        assert number in known.written[slot]
        assert number not in known.gone, f"cleared record {number} is found"
        assert it.holds(slot, number) or not all_readable
    for slot, numbers in known.written.items():
        for number in numbers:
            if it.holds(slot, number):  # fails by itself if the bytes are wrong
                assert number not in known.gone, f"cleared record {number} is served"
    store.close()
    shutil.rmtree(folder)


def deleted(index: bytes, chance: random.Random) -> bytes | None:
    return None


def truncated(index: bytes, chance: random.Random) -> bytes | None:
    return index[: chance.randrange(len(index))]


def flipped(index: bytes, chance: random.Random) -> bytes | None:
    return flip_bits(index, chance.choice([1, 3, 30, 1000]), chance)


Damage = Callable[[bytes, random.Random], bytes | None]
DAMAGES: list[Damage] = [deleted, truncated, flipped]


def damage_index(image: Image, damage: Damage, chance: random.Random) -> Image:
    changed = {name: data for name, data in image.items() if name != INDEX}
    if image.get(INDEX) and (index := damage(image[INDEX], chance)) is not None:
        changed[INDEX] = index
    return changed


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("damages", [False, True], ids=["cuts", "cuts-and-damaged-index"])
def test_power_cuts_one_after_another(tmp_path: Path, seed: int, damages: bool) -> None:
    chance = random.Random(seed)
    numbers = Numbers()
    image: Image = {}
    known = Known()
    for session in range(5):
        run = Run(image, tmp_path / f"run-{session}", known, numbers)
        if session == 0:
            # Its files are there from here on: how they come into being is tested elsewhere.
            run.base = take_image(tmp_path / "run-0")
            run.io.events.clear()
        run.act(chance, chance.choice([0, 5, 30]))
        run.close()
        images = run.cuts(chance, 12)
        for i, (image, known) in enumerate(images):
            if damages and chance.random() < 0.6:
                image = damage_index(image, chance.choice(DAMAGES), chance)
                images[i] = (image, known)
            look_at(image, known, tmp_path / "look")
        image, known = chance.choice(images)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("what", ["write", "overwrite", "discard", "clear", "commit"])
def test_a_power_cut_in_each_moment_of_a_call(tmp_path: Path, what: str, seed: int) -> None:
    chance = random.Random(seed)
    run = Run({}, tmp_path / "run", Known(), Numbers())
    for slot in range(SLOTS - 2):
        run.write(slot)
    run.commit()
    run.write(SLOTS - 2)
    begin = len(run.io.events)
    run.base = take_image(tmp_path / "run")
    calls = {
        "write": lambda: run.write(SLOTS - 1),
        "overwrite": lambda: run.write(3),
        "discard": lambda: run.discard(3),
        "clear": run.clear,
        "commit": run.commit,
    }
    calls[what]()
    events = run.io.events[begin:]
    assert events
    for at in range(len(events) + 1):
        known = run.known_at(events, at)
        image = cut(run.base, events, at, chance)
        look_at(image, known, tmp_path / "look")
        look_at(damage_index(image, deleted, chance), known, tmp_path / "look")
        look_at(kill(run.base, events, at), known, tmp_path / "look", all_readable=True)
    run.close()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_rebuilt_from_the_headers(tmp_path: Path, damage: Damage, seed: int) -> None:
    chance = random.Random(seed)
    run = Run({}, tmp_path / "run", Known(), Numbers())
    for slot in range(SLOTS):
        run.write(slot)
    run.clear()
    for slot in range(0, SLOTS, 2):
        run.write(slot)
    run.discard(0)
    run.commit()
    run.close()
    image = damage_index(take_image(tmp_path / "run"), damage, chance)
    look_at(image, run.known, tmp_path / "look")
    # Once rebuilt it serves the next start as well, and what is cleared then stays away if it is lost again.
    run = Run(image, tmp_path / "again", run.known, Numbers())
    run.close()
    image = take_image(tmp_path / "again")
    look_at(image, run.known, tmp_path / "look")
    run = Run(image, tmp_path / "third", run.known, Numbers())
    run.clear()
    run.close()
    look_at(damage_index(take_image(tmp_path / "third"), deleted, chance), run.known, tmp_path / "look")


@pytest.mark.parametrize("seed", range(10))
def test_what_was_cleared_stays_away_however_often_the_index_is_lost(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    numbers = Numbers()
    image: Image = {}
    known = Known()
    for session in range(6):
        run = Run(image, tmp_path / f"run-{session}", known, numbers)
        for _ in range(chance.randrange(3)):
            for slot in chance.sample(range(SLOTS), 4):
                run.write(slot)
            run.clear()
        for slot in chance.sample(range(SLOTS), chance.randrange(3)):
            run.write(slot)
        if chance.random() < 0.5:
            run.discard(0)
        run.commit()
        run.close()
        image, known = damage_index(take_image(tmp_path / f"run-{session}"), deleted, chance), run.known
        look_at(image, known, tmp_path / "look")
