"""The log of requests: what each found, and the rates over the last of them."""

import pytest

from kvbm.observe.requests import FirstMiss, Identity, Miss, RequestLog

SIZE = 16


def make(max_requests: int = 3) -> RequestLog:
    return RequestLog(max_requests, SIZE)


def served(
    log: RequestLog, id_: str, device: int, wanted: int, host: int, disk: int = 0, failed: int = 0
) -> None:
    """In blocks; its prompt is all of that and a token."""
    log.arrived(id_, 1.0, (device + wanted) * SIZE + 1, Identity())
    miss = FirstMiss(device + host + disk) if host + disk < wanted else None
    log.answered(id_, 2.0, device, wanted, miss)
    if host + disk + failed:
        log.loaded(id_, host, disk, failed, saved_s=0.5)
    log.finished(id_)


def test_where_the_tokens_of_a_request_come_from() -> None:
    log = make()
    served(log, "a", device=1, wanted=5, host=2, disk=1)
    record = log.find("a")
    assert record is not None
    assert (record.device_tokens, record.host_tokens, record.disk_tokens) == (16, 32, 16)
    assert (record.prompt_tokens, record.computed_tokens, record.wanted_tokens) == (97, 33, 80)
    assert (record.saved_s, record.answered, record.finished, record.clock) == (0.5, True, True, 2.0)
    totals = log.totals
    assert (totals.requests, totals.prompt_tokens, totals.device_tokens) == (1, 97, 16)
    assert (totals.host_tokens, totals.disk_tokens, totals.saved_tokens) == (32, 16, 48)
    assert (totals.host_blocks, totals.disk_blocks, totals.saved_s) == (2, 1, 0.5)


def test_rates_are_those_of_the_last_finished_requests() -> None:
    log = make(3)
    assert (log.host_rate.value, log.disk_rate.value) == (0.0, 0.0)
    expected = [(4, 0), (4, 4), (2, 2), (6, 0), (8, 4), (0, 0), (1, 1)]
    for i, (wanted, host) in enumerate(expected):
        served(log, str(i), 0, wanted, host, disk=min(1, wanted - host))
        last = expected[max(0, i - 2) : i + 1]
        assert log.host_rate.hits == sum(h for _, h in last)
        assert log.host_rate.wanted == sum(w for w, _ in last)
        assert log.disk_rate.hits == sum(min(1, w - h) for w, h in last)
        assert log.disk_rate.wanted == sum(w - h for w, h in last), "what the host lacked"
    assert log.num_finished == len(expected)
    assert [record.id for record in log.newest()] == ["6", "5", "4"]
    assert log.find("3") is None


def test_running_requests_are_no_part_of_the_rates() -> None:
    log = make()
    log.arrived("a", 1.0, 64, Identity())
    log.answered("a", 2.0, 0, 3, FirstMiss(0))
    assert log.host_rate.wanted == 0
    log.finished("a")
    assert log.host_rate.wanted == 3


def test_a_request_that_runs_again_counts_once() -> None:
    log = make()
    log.arrived("a", 1.0, 97, Identity())
    first = FirstMiss(2)
    log.answered("a", 2.0, 1, 5, first)
    assert not log.runs_again("a")
    log.loaded("a", 1, 0, 0, 0.5)
    log.answered("a", 9.0, 0, 8, FirstMiss(8))
    assert log.runs_again("a")
    log.loaded("a", 8, 0, 0, 4.0, again=True)
    record = log.finished("a")
    assert record is not None
    assert (record.clock, record.device_tokens, record.wanted_tokens) == (2.0, 16, 80)
    assert (record.host_tokens, record.saved_s) == (16, 0.5)
    assert record.miss is first
    assert record.computed_tokens == 97 - 32
    assert (log.host_rate.hits, log.host_rate.wanted) == (1, 5)
    # It spared the engine that work all the same.
    assert (log.totals.host_blocks, log.totals.saved_s, log.totals.device_tokens) == (9, 4.5, 16)


def test_a_failed_load_is_the_first_miss() -> None:
    log = make()
    log.arrived("a", 1.0, 97, Identity())
    log.answered("a", 2.0, 0, 5, FirstMiss(4))
    failed = FirstMiss(1, reason=Miss.FAILED_CHECK)
    log.loaded("a", 1, 0, 2, 0.1, miss=failed)
    record = log.find("a")
    assert record is not None
    assert record.miss is failed
    assert (record.host_tokens, record.failed_tokens) == (16, 32)


def test_an_aborted_request_is_remembered_and_wanted_nothing() -> None:
    log = make()
    log.arrived("a", 1.0, 97, Identity())
    record = log.finished("a")
    assert record is not None
    assert not record.answered
    assert log.host_rate.wanted == 0
    assert log.totals.requests == 1


def test_a_load_that_ends_after_its_request_counts_in_all() -> None:
    log = make()
    log.arrived("a", 1.0, 97, Identity())
    log.answered("a", 2.0, 0, 5, None)
    log.finished("a")
    log.loaded("a", 5, 0, 0, 1.0)
    assert log.totals.host_blocks == 5
    for i in range(5):
        log.arrived(str(i), 1.0, 1, Identity())
        log.finished(str(i))
    assert (log.host_rate.hits, log.host_rate.wanted) == (0, 0)


def test_refused_requests_are_explained_and_have_no_part_in_the_rates() -> None:
    log = make()
    log.refused("a", 1.0, 40, "pooling request")
    record = log.finished("a")
    assert record is not None
    assert record.miss == FirstMiss(0, reason=Miss.UNSUPPORTED, detail="pooling request")
    assert log.host_rate.wanted == 0
    assert (log.totals.requests, log.totals.prompt_tokens) == (1, 40)


def test_unknown_requests_are_nobody() -> None:
    log = make()
    log.answered("x", 1.0, 0, 3, None)
    log.loaded("x", 1, 1, 0, 0.0)
    assert log.finished("x") is None
    assert not log.runs_again("x")
    assert log.newest() == []
    assert log.num_finished == 0


@pytest.mark.parametrize(
    ("asked", "found"), [("cmpl-1", "cmpl-1"), ("cmpl-12", "cmpl-12-0-abc"), ("cmpl-", "cmpl-3"), ("x", None)]
)
def test_requests_are_found_by_the_beginning_of_their_id(asked: str, found: str | None) -> None:
    """Engines add to the ids that clients see. The exact one comes first, then the newest."""
    log = make()
    for id_ in ("cmpl-12-0-abc", "cmpl-1", "cmpl-3"):
        log.arrived(id_, 1.0, 10, Identity())
        log.finished(id_)
    record = log.find(asked)
    assert (record.id if record else None) == found


def test_the_newest_first_running_ones_before_finished_ones() -> None:
    log = make(10)
    for id_ in "abcd":
        log.arrived(id_, 1.0, 10, Identity())
    log.finished("c")
    log.finished("a")
    assert [record.id for record in log.newest()] == ["d", "b", "a", "c"]
