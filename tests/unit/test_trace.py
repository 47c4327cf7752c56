"""Traces: what is read of them, what is refused, and a writer that never disturbs the engine."""

import errno
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbm.errors import TraceError
from kvbm.logic.hashing import Hashes, SequenceHasher, root_hash
from kvbm.logic.simulation import Request, hashes_of
from kvbm.observe import trace as trace_module
from kvbm.observe.trace import TraceWriter, read_trace

HEADER = {"kvbm_trace": 1, "block_size": 16}
LINE = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": list(range(46, 60))}


def line(**changes: Any) -> dict[str, Any]:
    return {**LINE, **changes}


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{item if isinstance(item, str) else json.dumps(item)}\n" for item in lines))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def chain(tokens: int, seed: int = 0, block_size: int = 16) -> Hashes:
    hasher = SequenceHasher(root_hash(bytes(16), block_size, salt=str(seed)), block_size)
    hasher.extend(list(range(tokens)))
    return hasher.hashes


# ---- reading ----


def test_a_line_of_mooncake(path: Path) -> None:
    # 6,955 tokens are 13 full blocks of 512 and a part of one, which has a hash_id too.
    trace = read_trace(written(path, LINE))
    (request,) = trace
    assert (trace.block_size, trace.block_bytes) == (512, None)
    assert (request.time_s, request.input_tokens, request.output_tokens) == (27.482, 6955, 52)
    assert (request.hashes == hashes_of(np.arange(46, 59, dtype=np.uint64))).all()


def test_a_block_size_for_traces_that_do_not_say_theirs(path: Path) -> None:
    written(path, line(input_length=32, hash_ids=[1, 2]), line(input_length=33, hash_ids=[1, 2, 3]))
    trace = read_trace(path, 16)
    assert [len(request.hashes) for request in trace] == [2, 2]
    assert [len(request.hashes) for request in trace] == [2, 2]  # can be read again


def test_a_recorded_trace_says_its_block_size_and_names_replies(path: Path) -> None:
    trace = read_trace(written(path, {**HEADER, "block_bytes": 4096}, line(input_length=16, hash_ids=[5, 6])))
    (request,) = trace
    assert (trace.block_size, trace.block_bytes, len(request.hashes)) == (16, 4096, 2)


def test_unknown_fields_and_empty_lines_are_passed_over(path: Path) -> None:
    assert len(list(read_trace(written(path, line(session="a"), "", "  ", LINE)))) == 2


def test_an_empty_file_has_no_requests(path: Path) -> None:
    assert list(read_trace(written(path))) == []


def test_joined_traces_keep_their_time(path: Path) -> None:
    one = line(timestamp=1000, hash_ids=[])
    written(path, {**HEADER, "started": 100.0}, one, {**HEADER, "started": 160.0}, one)
    assert [request.time_s for request in read_trace(path)] == [1.0, 61.0]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{", "truncated"),
        ("no JSON", "malformed"),
        ("[1, 2]", "object"),
        (line(hash_ids=None), "hash_ids"),
        (line(hash_ids=["a"]), "hash_ids"),
        (line(hash_ids=[-1]), "hash_ids"),
        (line(hash_ids=[1 << 64]), "hash_ids"),
        (line(input_length=-1), "input_length"),
        (line(input_length="many"), "input_length"),
        (line(timestamp="now"), "timestamp"),
        ({"timestamp": 1, "input_length": 1, "output_length": 1}, "hash_ids"),
        (HEADER, "timestamp"),  # a recorded trace after a foreign one
        (line(input_length=512 * 15), "14 hash_ids for 7680 tokens"),
        (line(input_length=512 * 12), "--block-size"),
        (line(input_length=512 * 13), "14 hash_ids for 6656 tokens"),
        (line(hash_ids=[1, 2, 1, *range(10, 21)]), "twice"),
    ],
)
def test_a_broken_line_is_named(path: Path, broken: Any, message: str) -> None:
    requests = iter(read_trace(written(path, LINE, LINE, broken, LINE)))
    assert next(requests) is not None
    assert next(requests) is not None
    with pytest.raises(TraceError, match=rf"trace\.jsonl, line 3.*{message}.*(correct|delete)"):
        next(requests)


def test_a_broken_line_of_a_recorded_trace_is_named(path: Path) -> None:
    with pytest.raises(TraceError, match="line 3"):
        list(read_trace(written(path, HEADER, LINE, "{", LINE)))


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ([{"kvbm_trace": 2, "block_size": 16}], "line 1: version 2"),
        ([{"kvbm_trace": 1}], "line 1 .*block_size"),
        ([{"kvbm_trace": 1, "block_size": 0}], "line 1 .*block_size"),
        ([HEADER, {"kvbm_trace": 1, "block_size": 32}], "line 2: blocks of 32 tokens follow blocks of 16"),
        ([HEADER, {"kvbm_trace": 2, "block_size": 16}], "line 2: version 2"),
    ],
)
def test_a_wrong_header_is_named(path: Path, headers: list[Any], message: str) -> None:
    written(path, *headers)
    with pytest.raises(TraceError, match=message):
        list(read_trace(path))


