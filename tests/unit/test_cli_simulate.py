"""`kvbm simulate`: what it prints, and how it ends."""

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from kvbm.cli import simulate, simulate_plot
from kvbm.errors import ConfigError, KvbmError, TraceError, UsageError

SIZE = 16
MIB = 1 << 20


def a_trace(path: Path, **header: Any) -> Path:
    """Ten prompts of 4 blocks, each asked three times, the third time after all others; 30 requests."""
    lines: list[dict[str, Any]] = [{"kvbm_trace": 1, "block_size": SIZE, **header}]
    for turn in range(3):
        for number in range(10):
            first = turn // 2 * 30 + number * 2 + turn
            ids = [number * 4 + i for i in range(4)]
            lines.append({"timestamp": first, "input_length": 65, "output_length": 1, "hash_ids": ids})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return a_trace(tmp_path / "trace.jsonl", block_bytes=2 * MIB)


@pytest.fixture
def nameless(tmp_path: Path) -> Path:
    """Does not say how large a block is."""
    return a_trace(tmp_path / "trace.jsonl")


def run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    simulate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["simulate", *map(str, argv)])
    return args.run(args)


def answer(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert run(*argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_table_and_bars(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trace, "--host-blocks", "4,40", "--policy", "lru,segmented-lru") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "30 requests in 0.0 minutes, 1,950 tokens of prompts in blocks of 16" in out
    assert "would hold 40 blocks at the end and have had 65.6% of the tokens" in out
    rows = [line for line in out.splitlines() if "lru" in line]
    table, bars = rows[:4], rows[4:]
    assert [re.split(r"\s{2,}", row.strip()) for row in table] == [
        ["8.4 MB", "lru", "32.8%", "32.8%", "76"],
        ["83.9 MB", "lru", "65.6%", "65.6%", "0"],
        ["8.4 MB", "segmented-lru", "32.8%", "32.8%", "76"],
        ["83.9 MB", "segmented-lru", "65.6%", "65.6%", "0"],
    ]
    assert bars[0] == f" 8.4 MB  lru           |{'=' * 25:<50}|  32.8%"
    assert bars[1] == f"83.9 MB  lru           |{'=' * 50}|  65.6%"


def test_all_tiers_are_shown(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [trace, "--device-blocks", 4, "--host-blocks", 16, "--disk-blocks", "0,100", "--no-filter"]
    assert run(*argv) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.strip().startswith("host"))
    assert re.split(r"\s{2,}", header.strip()) == [
        *("host", "disk", "policy", "hit rate", "of device", "of host", "of disk"),
        *("evicted blocks", "written to disk"),
    ]
    without, with_disk = [re.split(r"\s{2,}", line.strip()) for line in lines if "|" in line]
    assert (without[1], with_disk[1]) == ("none", "0.2 GB")
    bars = [line.partition("|")[2] for line in lines if "|" in line]
    assert bars[0].startswith("#" * 25 + " ")
    assert bars[1].startswith("#" * 25 + "+" * 25 + "|")


def test_requests_are_replayed_in_the_order_of_time(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # In the file the second time of asking comes after the first of all others.
    (result,) = answer(capsys, trace, "--host-blocks", 4)["results"]
    assert result["host_hits"] == 40


def test_json(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--host-blocks", "8", "--disk-blocks", 50, "--limit", 20]
    shown = answer(capsys, trace, *argv)
    assert (shown["requests"], shown["block_size"], shown["block_bytes"]) == (20, SIZE, 2 * MIB)
    assert shown["infinite_cache"] == {"hit_rate": pytest.approx(640 / 1300), "hits": 40, "blocks": 40}
    (result,) = shown["results"]
    assert (result["host_blocks"], result["disk_blocks"], result["disk_filter"]) == (8, 50, True)
    assert result["host_hits"] + result["disk_hits"] + result["misses"] == result["prompt_blocks"] == 80
    assert result["hit_rate"] == pytest.approx(16 * result["host_hits"] / 1300)
    assert result["missed_tokens"] == 1300 - 16 * 40
    assert result["disk_policy"] == "segmented-lru"
    assert answer(capsys, trace, *argv, "--disk-policy", "lru")["results"][0]["disk_policy"] == "lru"


def test_sizes_in_gb(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = answer(capsys, trace, "--host-gb", "0.01,0.1", "--disk-gb", "1", "--block-mib", "1")
    assert [result["host_blocks"] for result in shown["results"]] == [9, 95]
    assert {result["disk_blocks"] for result in shown["results"]} == {953}
    assert shown["block_bytes"] == MIB
    shown = answer(capsys, trace, "--host-gb", "0.01")  # as the trace says
    assert shown["results"][0]["host_blocks"] == 4
    shown = answer(capsys, trace, "--host-gb", "0.01", "--block-bytes", "1000")
    assert shown["results"][0]["host_blocks"] == 10_000


def test_sizes_without_being_asked(nameless: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(nameless) == 0
    out = capsys.readouterr().out
    sizes = [int(line.split()[0]) for line in out.splitlines() if line.endswith("%") and "|" in line]
    assert sizes == [1, 2, 4, 8, 20, 40]  # 1 % to 100 % of what an infinite cache holds
    assert "40 blocks" in out


def test_huge_tiers_take_no_memory(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = answer(capsys, trace, "--host-gb", "1000000000", "--disk-gb", "1000000000", "--device-blocks", 0)
    (result,) = shown["results"]
    assert result["host_blocks"] > 10**11
    assert result["host_hits"] == shown["infinite_cache"]["hits"]


def test_a_disk_without_a_host_cache(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = answer(capsys, trace, "--host-blocks", 0, "--disk-blocks", "100")
    (result,) = shown["results"]
    # As the engine has it: a small host tier to pass through, and no filter.
    assert (result["staging"], result["host_blocks"], result["disk_filter"]) == (True, 100, False)
    assert result["disk_writes"] == 40
    assert run(trace, "--host-blocks", 0, "--disk-blocks", "100") == 0
    assert re.search(r"^none +0\.2 GB", capsys.readouterr().out, re.MULTILINE)


def test_nothing_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    path.write_text('{"timestamp": 0, "input_length": 9, "output_length": 9, "hash_ids": [0]}\n')
    assert run(path) == 0
    out = capsys.readouterr().out
    assert "have had 0.0% of the tokens" in out
    assert "|" not in out


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["--policy", "lru,mru"], ConfigError, "--policy = 'mru'"),
        (["--disk-policy", "mru"], ConfigError, "--disk-policy = 'mru'"),
        (["--host-gb", "1"], UsageError, r"what a block takes.*--block-bytes"),
        (["--disk-gb", "1"], UsageError, r"what a block takes.*--block-bytes"),
        (["--host-blocks", "0", "--disk-blocks", "9"], UsageError, "--block-bytes"),
        (["--plot", "hits.txt"], UsageError, r"\.svg"),
        (["--plot", "/nowhere/hits.svg"], UsageError, "no directory /nowhere"),
        (["--block-size", "32"], TraceError, "blocks of 16 tokens"),
    ],
)
def test_wrong_usage_is_an_error(
    nameless: Path, argv: list[str], error: type[KvbmError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(nameless, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--host-gb", "1,x"], "'x' is not a number >= 0"),
        (["--host-gb", "-1"], "expected one argument|is not a number"),
        (["--host-gb", "inf"], "'inf' is not a number"),
        (["--host-gb", "nan"], "'nan' is not a number"),
        (["--host-blocks", "1.5"], "'1.5' is not an integer >= 0"),
        (["--host-gb", ""], "'' is not a number"),
        (["--limit", "0"], "'0' is not an integer >= 1"),
        (["--host-gb", "1", "--host-blocks", "1"], "not allowed with"),
        (["--block-bytes", "1", "--block-mib", "1"], "not allowed with"),
    ],
)
def test_arguments_that_are_none(
    trace: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(trace, *argv)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("text", "message"), [("", "no requests"), ("{\n", "line 1")])
def test_files_that_hold_nothing(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        run(path)
    with pytest.raises(TraceError, match="can't be read"):
        run(tmp_path / "none")


# ---- images and progress ----


def test_without_matplotlib_it_says_what_to_install(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulate_plot, "find_spec", lambda name: None)
    with pytest.raises(KvbmError, match="pip install matplotlib") as raised:
        run(trace, "--plot", tmp_path / "hits.svg")
    assert not isinstance(raised.value, UsageError)  # the exit status is 1
    assert capsys.readouterr().out == ""  # before the work, not after it


@pytest.mark.parametrize("sizes", [("4,40", "0"), ("4", "0,8,80"), ("0,4,40", "0,80")])
@pytest.mark.parametrize("ending", ["svg", "png"])
def test_an_image(trace: Path, tmp_path: Path, sizes: tuple[str, str], ending: str) -> None:
    pytest.importorskip("matplotlib")
    image = tmp_path / f"hits.{ending}"
    argv = ["--host-blocks", sizes[0], "--disk-blocks", sizes[1], "--policy", "lru,segmented-lru"]
    assert run(trace, *argv, "--plot", image) == 0
    assert image.stat().st_size > 1000


def test_an_image_that_can_not_be_written(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "hits.svg").mkdir()
    with pytest.raises(KvbmError, match="can't be written"):
        run(trace, "--plot", tmp_path / "hits.svg")


class Terminal:
    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def test_a_terminal_without_tqdm(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert run(trace, "--json") == 0


def test_a_terminal_with_tqdm(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar:
        total = done = 0

        def __init__(self, total: int, **options: Any) -> None:
            Bar.total = total

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, count: int = 1) -> None:
            Bar.done += count

    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("tqdm", loader=None))  # type: ignore[arg-type]
    monkeypatch.setattr(module, "tqdm", Bar, raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", module)
    assert run(trace, "--host-blocks", "1,2") == 0
    assert Bar.total == 0  # nobody looks
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(trace, "--host-blocks", "1,2") == 0
    assert Bar.total == Bar.done == 60
