"""Client of the server that a running engine offers with DYN_KVBM_METRICS=1."""

import argparse
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from kvbm.config import load_config
from kvbm.errors import KvbmError, UsageError

_TIMEOUT_S = 10.0


class ServerError(KvbmError):
    """The engine's server can't be reached, or refused."""


class NotFoundError(ServerError):
    """The server does not know what was asked for. detail: its own words, "" where it has none."""

    def __init__(self, message: str, detail: str) -> None:
        super().__init__(message)
        self.detail = detail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        help="of the engine's KVBM server (default http://127.0.0.1:6880; port: DYN_KVBM_METRICS_PORT)",
    )
    parser.add_argument("--token", help="for an engine on another machine (default: KVBM_ADMIN_TOKEN)")
    parser.add_argument("--json", action="store_true", help="what the server answers, as JSON")


class Client:
    """Of the server that the arguments, or else the settings, name."""

    def __init__(self, args: argparse.Namespace) -> None:
        observe = load_config().observe
        self.url: str = (args.url or f"http://127.0.0.1:{observe.port}").rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(f"--url {self.url}: must begin with http:// or https://.")
        self._token: str | None = args.token or observe.admin_token
        # No proxy: an engine is a neighbour, and most are on this machine.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def get(self, path: str, **query: Any) -> Any:
        return self._ask(path + (f"?{urllib.parse.urlencode(query)}" if query else ""))

    def post(self, path: str, body: Any) -> Any:
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, body: bytes | None = None) -> Any:
        try:
            request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
            if self._token:
                # Not sent on to where a redirection leads.
                request.add_unredirected_header("Authorization", f"Bearer {self._token}")
            with self._open(request, timeout=_TIMEOUT_S) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ServerError(
                f"No KVBM server answers at {self.url} ({reason}): start the engine with DYN_KVBM_METRICS=1, "
                f"or name the address that its log tells with --url."
            ) from error
        except ValueError as error:  # no JSON, or no URL
            raise ServerError(
                f"What answers at {self.url} is not KVBM's server: name its address with --url."
            ) from error
        if not isinstance(answer, dict):
            raise ServerError(
                f"What answers at {self.url} is not KVBM's server: name its address with --url."
            )
        return answer

    def _refusal(self, error: urllib.error.HTTPError) -> ServerError:
        detail = _detail(error)
        if error.code in (401, 403):
            return ServerError(
                f"{self.url} answers this machine only, at 127.0.0.1, or who has its token: give --token, or "
                f"set KVBM_ADMIN_TOKEN here to what the engine has."
            )
        if error.code == 404:
            return NotFoundError(
                f"{self.url} answered: {detail or error.reason}. Is it KVBM's server?", detail
            )
        return ServerError(f"{self.url} answered {error.code}: {detail or error.reason}")


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        answer = json.loads(error.read())
        return str(answer["detail"])
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return ""