def test_a_recorded_trace_knows_its_block_size_best(path: Path) -> None:
    written(path, HEADER)
    assert read_trace(path, 16).block_size == 16
    with pytest.raises(TraceError, match="blocks of 16 tokens, not 512"):
        read_trace(path, 512)


@pytest.mark.parametrize("where", ["nothing.jsonl", "."])
def test_a_file_that_can_not_be_read(tmp_path: Path, where: str) -> None:
    with pytest.raises(TraceError, match=r"can't be read: .* Give the path"):
        read_trace(tmp_path / where)


def test_a_line_that_is_being_written_is_left_out(path: Path) -> None:
    written(path, HEADER, line(hash_ids=[1]), LINE)
    path.write_bytes(path.read_bytes()[:-9])
    assert len(list(read_trace(path))) == 1
    written(path, LINE, LINE)  # nobody writes to a foreign one
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TraceError, match="line 2"):
        list(read_trace(path))


# ---- writing ----


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The writer's thread waits in each write until this is set."""
    go_on = threading.Event()
    write = TraceWriter._write

    def wait_and_write(self: TraceWriter, data: bytes) -> bool:
        go_on.wait(10)
        return write(self, data)

    monkeypatch.setattr(TraceWriter, "_write", wait_and_write)
    yield go_on
    go_on.set()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_what_is_written_is_read(path: Path) -> None:
    writer = TraceWriter(path, 16, 10**6, block_bytes=2**21)
    started = time.time()
    first, second = chain(100), chain(40, seed=1)
    writer.request(started + 1.5, 70, 31, first)
    writer.request(started + 2.25, 40, 1, second)
    writer.close()
    trace = read_trace(path)
    assert (trace.block_size, trace.block_bytes) == (16, 2**21)
    requests = list(trace)
    assert [(r.input_tokens, r.output_tokens, len(r.hashes)) for r in requests] == [(70, 31, 6), (40, 1, 2)]
    assert requests[1].time_s - requests[0].time_s == pytest.approx(0.75, abs=0.002)
    assert requests[0].time_s == pytest.approx(1.5, abs=0.5)
    assert (writer.path, writer.written, writer.dropped, writer.ended) == (path, 2, 0, True)


def test_ids_are_53_bits_of_the_hashes_and_nothing_else_is_told(path: Path) -> None:
    hashes = chain(1600)
    writer = TraceWriter(path, 16, 10**6)
    writer.request(time.time(), 1600, 1, hashes)
    writer.close()
    header, recorded = map(json.loads, path.read_text().splitlines())
    assert recorded["hash_ids"] == [int(low) >> 11 for low in hashes[:, 0]]
    assert max(recorded["hash_ids"]) < 2**53
    assert header.keys() == {"kvbm_trace", "block_size", "started"}
    assert recorded.keys() == LINE.keys()
    assert path.stat().st_mode & 0o777 == 0o600


def test_equal_prefixes_have_equal_hashes(path: Path) -> None:
    writer = TraceWriter(path, 16, 10**6)
    for tokens in (320, 160):
        writer.request(time.time(), tokens, 1, chain(tokens))
    writer.close()
    long, short = read_trace(path)
    assert (long.hashes[:10] == short.hashes).all()


def test_the_file_ends_at_its_size_with_a_whole_line(path: Path) -> None:
    writer = TraceWriter(path, 16, 2000)
    for _ in range(100):
        writer.request(time.time(), 160, 1, chain(160))
    wait_until(lambda: writer.ended)
    queued = writer._queue.qsize()
    writer.request(time.time(), 160, 1, chain(160))
    assert writer._queue.qsize() == queued  # nobody would take it out
    writer.close()
    assert path.stat().st_size <= 2000
    assert len(list(read_trace(path))) == writer.written == pytest.approx(2000 // 250, abs=2)


def test_what_comes_too_fast_is_dropped_and_counted(
    path: Path, stuck: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "_MAX_QUEUED_REQUESTS", 5)
    writer = TraceWriter(path, 16, 10**6)
    for _ in range(20):
        writer.request(time.time(), 16, 1, chain(16))
    # One may be in the thread's hands beside those in the queue.
    assert writer.dropped in (14, 15)
    stuck.set()
    writer.close()
    assert writer.written == 20 - writer.dropped == len(list(read_trace(path)))


def test_the_queue_is_bounded_in_blocks_too(
    path: Path, stuck: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "_MAX_QUEUED_BLOCKS", 100)
    writer = TraceWriter(path, 16, 10**6)
    writer.request(time.time(), 16, 1, chain(16))
    wait_until(lambda: writer._taken == 1)  # it is stuck with this one
    for _ in range(20):
        writer.request(time.time(), 640, 1, chain(640))
    assert writer.dropped == 18
    stuck.set()
    wait_until(lambda: writer.written == 3)
    writer.request(time.time(), 640, 1, chain(640))  # there is room again
    writer.close()
    assert writer.written == 4


@pytest.mark.parametrize("hashes", [None, np.zeros(3, np.uint64), "text"])
def test_it_never_raises_into_the_engine(path: Path, hashes: Any) -> None:
    writer = TraceWriter(path, 16, 10**6)
    writer.request(time.time(), 16, 1, hashes)
    writer.request(float("nan"), 16, 1, chain(16))
    writer.request(time.time(), 16, 1, chain(16))
    wait_until(lambda: writer.written == 1)
    wrong: Any = object()  # which the thread finds out
    writer.request(time.time(), wrong, 1, chain(16))
    wait_until(lambda: writer.ended)
    writer.request(time.time(), 16, 1, chain(16))
    writer.close()
    writer.close()
    assert (writer.dropped, writer.written) == (2, 1)


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_a_full_disk_ends_it_without_half_a_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, fraction: float | None
) -> None:
    writer = TraceWriter(path, 16, 10**6)
    writer.request(time.time(), 16, 1, chain(16))
    wait_until(lambda: writer.written)
    pwrite = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if fraction is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data[: int(fraction * len(data))], offset)

    monkeypatch.setattr(os, "pwrite", full)
    writer.request(time.time(), 16, 1, chain(16))
    wait_until(lambda: writer.ended)
    writer.close()
    assert path.read_bytes().endswith(b"\n")
    assert len(list(read_trace(path))) == 1


