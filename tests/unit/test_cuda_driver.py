"""The driver's calls as the driver gets them, read back from memory; without a driver."""

import ctypes
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
        self.launches: list[tuple[Any, ...]] = []
        self.copies: list[tuple[int, int, int]] = []

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:
        if index.value >= len(self.places):
            return 1
        offset._obj.value, size._obj.value = self.places[index.value]
        return 0

    def cuLaunchKernel(self, *arguments: Any) -> int:
        *shape, extra = arguments
        first, at, second, size_at, end = extra
        assert (first, second, end) == (1, 2, None)
        size = ctypes.c_size_t.from_address(size_at).value
        self.launches.append((*shape, ctypes.string_at(at, size)))
        return 0


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
    [(*shape, packed)] = library.launches
    assert shape == [77, 16, 1, 1, 256, 1, 1, 64, 99, None]
    formats = {4: "i", 8: "q"}
    found = [struct.unpack_from(formats[size], packed, offset)[0] for offset, size in PLACES]
    assert found == [*arguments, 0, 0]
    assert len(packed) == 80


def test_threads_do_not_share_arguments(library: Library) -> None:
    kernel = driver.Kernel(77, parameters=11, threads=256, shared_bytes=0)

    def launch(number: int) -> None:
        for _ in range(200):
            kernel.launch(1, number, [number] * 11)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(launch, range(1, 5)))
    assert len(library.launches) == 800
    for *_, stream, _, packed in library.launches:
        assert struct.unpack_from("q", packed)[0] == stream


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
