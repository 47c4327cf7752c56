"""The HTTP server of an engine: a daemon thread of its scheduler's process.

The constructor takes a port, so that the address is known at once and early clients wait instead of being
refused. All else happens in the thread, the imports too, and nothing of it reaches the engine.
"""

import errno
import importlib.util
import logging
import socket
import threading
from typing import TYPE_CHECKING, Any

from kvbm.settings import ObserveConfig

if TYPE_CHECKING:
    from kvbm.observe.api import AdminLike

logger = logging.getLogger(__name__)

PORTS = 64  # that are tried, from the configured one on
_BACKLOG = 128
_CONNECTIONS = 256  # at most; further ones are answered 503
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_CLOSE_TIMEOUT_S = 3.0


class Server:
    """Serves from construction until `close`. port: None where it could not start; the log says why."""

    def __init__(self, admin: "AdminLike", config: ObserveConfig) -> None:
        self.port: int | None = None
        self._closing = threading.Event()
        self._uvicorn: Any = None  # set by the thread
        self._thread: threading.Thread | None = None
        try:
            self._start(admin, config)
        except Exception as error:
            logger.warning(
                "KVBM: no metrics, page and administration: %s. Set KVBM_METRICS_HOST to an address of this "
                "machine, and DYN_KVBM_METRICS_PORT to a port that may be used.",
                error,
            )

    def close(self) -> None:
        """End, after what is being answered or some seconds."""
        self._closing.set()
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _start(self, admin: "AdminLike", config: ObserveConfig) -> None:
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            logger.warning(
                "KVBM: no metrics, page and administration, as packages are missing: pip install %s",
                " ".join(name.replace("_", "-") for name in missing),
            )
            return
        listener = _listen(config.host, config.port)
        host, port = listener.getsockname()[:2]
        taken = f"; port {config.port} is taken" if config.port not in (0, port) else ""
        logger.info("KVBM: page, metrics and administration at %s%s", _url(host, port), taken)
        self.port = port
        self._thread = threading.Thread(
            target=self._serve, args=(admin, config.admin_token, listener), name="kvbm-http", daemon=True
        )
        self._thread.start()

    def _serve(self, admin: "AdminLike", token: str | None, listener: socket.socket) -> None:
        try:
            with listener:
                import uvicorn

                from kvbm.observe.api import make_app

                server = uvicorn.Server(
                    uvicorn.Config(
                        make_app(admin, token),
                        loop="asyncio",  # another one would become that of the whole process
                        ws="none",
                        log_config=None,
                        access_log=False,
                        server_header=False,
                        proxy_headers=False,  # the peer's address decides what it may do
                        limit_concurrency=_CONNECTIONS,
                        timeout_graceful_shutdown=1,
                    )
                )
                self._uvicorn = server
                if not self._closing.is_set():
                    server.run(sockets=[listener])
        except Exception:
            if not self._closing.is_set():
                logger.exception("KVBM: internal error in the HTTP server, which ends; the engine goes on")
        except SystemExit:  # uvicorn's way to say that it could not start
            logger.error("KVBM: the HTTP server could not start; the engine goes on")


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket at the first free port, or any for port 0. OSError says what is wrong."""
    family, _, _, _, address = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]
    last = port if port == 0 else min(port + PORTS - 1, 65535)
    for candidate in range(port, last + 1):
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Else a port that an engine just used is taken for a minute. Engines that start together may
            # then bind the same one, but only one of them can listen.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address[0], candidate, *address[2:]))
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise OSError(f"{host}:{candidate} can't be listened on ({error.strerror})") from None
        else:
            return listener
    raise OSError(f"the ports {port} to {last} of {host} are taken")


def _url(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        return f"http://127.0.0.1:{port}, and on all other addresses of this machine"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
