"""Reports of ranks over a local socket: whole, in order, bounded, and never waited for."""

import os
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from kvbm.logic.operations import Completion, Failure
from kvbm.runtime import channel
from kvbm.runtime.channel import Hello, Lost, ReportReceiver, ReportSender
from kvbm.runtime.messages import WorkerReport

HELLO = Hello(3, 4096, 32)


@pytest.fixture
def receiver():
    receiver = ReportReceiver()
    yield receiver
    receiver.close()


def all_of(receiver: ReportReceiver, count: int) -> list:
    messages: list = []
    for _ in range(10000):
        messages += receiver.receive()
        if len(messages) >= count:
            break
    return messages


def test_a_report_arrives_as_it_was(receiver: ReportReceiver) -> None:
    report = WorkerReport(
        3,
        100,
        50,
        refused="why",
        completions=[Completion(7, np.array([1, 2], np.int32), Failure.CORRUPT, 0.5, False)],
        found=(np.array([4, 5], np.int32), np.array([[1, 2], [3, 2**63]], np.uint64)),
        found_all=True,
        foreign_records=True,
        disk_refused="no room",
    )
    sender = ReportSender(receiver.address)
    sender.send(HELLO)
    sender.send(report)
    hello, got = receiver.receive()
    assert hello == HELLO
    assert isinstance(got, WorkerReport)
    assert repr(got) == repr(report)
    assert receiver.receive() == []
    sender.close()
    assert receiver.receive() == [Lost(3)]
    assert receiver.receive() == []


def test_more_than_the_socket_takes_at_once(receiver: ReportReceiver) -> None:
    sender = ReportSender(receiver.address)
    slots = np.arange(400_000, dtype=np.int32)
    for rank in range(3):
        sender.send(WorkerReport(rank, found=(slots, np.zeros((len(slots), 2), np.uint64))))
    messages: list = []
    for _ in range(10000):
        sender.flush()
        messages += receiver.receive()
        if len(messages) == 3:
            break
    assert [message.rank for message in messages] == [0, 1, 2]
    assert all((message.found[0] == slots).all() for message in messages)


def test_a_leader_that_does_not_read(receiver: ReportReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_MAX_UNSENT", 1000)
    sender = ReportSender(receiver.address)

    def send_much() -> None:
        for _ in range(100_000):
            sender.send(HELLO)

    with pytest.raises(TimeoutError):
        send_much()


def test_a_leader_that_is_gone(receiver: ReportReceiver) -> None:
    sender = ReportSender(receiver.address)
    sender.send(HELLO)
    receiver.receive()
    receiver.close()
    with pytest.raises(OSError, match="pipe"):
        sender.send(HELLO)
    with pytest.raises(ConnectionRefusedError):
        ReportSender(receiver.address)


@pytest.mark.parametrize("data", [b"\xff" * 8, b"\x01\x00\x00\x00\xc1", b"\x02\x00\x00\x00\x91\x01"])
def test_what_is_no_report_ends_the_connection(receiver: ReportReceiver, data: bytes) -> None:
    stranger = socket.socket(socket.AF_UNIX)
    stranger.connect("\0" + receiver.address)
    stranger.send(data)
    good = ReportSender(receiver.address)
    good.send(HELLO)
    assert sorted(map(str, receiver.receive())) == sorted(map(str, [Lost(-1), HELLO]))


def test_another_user_is_not_let_in(receiver: ReportReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    ReportSender(receiver.address).send(HELLO)
    assert receiver.receive() == []


def test_a_rank_in_another_process(receiver: ReportReceiver) -> None:
    code = (
        "import sys; from kvbm.runtime.channel import Hello, ReportSender\n"
        "sender = ReportSender(sys.argv[1])\n"
        "for rank in range(50): sender.send(Hello(rank, 1, 1))"
    )
    subprocess.run([sys.executable, "-c", code, receiver.address], check=True, timeout=60)
    messages = all_of(receiver, 51)
    assert messages == [*(Hello(rank, 1, 1) for rank in range(50)), Lost(49)]


def test_nothing_waits(receiver: ReportReceiver) -> None:
    done = threading.Event()

    def use() -> None:
        sender = ReportSender(receiver.address)
        receiver.receive()
        sender.flush()
        done.set()

    threading.Thread(target=use, daemon=True).start()
    assert done.wait(10)
