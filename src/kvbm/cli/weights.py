"""`kvbm weights`: tell a running engine's cache that the model's weights have changed."""

import argparse
from typing import Any

from kvbm.cli.client import Client, add_arguments
from kvbm.cli.output import print_json


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "weights",
        help="tell a running engine that its weights have changed",
        description="Tell a running engine that the model's weights have changed: what was computed with the "
        "old ones is not used any more. vLLM's reset_prefix_cache(reset_connector=True) does the same, and "
        "empties the device cache, which this command does not. The engine has to run with "
        "DYN_KVBM_METRICS=1.",
    )
    parser.add_argument(
        "version",
        nargs="?",
        help="names the new weights: what is cached of them is found again wherever the same name is given",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    answer = Client(args).post("/api/weights", {"version": args.version})
    if args.json:
        print_json(answer)
        return 0
    unnamed = " (they have no name: no other run will use their blocks)" if args.version is None else ""
    print(f"New weights{unnamed or f': {args.version}'}.")
    return 0
