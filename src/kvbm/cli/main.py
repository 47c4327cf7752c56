"""The command `kvbm`. One module a command: its `add_parser` adds the arguments and sets `run`.

Exit status: 0 all well, 1 something was found or failed, 2 wrong usage or configuration. Modules import
torch, numpy and the like inside their functions: `kvbm config` should not take seconds.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from kvbm import __version__
from kvbm.cli import bench, clear, config, doctor, explain, simulate, status, weights
from kvbm.errors import ConfigError, KvbmError, UsageError

COMMANDS = (doctor, config, status, explain, clear, weights, simulate, bench)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvbm",
        description="Looks after KVBM, the KV-cache block manager. docs/cli.md shows each command.",
    )
    parser.add_argument("--version", action="version", version=f"kvbm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the command line `argv`; SystemExit where argparse ends it."""
    args = make_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        status = run(args)
        sys.stdout.flush()
        return status
    except (ConfigError, UsageError) as error:
        print(f"kvbm: {error}", file=sys.stderr)
        return 2
    except KvbmError as error:
        print(f"kvbm: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `kvbm status | head`; a second try to flush, at exit, must not fail either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
