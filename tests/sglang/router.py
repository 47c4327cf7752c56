"""Receives KV events, as a router does."""

from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

TOPIC = "kv"


class Router:
    """Subscribed before the publisher is there, so that nothing is missed."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.reconnect_ivl = 5
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket.subscribe(TOPIC.encode())
        self._socket.connect(address)

    def wait_connected(self, deadline_s: int = 20) -> None:
        assert self._monitor.poll(deadline_s * 1000), "no publisher"
        recv_monitor_message(self._monitor)

    def receive(self, deadline_s: int = 20) -> tuple[int, list[dict[str, Any]]]:
        """Number and events of the next message."""
        assert self._socket.poll(deadline_s * 1000), "no more events"
        _, number, payload = self._socket.recv_multipart()
        return int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)[1]

    def __enter__(self) -> "Router":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)