def test_writers_that_live_have_files_of_their_own(path: Path) -> None:
    writers = [TraceWriter(path, 16, 10**6) for _ in range(3)]
    assert [writer.path.name for writer in writers] == ["trace.jsonl", "trace.jsonl.1", "trace.jsonl.2"]
    for number, writer in enumerate(writers):
        writer.request(time.time(), 16 * (number + 1), 1, chain(16))
        writer.close()
    assert [r.input_tokens for writer in writers for r in read_trace(writer.path)] == [16, 32, 48]


def test_a_trace_is_continued_and_its_size_counts(path: Path) -> None:
    for _ in range(2):
        writer = TraceWriter(path, 16, 400)
        assert writer.path == path
        writer.request(time.time(), 16, 1, chain(16))
        writer.close()
    times = [request.time_s for request in read_trace(path)]
    assert len(times) == 2
    assert 0 <= times[0] <= times[1] < 60
    written(path, HEADER, *[line(hash_ids=[])] * 10)
    writer = TraceWriter(path, 16, 400)
    writer.request(time.time(), 16, 1, chain(16))
    writer.close()
    assert (writer.path, writer.written) == (path, 0)


@pytest.mark.parametrize("torn", [1, 70_000, 200_000])
def test_half_a_line_of_a_killed_engine_is_cut_off(path: Path, torn: int) -> None:
    written(path, HEADER, line(hash_ids=[1]))
    whole = path.read_bytes()
    path.write_bytes(whole + b"1" * torn)
    writer = TraceWriter(path, 16, 10**6)
    assert path.read_bytes() == whole
    writer.request(time.time(), 16, 1, chain(16))
    writer.close()
    assert len(list(read_trace(path))) == 2


@pytest.mark.parametrize(
    "content",
    [
        "notes of mine",
        "",
        json.dumps(LINE),
        json.dumps({**HEADER, "block_size": 32}),
        json.dumps({**HEADER, "block_bytes": 1}),
        json.dumps({**HEADER, "kvbm_trace": 2}),
    ],
)
def test_other_files_are_left_alone(path: Path, content: str) -> None:
    before = written(path, content).read_bytes()
    writer = TraceWriter(path, 16, 10**6)
    writer.close()
    assert writer.path.name == "trace.jsonl.1"
    assert path.read_bytes() == before


def test_links_and_missing_folders_are_refused(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TraceError, match=r"can't be written.*KVBM_RECORD_FILE"):
        TraceWriter(path, 16, 10**6)
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(TraceError, match=r"No such file or directory.*KVBM_RECORD_FILE"):
        TraceWriter(tmp_path / "none" / "trace", 16, 10**6)


def test_there_is_an_end_of_numbers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "_MAX_NUMBER", 2)
    writers = [TraceWriter(path, 16, 10**6) for _ in range(2)]
    with pytest.raises(TraceError, match="1 numbered ones are taken"):
        TraceWriter(path, 16, 10**6)
    for writer in writers:
        writer.close()


def test_no_descriptor_is_left(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    written(path, "notes")
    for _ in range(3):
        TraceWriter(path, 16, 10**6).close()
    list(read_trace(path.with_name("trace.jsonl.1")))
    assert len(os.listdir("/proc/self/fd")) == before


def test_requests_of_other_writers_of_the_format(path: Path) -> None:
    """A recorded request may lack hashes, where it was not hashed to its end."""
    written(path, HEADER, line(input_length=160, hash_ids=[1, 2]))
    (request,) = read_trace(path)
    assert isinstance(request, Request)
    assert (request.useful_blocks(16), request.computed_blocks(16)) == (2, 13)
