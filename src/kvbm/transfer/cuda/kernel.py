"""A kernel that gathers pieces of blocks into records, or scatters them, on a few SMs.

Records may lie in device memory or in pinned host memory, which it reads and writes across the bus.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kvbm.transfer.cuda import driver

WORD_BYTES = 8
ALIGNMENT = 16  # of the addresses and sizes of all pieces
# Words of a tile: the largest that pieces are whole multiples of. With more bytes on their way at once 16 SMs
# of an H200 pack 128 blocks sooner: in 0.56 ms by tiles of 2048, 0.45 by 4096, 0.32 by 8192.
_TILES = (8192, 4096, 2048)
_WORDS_A_WARP = 256
_PARAMETERS = 11  # of the kernel, without those that it is compiled for

# Programs, each on an SM of its own.
# Over the bus, measured on an H200 (PCIe 5): fewer lose bandwidth, more gain none.
PROGRAMS_TO_HOST = 8
PROGRAMS_FROM_HOST = 16
# While a prefill runs, whose kernels wait for the last SM: so it is not the fewer the better. Cold prompts of
# 16k cost 8.1 ms with 4, 5.7 with 16, 4.6 with all (benchmarks/results/2026-12-01-h200.md).
PROGRAMS_TO_PACK = 16
PROGRAMS_TO_UNPACK = 8  # for loads while others decode


# Not specialised: every kind of value would be compiled anew, in the middle of serving.
_PLAIN = (
    *("start", "row", "n", "num_pieces", "first_piece", "tiles", "total_tiles"),
    *("records", "record_stride"),
)


@triton.jit(do_not_specialize=_PLAIN)
def _copy(
    index,  # int32: from `start` on device blocks, and `row` elements further record numbers
    start,
    row,
    n,
    pieces,  # int64 (4, all pieces): address, block stride, words, offset in the record in bytes
    num_pieces,
    first_piece,
    tiles,  # per (piece, block)
    total_tiles,
    records,
    record_stride,
    GATHER: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    lane = tl.arange(0, TILE)
    for item in range(tl.program_id(0), total_tiles, tl.num_programs(0)):
        tile = item % tiles
        i = (item // tiles) % n
        piece = first_piece + item // (tiles * n)
        block = tl.load(index + start + i).to(tl.int64)
        record = tl.load(index + start + row + i).to(tl.int64)
        address = tl.load(pieces + piece) + block * tl.load(pieces + num_pieces + piece)
        offset = tl.load(pieces + 3 * num_pieces + piece)
        device = tl.multiple_of(address + tile * (TILE * 8), 16).to(tl.pointer_type(tl.int64))
        outside = tl.multiple_of(records + record * record_stride + offset + tile * (TILE * 8), 16).to(
            tl.pointer_type(tl.int64)
        )
        if WHOLE_TILES:
            if GATHER:
                tl.store(outside + lane, tl.load(device + lane, cache_modifier=".cg"), cache_modifier=".cs")
            else:
                tl.store(device + lane, tl.load(outside + lane, cache_modifier=".cv"))
        else:
            inside = tile * TILE + lane < tl.load(pieces + 2 * num_pieces + piece)
            if GATHER:
                data = tl.load(device + lane, mask=inside, cache_modifier=".cg")
                tl.store(outside + lane, data, mask=inside, cache_modifier=".cs")
            else:
                tl.store(
                    device + lane, tl.load(outside + lane, mask=inside, cache_modifier=".cv"), mask=inside
                )


class PieceCopies:
    """Launches of the kernel over one table of pieces. Any thread may make them, one at a time on a stream.

    pieces: int64 tensor (4, pieces), see above, whose words are `words[0]` to `words[1]`.
    """

    def __init__(self, pieces: torch.Tensor, words: tuple[int, int]) -> None:
        self._pieces = pieces
        self._tile = next((tile for tile in _TILES if not any(n % tile for n in words)), _TILES[-1])
        self._tiles = -(-words[1] // self._tile)
        self._whole = words[0] == words[1] == self._tiles * self._tile
        self._compiled: dict[bool, driver.Kernel | None] = {}

    def launch(
        self,
        stream: torch.cuda.Stream,
        index: torch.Tensor,
        start: int,
        row: int,
        n: int,
        piece_range: tuple[int, int],
        records: int,
        record_stride: int,
        *,
        gather: bool,
        programs: int,
    ) -> None:
        """Copy a range of pieces of n blocks to (gather) or from their records, which begin at `records`.

        index: int32 tensor, see above. record_stride: bytes from one record to the next.
        """
        first, last = piece_range
        total = self._tiles * n * (last - first)
        programs = min(programs, total)
        numbers = start, row, n
        rest = self._pieces.shape[1], first, self._tiles, total, records, record_stride
        compiled = self._compiled.get(gather)
        if compiled is not None:
            arguments = index.data_ptr(), *numbers, self._pieces.data_ptr(), *rest
            compiled.launch(programs, stream.cuda_stream, arguments)
            return
        launcher: Any = _copy
        with torch.cuda.stream(stream):
            found = launcher[(programs,)](
                index,
                *numbers,
                self._pieces,
                *rest,
                GATHER=gather,
                WHOLE_TILES=self._whole,
                TILE=self._tile,
                num_warps=self._tile // _WORDS_A_WARP,
            )
        if gather not in self._compiled:
            self._compiled[gather] = _without_launcher(found)


def _without_launcher(compiled: Any) -> driver.Kernel | None:
    """To launch it directly: Triton's launcher takes three times as long. None if that can't be done."""
    try:
        data = compiled.metadata
        if data.num_ctas != 1 or data.global_scratch_size or data.profile_scratch_size:
            return None
        return driver.Kernel(compiled.function, _PARAMETERS, 32 * data.num_warps, data.shared)
    except (AttributeError, TypeError, driver.CudaError):  # another version of Triton, or of the driver
        return None
