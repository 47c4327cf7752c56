"""`kvbm bench`: the benchmarks of kvbm.bench."""

import argparse
import sys
from importlib import import_module
from typing import Any

_BENCHMARKS = {
    "disk": "how fast records move between host memory and a disk, beside fio and bare system calls",
    "copies": "how fast blocks move between a GPU and host memory, beside a contiguous copy",
    "blocks": "what hash, match, pin, evict and register cost a block",
    "chat": "end to end: conversations with a real engine, with KVBM and without",
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure disk, copies, block logic, or whole conversations",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join(f"{name:<8} {about}" for name, about in _BENCHMARKS.items()),
        epilog="`kvbm bench NAME --help` shows the options of each.",
    )
    parser.add_argument("benchmark", choices=_BENCHMARKS, metavar="NAME", help=", ".join(_BENCHMARKS))
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of the benchmark")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        # Only now: a benchmark imports numpy and the like, and its options are its own affair.
        benchmark = import_module(f"kvbm.bench.{args.benchmark}")
    except ModuleNotFoundError as error:
        print(
            f"kvbm: this benchmark needs the package {error.name}, which {sys.executable} does not have.",
            file=sys.stderr,
        )
        return 1
    return benchmark.main(args.options, f"kvbm bench {args.benchmark}")
