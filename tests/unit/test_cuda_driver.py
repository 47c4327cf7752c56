"""The driver's calls as the driver gets them, read back from memory; without a driver."""

import ctypes
import itertools
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kvbm.transfer.cuda import driver

# As Triton compiles the kernel: pointer, 3 ints, pointer, 4 ints, address, int, and two pointers of its own.
PLACES = [(0, 8), (8, 4), (12, 4), (16, 4), (24, 8), (32, 4), (36, 4), (40, 4), (44, 4), (48, 8), (56, 4)]
PLACES += [(64, 8), (72, 8)]


class Library:
    def __init__(self) -> None:
        self.places = PLACES
        self.numbers = itertools.count(1000)
        self.graphs: dict[int, tuple[Any, ...]] = {}
        self.launches: list[tuple[Any, ...]] = []  # executable graph, stream, what it launches
        self.copies: list[tuple[int, int, int]] = []

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:
        if index.value >= len(self.places):
            return 1
        offset._obj.value, size._obj.value = self.places[index.value]
        return 0

    def cuGraphCreate(self, graph: Any, flags: int) -> int:
        graph._obj.value = next(self.numbers)
        return 0

    def cuGraphAddKernelNode_v2(self, node: Any, graph: Any, before: Any, count: Any, params: Any) -> int:
        assert before is None
        assert count.value == 0
        node._obj.value = graph.value + 1000
        self.graphs[graph.value] = read_node(params.value)
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        executable._obj.value = graph.value + 2000
        return 0

    def cuGraphExecKernelNodeSetParams_v2(self, executable: int, node: int, params: int) -> int:
        assert executable == node + 1000
        self.graphs[node - 1000] = read_node(params)
        return 0

    def cuGraphLaunch(self, executable: int, stream: int) -> int:
        self.launches.append((executable, stream, self.graphs[executable - 2000]))
        return 0


def read_node(at: int) -> tuple[Any, ...]:
    """Function, grid, block, shared bytes and the packed arguments, by the offsets of cuda.h."""
    shape = struct.unpack_from("=Q7I", ctypes.string_at(at, 40))
    kernel_parameters, extra_at, *rest = struct.unpack_from("=4Q", ctypes.string_at(at + 40, 32))
    assert [kernel_parameters, *rest] == [0, 0, 0]
    first, arguments, second, size_at, end = (ctypes.c_void_p * 5).from_address(extra_at)
    assert (first, second, end) == (1, 2, None)
    size = ctypes.c_size_t.from_address(size_at).value
    return (*shape, ctypes.string_at(arguments, size))


class BatchLibrary(Library):
    def cuMemcpyBatchAsync_v2(self, to: int, source: int, sizes: int, count: int, *_: Any) -> int:
        arrays = [(ctypes.c_int64 * count).from_address(at) for at in (to, source, sizes)]
        self.copies += zip(*map(list, arrays), strict=True)
        return 0


class OldLibrary(Library):
    def cuMemcpyAsync(self, to: Any, source: Any, size: Any, stream: Any) -> int:
        self.copies.append((to.value, source.value, size.value))
        return 0


@pytest.fixture
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    made = getattr(request, "param", Library)()
    monkeypatch.setattr(driver, "_library", lambda: made)
    driver._batch_entry.cache_clear()
    yield made
    driver._batch_entry.cache_clear()


def test_a_kernel_gets_its_arguments_where_it_expects_them(library: Library) -> None:
    kernel = driver.Kernel(77, parameters=11, threads=256, shared_bytes=64)
    device, table, host = 2**47 + 16, 2**46 + 32, 2**45 + 48
    arguments = device, 1, 2, 3, table, 4, 5, 6, 2**31 - 1, host, 2**21
    kernel.launch(16, 99, arguments)
    [(_, stream, (*shape, packed))] = library.launches
    assert stream == 99
    assert shape == [77, 16, 1, 1, 256, 1, 1, 64]
    formats = {4: "i", 8: "q"}
    found = [struct.unpack_from(formats[size], packed, offset)[0] for offset, size in PLACES]
    assert found == [*arguments, 0, 0]
    assert len(packed) == 80


def test_threads_do_not_share_arguments(library: Library) -> None:
    kernel = driver.Kernel(77, parameters=11, threads=256, shared_bytes=0)

    def launch(number: int) -> None:
        for _ in range(200):
            kernel.launch(number, number, [number] * 11)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(launch, range(1, 5)))
    assert len(library.launches) == 800
    for _, stream, (_, programs, *_, packed) in library.launches:
        assert struct.unpack_from("q", packed)[0] == programs == stream


def test_each_stream_has_one_graph(library: Library) -> None:
    kernel = driver.Kernel(77, parameters=11, threads=256, shared_bytes=0)
    for stream, number in ((1, 5), (2, 6), (1, 7), (2, 8)):
        kernel.launch(number, stream, [number] * 11)
    (first, *_), (second, *_), *later = library.launches
    assert first != second
    assert [(executable, stream) for executable, stream, _ in later] == [(first, 1), (second, 2)]
    assert [node[1] for *_, node in library.launches] == [5, 6, 7, 8]


def test_a_kernel_of_too_few_parameters_is_refused(library: Library) -> None:
    library.places = PLACES[:5]
    with pytest.raises(driver.CudaError, match="5 parameters can't take 11"):
        driver.Kernel(77, parameters=11, threads=256, shared_bytes=0)


@pytest.mark.parametrize("library", [BatchLibrary, OldLibrary], indirect=True)
def test_ranges_of_a_batch(library: Library) -> None:
    to, source, sizes = (np.arange(6, dtype=np.int64) * step for step in (10, 1000, 7))
    batch = driver.CopyBatch(to[::-1], source, sizes)
    batch.order(1, 3, 5)
    batch.order(3, 3, 5)
    batch.order(5, 6, 5)
    assert library.copies == [(40, 1000, 7), (30, 2000, 14), (0, 5000, 35)]
