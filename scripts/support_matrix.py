#!/usr/bin/env python3
"""Make docs/support.md from what tests have shown.

    python scripts/support_matrix.py run tests/engine    run the tests that decide a row, keep their results
    python scripts/support_matrix.py add FILE...            add the results that other machines have kept
    python scripts/support_matrix.py write                  write the table

A test decides a row by `@pytest.mark.feature("LoRA adapters", refused="the reason, if it is not cached")`. A
file of docs/support-results is a column: the results of one engine on one device, with those of earlier runs
where this run has none. Several may run at the same time; `add` puts files of other machines together.
"""

import argparse
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "support-results"
PAGE = ROOT / "docs" / "support.md"

INTRODUCTION = """\
# What is supported

Made by `scripts/support_matrix.py` from test results; do not edit. What is tested runs on a real engine: the
answers are token for token those of the same engine without KVBM. Some refusals are shown on vLLM's objects.

- **tested**: and the tokens were served from KVBM's tiers.
- **refused**: such a request is not cached, or caching is off for such an engine. It is counted or logged,
  with this reason.
- **not tested**: nobody has run it there. It may work.

What vLLM's interface makes impossible is in [vllm.md](vllm.md).
"""


@dataclass(frozen=True)
class Result:
    test: str
    feature: str
    outcome: str  # passed, failed, skipped
    refused: str | None = None


class Recorder:
    """A pytest plugin: keeps tests without a row from running, and the results of the others."""

    def __init__(self) -> None:
        self.results: dict[str, Result] = {}
        self._features: dict[str, Any] = {}

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        found = {item.nodeid: item.get_closest_marker("feature") for item in items}
        self._features = {test: marker for test, marker in found.items() if marker is not None}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self._features])
        items[:] = [item for item in items if item.nodeid in self._features]

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid
        if test in self._features and (report.when == "call" or report.outcome != "passed"):
            marker = self._features[test]
            refused = marker.kwargs.get("refused")
            self.results[test] = Result(test, marker.args[0], report.outcome, refused)


def run(arguments: list[str]) -> int:
    import pytest

    recorder = Recorder()
    status = int(pytest.main(arguments, plugins=[recorder]))
    column = this_column()
    file = keep(column, recorder.results.values())
    print(f"{len(recorder.results)} results of {column} in {file}")
    return status


def keep(column: str, results: Iterable[Result], folder: Path = RESULTS) -> Path:
    """Put results into the file of their column, in place of earlier ones of the same tests."""
    file = folder / (re.sub(r"[^a-z0-9.]+", "-", column.lower()) + ".json")
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read(file)[1] if file.is_file() else []
        by_test = {result.test: result for result in (*known, *results)}
        rows = [asdict(by_test[test]) for test in sorted(by_test)]
        file.write_text(json.dumps({"column": column, "results": rows}, indent=1, ensure_ascii=False) + "\n")
    finally:
        os.close(lock)
    return file


def this_column() -> str:
    import torch
    import vllm

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return f"vLLM {vllm.__version__.split('+')[0]}, {without_memory(device)}"


def without_memory(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" is an NVIDIA H100: how much memory it has decides no row."""
    return re.split(r"[ -](?:\d+ ?GB|SXM)", device)[0]


def read(file: Path) -> tuple[str, list[Result]]:
    content = json.loads(file.read_text())
    return content["column"], [Result(**result) for result in content["results"]]


def page(columns: Mapping[str, Iterable[Result]]) -> str:
    """columns: results by engine and device."""
    by_cell: dict[tuple[str, str], list[Result]] = {}
    for column, results in columns.items():
        for result in results:
            by_cell.setdefault((result.feature, column), []).append(result)
    features = sorted({feature for feature, _ in by_cell}, key=str.lower)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for feature in features:
        cells = [_cell(by_cell.get((feature, column), [])) for column in columns]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def _cell(results: list[Result]) -> str:
    outcomes = {result.outcome for result in results}
    if "failed" in outcomes:
        return "**fails**"
    if "passed" not in outcomes:
        return "not tested"
    refused = sorted({result.refused for result in results if result.refused})
    return f"refused: {'; '.join(refused)}" if refused else "tested"


def committed() -> str:
    """The page that the results in the repository make."""
    return page(dict(read(file) for file in sorted(RESULTS.glob("*.json"))))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write", help="write docs/support.md")
    commands.add_parser("run", help="run tests; all arguments go to pytest")
    commands.add_parser("add", help="add files of results to docs/support-results")
    options, rest = parser.parse_known_args()
    if options.command == "run":
        return run(rest)
    if options.command == "add":
        for file in rest:
            print(keep(*read(Path(file))))
        return 0
    PAGE.write_text(committed())
    return 0


if __name__ == "__main__":
    sys.exit(main())
