"""Choosing how to copy: measured on a clock of the test's, kept in a file that may be anything."""

import json
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbm.transfer.calibration import (
    CalibrationFile,
    Method,
    MethodTable,
    always,
    in_step_method,
    measure,
)

DMA, KERNEL, STAGED = Method.DMA, Method.KERNEL, Method.STAGED
DIRECTIONS = ("offload", "onboard")

TABLE = MethodTable(
    {"offload": [(1, DMA), (8, KERNEL), (32, STAGED)], "onboard": [(1, KERNEL), (8, KERNEL), (32, DMA)]}
)

# ---- choosing ----


@pytest.mark.parametrize(
    ("blocks", "method"),
    [
        (0, DMA),
        (1, DMA),
        (2, DMA),
        (3, KERNEL),  # 3 is nearer to 8 than to 1 in proportion
        (8, KERNEL),
        (15, KERNEL),
        (17, STAGED),
        (32, STAGED),
        (100_000, STAGED),
    ],
)
def test_the_nearest_number_of_blocks(blocks: int, method: Method) -> None:
    assert TABLE.choose("offload", blocks) == method


def test_no_more_than_so_many_by_dma() -> None:
    """To order a piece takes the engine's thread as long, whoever copies sooner."""
    table = MethodTable({"offload": [(1, KERNEL), (8, DMA)], "onboard": [(1, DMA)]}, most_by_dma=100)
    assert [table.choose("offload", n) for n in (1, 100, 101)] == [KERNEL, DMA, STAGED]
    assert [table.choose("onboard", n) for n in (100, 101)] == [DMA, STAGED]


def test_each_direction_has_its_own() -> None:
    assert [TABLE.choose(direction, 1) for direction in DIRECTIONS] == [DMA, KERNEL]
    assert [TABLE.choose(direction, 50) for direction in DIRECTIONS] == [STAGED, DMA]


ALL, DMA_ALONE = list(Method), [Method.DMA]
RECORD = 2 << 20  # in 4 parts of 512 KiB


