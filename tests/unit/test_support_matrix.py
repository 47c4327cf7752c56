"""docs/support.md is what the committed results make of it, and says nothing of tests that are gone."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from support_matrix import PAGE, RESULTS, Result, committed, page, read  # noqa: E402


def test_page_is_made_of_the_results():
    assert PAGE.read_text() == committed(), "run 'python scripts/support_matrix.py write'"


def test_each_result_is_of_a_test_that_exists():
    for file in RESULTS.glob("*.json"):
        for result in read(file)[1]:
            path, name = result.test.split("[")[0].split("::")
            source = (ROOT / path).read_text()
            assert f"\ndef {name}(" in source, result.test
            assert f'"{result.feature}"' in source, f"{result.test} decides another row now"


def test_each_marked_test_has_been_run():
    marked = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__)
        for name in re.findall(r'mark\.feature\(\s*"([^"]+)"', path.read_text())
    }
    assert marked == {result.feature for file in RESULTS.glob("*.json") for result in read(file)[1]}


def result(feature: str, outcome: str, refused: str | None = None) -> Result:
    return Result(f"tests/test_x.py::test_{feature}", feature, outcome, refused)


@pytest.mark.parametrize(
    ("results", "cell"),
    [
        ([result("x", "passed")], "tested"),
        ([result("x", "passed"), result("x", "failed")], "**fails**"),
        ([result("x", "passed", "too odd")], "refused: too odd"),
        ([result("x", "failed", "too odd")], "**fails**"),
        ([result("x", "skipped")], "not tested"),
        ([result("x", "skipped"), result("x", "passed")], "tested"),
        ([], "not tested"),
    ],
)
def test_cells(results: list[Result], cell: str):
    other = [result("x", "passed"), result("y", "passed")]
    table = page({"a": results, "b": other}).splitlines()[-4:]
    assert table == [
        "| | a | b |",
        "|---|---|---|",
        f"| x | {cell} | tested |",
        "| y | not tested | tested |",
    ]
