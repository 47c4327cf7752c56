"""`kvbm status`: what a running engine's cache holds and does."""

import argparse
from typing import Any

from kvbm.cli.client import Client, add_arguments
from kvbm.cli.output import plain, print_json, print_table, size

_HEAD = ("engine", "ready", "off_reason")
_TABLES = {"tiers": "tier", "edges": "edge"}  # list to the field that names a row


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "status",
        help="what a running engine's cache holds and does",
        description="What a running engine's cache holds and does. The engine has to run with "
        "DYN_KVBM_METRICS=1. Exit status 0: it is ready; 1: it is not, or can't be reached.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    status = Client(args).get("/api/status")
    if args.json:
        print_json(status)
    else:
        show(status)
    return 0 if status.get("ready") else 1


def show(status: dict[str, Any]) -> None:
    print(f"{status.get('engine') or 'engine'}: {_state(status)}")
    for name, row_name in _TABLES.items():
        rows = status.get(name)
        if rows:
            print()
            _print_rows(rows, row_name)
    rates = status.get("hit_rates")
    if rates:
        print("\nhit rates: " + ", ".join(f"{tier} {_percent(rate)}" for tier, rate in rates.items()))
    # A newer server may tell more than this client knows of.
    known = (*_HEAD, *_TABLES, "hit_rates")
    rest = {key: value for key, value in status.items() if key not in known and value}
    if rest:
        print()
    for key, value in rest.items():
        print(f"{_words(key)}: {plain(value)}")


def _state(status: dict[str, Any]) -> str:
    if status.get("off_reason"):
        return f"caching is off: {status['off_reason']}"
    return "caching" if status.get("ready") else "still starting"


def _print_rows(rows: list[dict[str, Any]], row_name: str) -> None:
    columns = [
        row_name,
        *(key for key in dict.fromkeys(key for row in rows for key in row) if key != row_name),
    ]
    print_table([_words(column) for column in columns], [[_cell(c, row) for c in columns] for row in rows])


def _cell(column: str, row: dict[str, Any]) -> Any:
    value = row.get(column, "")
    return size(value) if column.endswith("bytes") and isinstance(value, int) else value


def _percent(rate: Any) -> str:
    return f"{100 * rate:.1f} %" if isinstance(rate, (int, float)) else plain(rate)


def _words(key: str) -> str:
    return key.replace("_", " ")