@pytest.mark.parametrize(
    ("blocks", "record_bytes", "contiguous", "able", "method"),
    [
        (511, RECORD, False, ALL, Method.KERNEL),  # less than a gigabyte: it would wait for the CPU
        (512, RECORD, False, ALL, Method.STAGED),
        (512, RECORD, True, ALL, Method.DMA),
        (511, RECORD, True, ALL, Method.KERNEL),
        (4096, RECORD, False, ALL, Method.STAGED),
        (4097, RECORD, False, ALL, Method.KERNEL),  # too many copies
        (4096, RECORD // 2, False, ALL, Method.STAGED),
        (4096, RECORD // 2 - 4, False, ALL, Method.KERNEL),  # too small ones
        (1, RECORD, False, DMA_ALONE, Method.DMA),
        (9999, RECORD, True, DMA_ALONE, Method.DMA),
    ],
)
def test_loads_inside_a_step(
    blocks: int, record_bytes: int, contiguous: bool, able: list[Method], method: Method
) -> None:
    assert in_step_method(blocks, record_bytes, 4, contiguous, able) is method


@pytest.mark.parametrize("method", Method)
def test_always(method: Method) -> None:
    table = always(method)
    assert {table.choose(direction, n) for direction in DIRECTIONS for n in (0, 1, 1000)} == {method}


# ---- measuring ----


class Device:
    """Copies that take as long as `seconds` says, on a clock that nothing else moves."""

    def __init__(self, seconds: Callable[[str, Method, int, int], float]) -> None:
        self.now = 100.0
        self.seconds = seconds
        self.calls: list[tuple[str, Method, int]] = []

    def copy(self, direction: str, method: Method, blocks: int) -> None:
        call = direction, method, blocks
        self.now += self.seconds(*call, self.calls.count(call))
        self.calls.append(call)

    def clock(self) -> float:
        return self.now


def test_the_fastest_for_each_direction_and_count() -> None:
    def seconds(direction: str, method: Method, blocks: int, before: int) -> float:
        fixed, each = {DMA: (1, 4), KERNEL: (3, 1.5), STAGED: (8, 1.5)}[method]
        return (fixed + each * blocks) * (1e-4 if direction == "offload" or method != STAGED else 2e-4)

    device = Device(seconds)
    table = measure(device.copy, Method, [32, 1, 3], clock=device.clock)
    assert table is not None
    assert table.rows == {
        "offload": [(1, DMA), (3, KERNEL), (32, STAGED)],
        "onboard": [(1, DMA), (3, KERNEL), (32, KERNEL)],
    }


@pytest.mark.parametrize(
    ("method", "times_faster", "best"),
    [
        (KERNEL, 1.0, [DMA, DMA]),
        (KERNEL, 1.4, [DMA, DMA]),
        (KERNEL, 1.6, [KERNEL, KERNEL]),
        (KERNEL, 9.0, [KERNEL, KERNEL]),
        (STAGED, 1.2, [DMA, STAGED]),  # nobody waits for an offload
        (STAGED, 1.3, [STAGED, STAGED]),
    ],
)
def test_what_takes_part_of_the_device_has_to_be_faster(
    method: Method, times_faster: float, best: list[Method]
) -> None:
    for others in ([DMA], [other for other in Method if other != method]):
        device = Device(lambda direction, which, *rest: 0.001 / (times_faster if which == method else 1))
        table = measure(device.copy, [method, *others], [4], clock=device.clock)
        assert table == MethodTable(
            {direction: [(4, which)] for direction, which in zip(DIRECTIONS, best, strict=True)}
        )


def test_only_the_methods_asked_for() -> None:
    device = Device(lambda *call: 0.001)
    table = measure(device.copy, iter([STAGED, DMA]), iter([4]), clock=device.clock)
    assert table is not None
    assert {method for _, method, _ in device.calls} == {STAGED, DMA}
    assert table.choose("offload", 4) in (STAGED, DMA)


def test_the_best_of_three_counts() -> None:
    """The better method was disturbed in all copies that are counted but the second."""

    def seconds(direction: str, method: Method, blocks: int, before: int) -> float:
        if method == DMA:
            return 0.002
        return 0.05 if before in (1, 3) else 0.001

    device = Device(seconds)
    table = measure(device.copy, [DMA, KERNEL], [4], clock=device.clock)
    assert table == MethodTable({direction: [(4, KERNEL)] for direction in DIRECTIONS})


def test_the_first_copy_does_not_count_and_costs_no_budget() -> None:
    """A kernel is compiled then."""
    device = Device(lambda direction, method, blocks, before: 0.001 if before else 60.0)
    table = measure(device.copy, [DMA, KERNEL], [4], clock=device.clock, budget_s=2.0)
    assert table is not None


@pytest.mark.parametrize("slow", range(18))
def test_no_result_beyond_the_budget(slow: int) -> None:
    """Whichever of the copies it is that takes so long, nothing is tried after it."""
    device = Device(lambda *call: 2.1 if len(device.calls) == 4 + slow else 0.001)
    finished = measure(device.copy, [DMA, KERNEL], [1, 8], clock=device.clock, budget_s=2.0)
    assert finished is None
    assert len(device.calls) == 4 + slow + 1


def test_just_within_the_budget() -> None:
    copies = 2 * 2 * 3
    device = Device(lambda *call: 1 / 8)
    assert measure(device.copy, [DMA, KERNEL], [1], clock=device.clock, budget_s=copies / 8) is not None
    assert measure(device.copy, [DMA, KERNEL], [1], clock=device.clock, budget_s=copies / 8 - 0.01) is None


# ---- the file ----


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "methods.json"
    assert CalibrationFile(path).load("H200") is None
    CalibrationFile(path).save("H200", TABLE)
    loaded = CalibrationFile(path).load("H200")
    assert loaded is not None
    for direction in DIRECTIONS:
        assert [tuple(row) for row in loaded.rows[direction]] == TABLE.rows[direction]
        assert all(isinstance(method, Method) for _, method in loaded.rows[direction])
    assert CalibrationFile(path).load("H100") is None
    assert [file.name for file in path.parent.iterdir()] == ["methods.json"]


def test_devices_do_not_disturb_each_other(tmp_path: Path) -> None:
    file = CalibrationFile(tmp_path / "methods.json")
    file.save("one", TABLE)
    file.save("two", always(STAGED))
    file.save("two", always(DMA))
    one, two = file.load("one"), file.load("two")
    assert one is not None
    assert two is not None
    assert one.choose("offload", 8) == KERNEL
    assert two.choose("offload", 8) == DMA


def test_it_lies_in_the_user_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    CalibrationFile().save("x", TABLE)
    assert (tmp_path / "cache/kvbm/copy-methods.json").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    CalibrationFile().save("x", TABLE)
    assert (tmp_path / "home/.cache/kvbm/copy-methods.json").exists()


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that runs under a number nobody knows."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    CalibrationFile(tmp_path / "methods.json").save("x", TABLE)
    assert CalibrationFile(tmp_path / "methods.json").load("x") is not None
    CalibrationFile().save("x", TABLE)
    assert CalibrationFile().load("y") is None


def stored(**changes: object) -> str:
    good: dict[str, object] = {"offload": [[1, "dma"]], "onboard": [[1, "dma"]]}
    return json.dumps({"key": {name: rows for name, rows in (good | changes).items() if rows is not None}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"key"',
        '{"key": null}',
        '{"key": []}',
        '{"key": "offload"}',
        stored(offload=None),
        stored(onboard=None),
        stored(offload=[]),
        stored(offload=7),
        stored(offload=None, onboard=None),
        stored(offload=[1]),
        stored(offload=[[1]]),
        stored(offload=[[1, "dma", 2]]),
        stored(offload=[["many", "dma"]]),
        stored(offload=[[None, "dma"]]),
        stored(offload=[[1, "teleport"]]),
        stored(onboard=[[1, "dma"], [8, None]]),
        stored(onboard=[[float("nan"), "dma"]]),
        stored(onboard=[[float("inf"), "dma"]]),
        "\0" * 100,
    ],
)
def test_a_damaged_file_is_passed_over(tmp_path: Path, text: str) -> None:
    path = tmp_path / "methods.json"
    path.write_text(text)
    file = CalibrationFile(path)
    assert file.load("key") is None
    file.save("key", TABLE)
    loaded = file.load("key")
    assert loaded is not None
    assert loaded.choose("offload", 8) == KERNEL


def test_damage_to_one_device_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "methods.json"
    file = CalibrationFile(path)
    file.save("good", TABLE)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bad": 5}))
    assert file.load("bad") is None
    assert file.load("good") is not None


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "methods.json"
    path.write_bytes(b"\xff\xfe\xfa")
    assert CalibrationFile(path).load("key") is None


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "file" / "methods.json", Path("/proc/nowhere/methods.json")):
        CalibrationFile(path).save("key", TABLE)
        assert CalibrationFile(path).load("key") is None


def test_nothing_is_left_behind_where_the_file_cannot_be_put(tmp_path: Path) -> None:
    (tmp_path / "methods.json").mkdir()
    CalibrationFile(tmp_path / "methods.json").save("key", TABLE)
    assert CalibrationFile(tmp_path / "methods.json").load("key") is None
    assert [file.name for file in tmp_path.iterdir()] == ["methods.json"]
