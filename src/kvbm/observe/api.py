"""The HTTP routes over an engine's cache. Imported by the server's thread: FastAPI takes a second to load.

Handlers are plain functions, which a few threads execute, so that a slow answer keeps nobody waiting. Bodies
are parsed there as well, since a million tokens take a while.
"""

import base64
import contextlib
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import Annotated, Any, Protocol, TypeVar

import anyio.to_thread
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from kvbm import __version__
from kvbm.errors import StateError, UsageError
from kvbm.observe.access import NEEDS_TOKEN, App, Guard
from kvbm.observe.measurements import Measurements
from kvbm.observe.metrics import render
from kvbm.observe.schema import (
    Cleared,
    ClearOrder,
    Invalid,
    ListQuery,
    Pinned,
    PinOrder,
    Prefetching,
    PrefetchOrder,
    Refusal,
    Released,
    Requests,
    RequestStatus,
    Resized,
    ResizeOrder,
    Status,
    Weights,
    WeightsOrder,
    status_of,
)

logger = logging.getLogger(__name__)

THREADS = 4
MAX_BODY_BYTES = 16_000_000  # a million tokens take 12 at most
_MAX_DRAINED_BYTES = 4 * MAX_BODY_BYTES  # of a body that is too large, so that its sender reads our answer
_MAX_FIELDS = 20  # of a refusal

_Body = TypeVar("_Body", bound=BaseModel)


class AdminLike(Protocol):
    """What the routes need of `kvbm.runtime.admin.Admin`, whose docstrings say what it does. Any thread may
    call it; UsageError says, in words for the user, what can't be done."""

    def measure(self) -> Measurements: ...
    def requests(self, limit: int) -> list[dict[str, Any]]: ...
    def request(self, request_id: str) -> dict[str, Any] | None: ...
    def misses(self) -> dict[str, int]: ...
    def clear(self, tier: str | None = None, salt: str | None = None) -> int: ...
    def new_weights(self, version: str | None = None) -> str: ...
    def resize(self, tier: str, blocks: int) -> int: ...
    def pin(self, tokens: list[int], ttl_s: float, salt: str | None = None) -> tuple[str, int]: ...
    def unpin(self, name: str) -> int: ...
    def prefetch(self, tokens: list[int], salt: str | None = None) -> tuple[int, int]: ...


_WHY: dict[int, str] = {
    400: "It can't be done with these values.",
    403: NEEDS_TOKEN,
    404: "There is no such thing.",
    409: "It can't be done in the cache's present state.",
    413: "The body is too large.",
    415: "The body is not called JSON.",
    422: "What was sent is not what the schema says.",
}


def _refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": Invalid if code == 422 else Refusal, "description": _WHY[code]} for code in codes}


def _order(model: type[BaseModel]) -> dict[str, Any]:
    """For OpenAPI, which can't know of a body that `_parsed` reads."""
    schema = {"schema": model.model_json_schema()}
    return {"requestBody": {"required": True, "content": {"application/json": schema}}}


