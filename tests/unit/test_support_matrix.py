"""docs/support.md is what the committed results make of it, and says nothing of tests that are gone."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from support_matrix import PAGE, RESULTS, Result, committed, keep, page, read, without_memory  # noqa: E402


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
    """Those of GPUs wait for a machine that has one: until then the table says that they are not tested."""
    marked = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__) and path.parent.name != "gpu"
        for name in re.findall(r'mark\.feature\(\s*"([^"]+)"', path.read_text())
    }
    results = [result for file in RESULTS.glob("*.json") for result in read(file)[1]]
    assert marked == {result.feature for result in results if not result.test.startswith("tests/gpu/")}


def test_later_results_replace_earlier_ones_of_the_same_tests(tmp_path: Path):
    keep("vLLM 1, GPU", [result("x", "failed"), result("y", "passed")], tmp_path)
    file = keep("vLLM 1, GPU", [result("z", "skipped"), result("x", "passed")], tmp_path)
    expected = [result("x", "passed"), result("y", "passed"), result("z", "skipped")]
    assert read(file) == ("vLLM 1, GPU", expected)
    assert list(tmp_path.iterdir()) == [file]


def test_runs_at_the_same_time_lose_nothing(tmp_path: Path):
    features = [str(index) for index in range(100)]
    with ThreadPoolExecutor(8) as threads:
        files = set(threads.map(lambda feature: keep("x", [result(feature, "passed")], tmp_path), features))
    assert {each.feature for each in read(files.pop())[1]} == set(features)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("CPU", "CPU"),
    ],
)
def test_devices(device: str, name: str):
    assert without_memory(device) == name


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
