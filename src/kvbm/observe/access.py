"""Who may ask what, over HTTP: an ASGI middleware in front of everything else.

`/metrics` answers everybody. The rest answers this machine, and who has the token. Browsers on this machine
can be made to do others' bidding by a page whose name is made to point to 127.0.0.1 (DNS rebinding). So being
on this machine counts only where the request names an address or localhost, and came through no proxy.
"""

import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

NEEDS_TOKEN = (
    "This answers clients on the engine's own machine only, or who send the token that the engine was "
    "started with as KVBM_ADMIN_TOKEN, in the header 'Authorization: Bearer TOKEN'."
)
_FOREIGN_HOST = (
    "This request names the host {host!r}, as a web page of someone else might: use 127.0.0.1 or localhost, "
    "or send the token that the engine was started with as KVBM_ADMIN_TOKEN ('Authorization: Bearer TOKEN')."
)


class Guard:
    """app, but for those only who may. lobby: the page, which asks a browser without access for the token."""

    def __init__(self, app: App, token: str | None, lobby: tuple[bytes, dict[str, str]]) -> None:
        self._app = app
        self._token = token.encode() if token else None
        self._lobby, self._lobby_headers = lobby

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = _headers(scope)
        if scope["path"] != "/metrics":
            refusal = self._refusal(scope.get("client"), headers)
            if refusal is not None:
                if scope["path"] == "/" and scope["method"] == "GET" and "text/html" in headers["accept"]:
                    await _answer(send, 403, self._lobby, self._lobby_headers)
                else:
                    body = json.dumps({"detail": refusal}).encode()
                    await _answer(send, 403, body, {"content-type": "application/json"})
                return
        await self._app(scope, receive, send)

    def _refusal(self, client: tuple[str, int] | None, headers: "_Headers") -> str | None:
        """Why not, if so."""
        scheme, _, given = headers["authorization"].partition(" ")
        if scheme.lower() == "bearer" and self._is_token(given.strip()):
            return None
        forwarded = headers["x-forwarded-for"] or headers["forwarded"]
        if client is None or not _is_loopback(client[0]) or forwarded:
            return NEEDS_TOKEN
        if not _is_plain_host(headers["host"]):
            return _FOREIGN_HOST.format(host=headers["host"][:100])
        return None

    def _is_token(self, given: str) -> bool:
        return self._token is not None and hmac.compare_digest(given.encode("latin-1"), self._token)


class _Headers(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return ""


def _headers(scope: Message) -> _Headers:
    return _Headers((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"])


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def _is_plain_host(host: str) -> bool:
    """Whether a Host header is an address or localhost, with or without a port."""
    if host.startswith("["):
        name = host[1:].partition("]")[0]
    else:
        name = host.partition(":")[0]
    if name.lower() in ("localhost", "localhost."):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _answer(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
