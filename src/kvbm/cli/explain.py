"""`kvbm explain`: where a request's tokens came from, and why the rest was computed."""

import argparse
import time
import urllib.parse
from typing import Any

from kvbm.cli.client import Client, NotFoundError, ServerError, add_arguments
from kvbm.cli.output import plain, print_json, print_table

_TOKENS = {
    "prompt_tokens": "tokens of the prompt",
    "device_tokens": "  found in device memory",
    "host_tokens": "  loaded from host memory",
    "disk_tokens": "  loaded from disk",
    "failed_tokens": "  that failed to load",
    "computed_tokens": "  computed",
}
_SHORT = {
    "device_tokens": "device",
    "host_tokens": "host",
    "disk_tokens": "disk",
    "computed_tokens": "computed",
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "explain",
        help="where a request's tokens came from, and why the rest was computed",
        description="Where a request's tokens came from, and why the rest was computed. The engine has to "
        "run with DYN_KVBM_METRICS=1.",
    )
    parser.add_argument(
        "request", nargs="?", help="its id, or the beginning of it; without, the last requests are listed"
    )
    parser.add_argument("--limit", type=_count, default=10, help="how many are listed (default 10)")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    client = Client(args)
    if args.request is None:
        answer = client.get("/api/requests", limit=args.limit)
    else:
        try:
            answer = client.get(f"/api/requests/{urllib.parse.quote(args.request, safe='')}")
        except NotFoundError as error:
            detail = (error.detail or str(error)).rstrip(".")
            raise ServerError(f"{detail}; `kvbm explain` without an id lists what is remembered.") from error
    if args.json:
        print_json(answer)
    elif args.request is None:
        show_list(answer.get("requests") or [])
    else:
        show_one(answer)
    return 0


def show_list(requests: list[dict[str, Any]]) -> None:
    if not requests:
        print("No request has come yet.")
        return
    rows = [
        [request.get("id", "?"), _when(request.get("at")), request.get("prompt_tokens", 0)]
        + [request.get(key, 0) for key in _SHORT]
        + [request.get("reason") or ""]
        for request in requests
    ]
    print_table(["request", "at", "prompt", *_SHORT.values(), "why not all of it"], rows)


def show_one(request: dict[str, Any]) -> None:
    print(f"request {request.get('id', '?')}, {_when(request.get('at'))}")
    for key, words in _TOKENS.items():
        if request.get(key) or (key in request and key != "failed_tokens"):
            print(f"{words:<26}{plain(request[key]):>12}")
    if request.get("saved_seconds"):
        print(f"{'seconds saved':<26}{plain(request['saved_seconds']):>12}")
    # The server's sentence names the block that was missed, and why.
    text = request.get("explanation") or request.get("reason")
    if text:
        print(f"\n{text}")


def _when(at: Any) -> str:
    if isinstance(at, (int, float)):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    return plain(at) if at else ""


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number
