"""What the benchmarks have in common: how far they are, and where their figures go."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_STDOUT = "-"


def progress(items: Iterable[_Item], label: str, total: int | None = None) -> Iterable[_Item]:
    """`items` with a bar on the terminal, where there is one and tqdm is installed."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, label, total, leave=False, file=sys.stderr)


def make_parser(doc: str | None, prog: str | None) -> argparse.ArgumentParser:
    """With the module's text as description, and `--json`."""
    parser = argparse.ArgumentParser(
        prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="write the figures to this file too; without FILE to standard output, and the words to stderr",
    )
    return parser


@contextlib.contextmanager
def words(where: str | None) -> Iterator[None]:
    """What is printed inside is for people: it leaves standard output to the figures where they go there."""
    with contextlib.redirect_stdout(sys.stderr) if where == _STDOUT else contextlib.nullcontext():
        yield


def write_figures(figures: dict[str, Any], where: str | None) -> None:
    text = json.dumps(figures, indent=1)
    if where == _STDOUT:
        print(text)
    elif where:
        Path(where).write_text(text + "\n")
