"""`kvbm clear`: drop what a running engine has cached."""

import argparse
from typing import Any

from kvbm.cli.client import Client, add_arguments
from kvbm.cli.output import plain, print_json


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "clear",
        help="drop what a running engine has cached",
        description="Drop what a running engine has cached, in all tiers or one, or of one cache salt in "
        "all tiers. What it costs is that prompts are computed again. The engine has to run with "
        "DYN_KVBM_METRICS=1.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tier", choices=["host", "disk"], help="only this tier")
    what.add_argument(
        "--salt",
        help="only blocks of requests with this cache_salt, and of an earlier run whose salt is not known",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    answer = Client(args).post("/api/clear", {"tier": args.tier, "salt": args.salt})
    if args.json:
        print_json(answer)
        return 0
    place = {None: "all tiers", "host": "host memory", "disk": "disk"}[args.tier]
    of_salt = "" if args.salt is None else f" with the salt {args.salt!r}"
    blocks = answer.get("cleared_blocks", 0)
    print(f"Dropped {plain(blocks)} {'block' if blocks == 1 else 'blocks'}{of_salt} from {place}.")
    return 0