async def _raw(request: Request) -> bytes:
    """The body, if it is JSON: with another type, browsers would send it on behalf of any page."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, "The body has to be JSON: send the header 'Content-Type: application/json'.")
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            body += chunk
        elif size > _MAX_DRAINED_BYTES:
            break
    if size > MAX_BODY_BYTES:
        raise HTTPException(413, f"The body is larger than {MAX_BODY_BYTES:,} bytes.")
    return bytes(body)


def _parsed(model: type[_Body]) -> Callable[[bytes], _Body]:
    """A dependency: the body as `model`."""

    def parse(raw: Annotated[bytes, Depends(_raw)]) -> _Body:
        try:
            return model.model_validate_json(raw)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False, include_input=False)) from None

    return parse


# ---- the app


def make_app(admin: AdminLike, token: str | None) -> App:
    """The ASGI app of an engine. token: what lets clients of other machines in; None: nothing does."""
    app = FastAPI(
        title="KVBM",
        version=__version__,
        description="State and administration of an engine's KV cache.",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_few_threads,
    )
    page, headers = load_page()
    app.include_router(_open_routes(admin))
    app.include_router(_guarded_routes(admin, page, headers))
    app.exception_handler(UsageError)(_unusable)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_no_route)
    app.exception_handler(Exception)(_internal)
    return Guard(app, token, (page, headers))


@contextlib.asynccontextmanager
async def _few_threads(_: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    yield


def _open_routes(admin: AdminLike) -> APIRouter:
    router = APIRouter()
    texts: dict[str, Any] = {
        media: {"schema": {"type": "string"}} for media in ("text/plain", "application/openmetrics-text")
    }

    @router.get("/metrics", response_class=Response, responses={200: {"content": texts}})
    def metrics(request: Request) -> Response:
        """For Prometheus."""
        body, media_type = render(admin.measure(), admin.misses(), request.headers.get("accept", ""))
        return Response(body, headers={"content-type": media_type, "cache-control": "no-store"})

    return router


def _guarded_routes(admin: AdminLike, page: bytes, page_headers: dict[str, str]) -> APIRouter:
    bearer = HTTPBearer(auto_error=False, description="KVBM_ADMIN_TOKEN; not asked for on this machine.")
    router = APIRouter(dependencies=[Security(bearer)], responses=_refusals(403))
    takes_body = _refusals(413, 415, 422)

    lobby = {
        "application/json": {"schema": Refusal.model_json_schema()},
        "text/html": {"schema": {"type": "string"}},  # the page, which asks for the token
    }

    @router.get(
        "/", response_class=HTMLResponse, responses={403: {"description": NEEDS_TOKEN, "content": lobby}}
    )
    def index() -> Response:
        """The page for people."""
        return Response(page, headers=page_headers)

    @router.get("/api/status")
    def status() -> Status:
        """Tiers, flows, hit rates."""
        return status_of(admin.measure(), admin.misses())

    @router.get("/api/requests", responses=_refusals(422))
    def requests(query: Annotated[ListQuery, Query()]) -> Requests:
        """The last requests: where their tokens came from, and why the rest was computed."""
        return Requests(requests=[RequestStatus(**request) for request in admin.requests(query.limit)])

    @router.get("/api/requests/{request_id:path}", responses=_refusals(404, 422))
    def request(request_id: str) -> RequestStatus:
        """One request, by its id or by how its id begins."""
        found = admin.request(request_id) if request_id else None
        if found is None:
            raise HTTPException(404, f"No request {request_id[:200]!r} is known, or no longer.")
        return RequestStatus(**found)

    @router.post("/api/clear", openapi_extra=_order(ClearOrder), responses=_refusals(400, 409) | takes_body)
    def clear(order: Annotated[ClearOrder, Depends(_parsed(ClearOrder))]) -> Cleared:
        """Forget all blocks, those of one tier, or those of one salt in every tier."""
        return Cleared(cleared_blocks=admin.clear(order.tier, order.salt))

    @router.post(
        "/api/weights", openapi_extra=_order(WeightsOrder), responses=_refusals(400, 409) | takes_body
    )
    def new_weights(order: Annotated[WeightsOrder, Depends(_parsed(WeightsOrder))]) -> Weights:
        """The model's weights have changed: what was computed with the old ones is not used any more."""
        return Weights(version=admin.new_weights(order.version))

    @router.post("/api/resize", openapi_extra=_order(ResizeOrder), responses=_refusals(400, 409) | takes_body)
    def resize(order: Annotated[ResizeOrder, Depends(_parsed(ResizeOrder))]) -> Resized:
        """Use so many blocks of what a tier was started with."""
        return Resized(blocks=admin.resize(order.tier, order.blocks))

    @router.post("/api/pin", openapi_extra=_order(PinOrder), responses=_refusals(400, 409) | takes_body)
    def pin(order: Annotated[PinOrder, Depends(_parsed(PinOrder))]) -> Pinned:
        """Keep what the host tier has of a prefix for some time."""
        name, blocks = admin.pin(order.tokens, order.ttl_s, order.salt)
        return Pinned(pin=name, blocks=blocks)

    @router.delete("/api/pins/{name}", responses=_refusals(404, 422))
    def unpin(name: str) -> Released:
        """Let go of a pin before its time."""
        try:
            return Released(released_blocks=admin.unpin(name))
        except UsageError as error:
            raise HTTPException(404, str(error)) from None

    @router.post(
        "/api/prefetch", openapi_extra=_order(PrefetchOrder), responses=_refusals(400, 409) | takes_body
    )
    def prefetch(order: Annotated[PrefetchOrder, Depends(_parsed(PrefetchOrder))]) -> Prefetching:
        """Read what lies on disk of a prefix into the host tier."""
        host, reading = admin.prefetch(order.tokens, order.salt)
        return Prefetching(host_blocks=host, reading_blocks=reading)

    return router


def load_page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers. Nothing but its own style and script, named by their digests, is executed."""
    page = files("kvbm.observe").joinpath("page.html").read_text("utf-8")
    sources = {
        tag: base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        for tag in ("style", "script")
        if (found := re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
    }
    policy = (
        f"default-src 'none'; style-src 'sha256-{sources['style']}'; "
        f"script-src 'sha256-{sources['script']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


# ---- refusals: the handlers get `Exception`, as Starlette's type of a handler says


def _unusable(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 409 if isinstance(error, StateError) else 400)


def _invalid(_: Request, error: Exception) -> JSONResponse:
    """The first fault as a sentence, and the first ones by field."""
    faults = error.errors() if isinstance(error, RequestValidationError) else []
    fields = [{"field": _place(fault["loc"]), "message": fault["msg"]} for fault in faults[:_MAX_FIELDS]]
    first = fields[0] if fields else {"field": "body", "message": "can't be read"}
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return JSONResponse({"detail": f"{first['field']}: {first['message']}{more}.", "fields": fields}, 422)


def _place(location: tuple[str | int, ...]) -> str:
    """("tokens", 3) as tokens[3]."""
    names = [part for part in location if part not in ("query", "path")]
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names)
    return text.lstrip(".") or "body"


def _no_route(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        return _internal(request, error)
    detail = error.detail
    if detail == "Not Found":
        detail = f"There is nothing at {request.url.path[:200]}: /openapi.json lists what there is."
    elif detail == "Method Not Allowed":
        detail = f"{request.url.path[:200]} has no {request.method[:20]}: /openapi.json lists what there is."
    return JSONResponse({"detail": detail}, error.status_code, headers=error.headers)


def _internal(request: Request, error: Exception) -> JSONResponse:
    logger.error("KVBM: internal error at %s", request.url.path, exc_info=error)
    return JSONResponse({"detail": "An internal error; the engine's log has it, and goes on."}, 500)
