"""Models of several KV groups: what is read back from disk, what is not, and what a miss is put down to."""

import numpy as np
import pytest

from kvbm.logic.estimate import LoadEstimate
from kvbm.logic.fetch import FetchEnd
from kvbm.logic.groups import FULL, KvGroup, KvGroups
from kvbm.logic.hashing import Hashes
from kvbm.logic.history import Fate
from kvbm.observe.requests import Miss
from tests.unit.disk_tier import Tier, names
from tests.unit.observed_engine import Engine, tokens_of

WINDOW = KvGroups((FULL, KvGroup(window=2, reach=5)))
STATE = KvGroups((KvGroup(window=1, reach=1, offered=True), FULL))
PREFIX = names(*range(6))


def store(t: Tier, groups: KvGroups, *lacking: tuple[int, int]) -> None:
    """All groups' blocks of the prefix, on disk alone, but for those lacking as (group, block)."""
    for group in range(len(groups)):
        blocks = [block for block in range(len(PREFIX)) if (group, block) not in lacking]
        keys = groups.keys(PREFIX[blocks], group)
        slots, is_new = t.host.claim(keys, t.host.capacity)
        assert is_new.all()
        t.host.register(slots)
        t.tier.seen(slots)
        t.host.release(slots)
        for operation in t.step():
            t.answer(operation)
        t.host.withdraw(slots)


def keys_read(t: Tier, request: str, hashes: Hashes) -> tuple[bool, set[bytes]]:
    over = t.tier.fetch(request, hashes)
    operations = t.step()
    return over, {key.tobytes() for operation in operations for key in operation.hashes}


def wanted(groups: KvGroups, *firsts: int, end: int = 6) -> set[bytes]:
    """Keys of each group from a block on."""
    return {
        key.tobytes() for group, first in enumerate(firsts) for key in groups.keys(PREFIX[first:end], group)
    }


@pytest.mark.parametrize(
    ("groups", "firsts"), [(WINDOW, (0, 4)), (STATE, (5, 0)), (KvGroups((FULL, FULL)), (0, 0))]
)
def test_each_group_gets_what_it_needs(groups: KvGroups, firsts: tuple[int, ...]) -> None:
    t = Tier(groups=groups, host=32)
    store(t, groups)
    over, read = keys_read(t, "a", PREFIX)
    assert (over, read) == (False, wanted(groups, *firsts))


@pytest.mark.parametrize(
    ("lacking", "end"),
    [((1, 5), 5), ((1, 4), 4), ((1, 3), 6), ((0, 5), 5), ((0, 2), 2)],
)
def test_as_far_as_all_groups_reach(lacking: tuple[int, int], end: int) -> None:
    t = Tier(groups=WINDOW, host=32)
    store(t, WINDOW, lacking)
    over, read = keys_read(t, "a", PREFIX)
    assert (over, read) == (False, wanted(WINDOW, 0, max(0, end - 2), end=end))


def test_nothing_is_read_where_one_group_has_nothing() -> None:
    t = Tier(groups=STATE, host=32)
    store(t, STATE, *((0, block) for block in range(6)))
    assert keys_read(t, "a", PREFIX) == (True, set())


def test_with_too_little_room_nothing_is_read() -> None:
    """A part would be of no use."""
    t = Tier(groups=WINDOW, host=12)
    store(t, WINDOW)
    pinned = t.host.allocate(5)
    over, read = keys_read(t, "a", PREFIX)
    assert (over, read) == (True, set())
    assert t.tier.fetched("a")[1] == FetchEnd.NO_ROOM
    t.host.release(pinned)
    assert t.host.num_free == 12


def test_what_is_declined_is_counted_over_all_groups() -> None:
    estimate = LoadEstimate(16)
    estimate.read(1, 10.0, 100.0)
    estimate.computed(100_000, 1.0)
    t = Tier(groups=WINDOW, host=32, estimate=estimate)
    store(t, WINDOW)
    assert keys_read(t, "a", PREFIX) == (True, set())
    assert t.stats.declined_blocks == 6 + 2
    assert t.tier.fetched("a")[1] == FetchEnd.SLOWER


def test_a_request_of_several_groups_from_disk() -> None:
    """Through the leader, and what it tells observers."""
    e = Engine(disk=64, host=24, groups=WINDOW)
    prompt = [*tokens_of(6), 7]
    e.serve("a", prompt)
    e.lose_host()
    record = e.serve("b", prompt)
    assert (record.host_tokens, record.disk_tokens) == (0, 24)
    e.check_idle()


def test_a_miss_names_the_block_of_the_group_that_lacked_it() -> None:
    e = Engine(host=24, groups=WINDOW)
    prompt = [*tokens_of(6), 7]
    e.serve("a", prompt)
    hashes = e.hashes(prompt)
    assert (e.pool.find(hashes) >= 0).all()
    window = e.pool.find(WINDOW.keys(hashes, 1))
    e.pool.withdraw(window[window >= 0], Fate.CLEARED)
    e.now += 1
    e.serve("b", prompt)
    assert e.why("b") == (Miss.CLEARED, "Block 0 was missed: the host tier was cleared 1.0 s before.")


def test_pins_hold_what_every_group_needs() -> None:
    e = Engine(host=48, groups=WINDOW)
    prompt = [*tokens_of(6), 7]
    e.serve("a", prompt)
    name, blocks = e.admin.pin(prompt, 60.0)
    assert blocks == 6 + 2
    e.lose_host()
    assert e.serve("b", prompt).host_tokens == 24
    assert e.admin.unpin(name) == blocks
    assert np.count_nonzero(e.pool.pins(np.arange(48))) == 0
