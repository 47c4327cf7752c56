"""Ranks tell their leader: msgpack messages over a local socket, for engines that have no channel upward.

The socket has a name of its own choice in Linux' abstract namespace: no port, no file, and only processes of
the same machine (network namespace) and user can use it. The leader's address travels to the ranks by the
engine's own way down. Nothing here waits, and what is not sent or not read yet has a bound.
"""

import contextlib
import os
import socket
import struct
from dataclasses import dataclass

import msgspec
import numpy as np

from kvbm.logic.operations import Completion, Failure
from kvbm.runtime.messages import WorkerReport

_LENGTH = struct.Struct("<I")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_MAX_MESSAGE = 1 << 24  # bytes
_MAX_UNSENT = 1 << 26  # bytes that wait because the leader does not read: then something is wrong with it
_CHUNK = 1 << 18
_MOST_AT_ONCE = 1 << 23  # bytes that one call takes from a rank


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A rank's first message: what only a rank knows of the KV cache."""

    rank: int
    record_bytes: int
    block_size: int


class _Completion(msgspec.Struct, frozen=True, array_like=True):
    operation_id: int
    failed: bytes
    reason: int
    seconds: float
    quiesced: bool


class _Report(msgspec.Struct, frozen=True, tag=True):
    rank: int
    num_slots: int
    ready_slots: int
    refused: str | None
    completions: list[_Completion]
    found: tuple[bytes, bytes] | None
    found_all: bool
    foreign_records: bool
    disk_refused: str | None


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection to a rank has ended; -1: it had not said which it is."""

    rank: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Hello | _Report).decode


class ReportSender:
    """A rank's end. OSError where the leader can't be reached, as from another machine."""

    def __init__(self, address: str) -> None:
        self._unsent = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            self._socket.connect("\0" + address)
        except OSError:
            self._socket.close()
            raise

    def send(self, message: Hello | WorkerReport) -> None:
        """Sent now or with a later call. OSError when the leader is gone or does not read."""
        data = _encode(message if isinstance(message, Hello) else _packed(message))
        self._unsent += _LENGTH.pack(len(data)) + data
        self.flush()

    def flush(self) -> None:
        """See `send`."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent[:_CHUNK])]
        if len(self._unsent) > _MAX_UNSENT:
            raise TimeoutError("the leader does not read the ranks' reports")

    def close(self) -> None:
        self._socket.close()


class _Connection:
    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.received = bytearray()
        self.rank = -1


class ReportReceiver:
    """The leader's end."""

    def __init__(self) -> None:
        self.address = f"kvbm-{os.getpid()}-{os.urandom(8).hex()}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind("\0" + self.address)
        self._listener.listen(128)
        self._connections: list[_Connection] = []

    def receive(self) -> list[Hello | WorkerReport | Lost]:
        """What has come since the last call, each rank's messages in their order."""
        self._accept()
        messages: list[Hello | WorkerReport | Lost] = []
        for connection in list(self._connections):
            open_ = self._read(connection)
            try:
                messages += self._messages(connection)
            except (msgspec.MsgspecError, ValueError):  # of another version of KVBM
                open_ = False
            if not open_:
                self._connections.remove(connection)
                connection.socket.close()
                messages.append(Lost(connection.rank))
        return messages

    def close(self) -> None:
        for connection in self._connections:
            connection.socket.close()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connected, _ = self._listener.accept()
                peer = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                if _CREDENTIALS.unpack(peer)[1] != os.geteuid():
                    connected.close()
                    continue
                self._connections.append(_Connection(connected))

    @staticmethod
    def _read(connection: _Connection) -> bool:
        """False when the connection has ended."""
        try:
            while len(connection.received) < _MOST_AT_ONCE:
                data = connection.socket.recv(_CHUNK)
                if not data:
                    return False
                connection.received += data
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    @staticmethod
    def _messages(connection: _Connection) -> list[Hello | WorkerReport]:
        messages: list[Hello | WorkerReport] = []
        received, at = connection.received, 0
        while len(received) - at >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(received, at)
            if size > _MAX_MESSAGE:
                raise ValueError(size)
            if len(received) - at - _LENGTH.size < size:
                break
            at += _LENGTH.size
            message = _decode(bytes(received[at : at + size]))
            at += size
            connection.rank = message.rank
            messages.append(message if isinstance(message, Hello) else _unpacked(message))
        del received[:at]
        return messages


def _packed(report: WorkerReport) -> _Report:
    found = report.found
    return _Report(
        rank=report.rank,
        num_slots=report.num_slots,
        ready_slots=report.ready_slots,
        refused=report.refused,
        completions=[
            _Completion(
                done.operation_id,
                done.failed.astype(np.int32).tobytes(),
                int(done.reason),
                done.seconds,
                done.quiesced,
            )
            for done in report.completions
        ],
        found=(found[0].astype(np.int32).tobytes(), found[1].tobytes()) if found is not None else None,
        found_all=report.found_all,
        foreign_records=report.foreign_records,
        disk_refused=report.disk_refused,
    )


def _unpacked(report: _Report) -> WorkerReport:
    found = report.found
    return WorkerReport(
        report.rank,
        report.num_slots,
        report.ready_slots,
        refused=report.refused,
        completions=[
            Completion(
                done.operation_id,
                np.frombuffer(done.failed, np.int32),
                Failure(done.reason),
                done.seconds,
                done.quiesced,
            )
            for done in report.completions
        ],
        found=(np.frombuffer(found[0], np.int32), np.frombuffer(found[1], np.uint64).reshape(-1, 2))
        if found is not None
        else None,
        found_all=report.found_all,
        foreign_records=report.foreign_records,
        disk_refused=report.disk_refused,
    )
