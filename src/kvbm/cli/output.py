"""How commands print."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as they must be; numbers to the right."""
    cells = [[plain(cell) for cell in row] for row in rows]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(header))]
    widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(header))]
    for row in (header, *cells):
        fitted = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        print("  ".join(fitted).rstrip())


def plain(value: Any) -> str:
    """A value as people write it."""
    if value is None or value == {} or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}".replace("_", " ") for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(plain, value))
    return str(value)


def size(bytes_: float) -> str:
    """In the unit of the settings, where 1 GB is 1e9 bytes."""
    return f"{bytes_ / 1e9:,.1f} GB" if bytes_ >= 1e8 else f"{bytes_ / 1e6:,.1f} MB"


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[\d,.]+( [GM]B| ?%)?|none", cell) is not None
