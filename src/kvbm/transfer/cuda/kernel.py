"""A kernel that gathers pieces of blocks into records, or scatters them, on a few SMs.

Records may lie in device memory or in pinned host memory, which it reads and writes across the bus.
"""

from typing import Any

import triton
import triton.language as tl

WORD_BYTES = 8
ALIGNMENT = 16  # of the addresses and sizes of all pieces
_TILE_WORDS = 2048
_WARPS = 8

# Programs, each on an SM of its own.
# Over the bus, measured on an H200 (PCIe 5): fewer lose bandwidth, more gain none.
PROGRAMS_TO_HOST = 8
PROGRAMS_FROM_HOST = 16
# To pack a half of 137 MiB takes 8 SMs 1.5 ms. Medians of cold prompts were lower with 64 in all runs, but in
# the one that had both not by more than its noise (benchmarks/results/2026-11-26-vllm-in-turn-h100.md).
PROGRAMS_TO_PACK = 64
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


def launch(
    index: object,
    start: int,
    row: int,
    n: int,
    pieces: object,
    num_pieces: int,
    piece_range: tuple[int, int],
    words: tuple[int, int],
    records: int,
    record_stride: int,
    *,
    gather: bool,
    programs: int,
) -> None:
    """On torch's current stream: copy a range of pieces of n blocks to (gather) or from their records.

    index: int32 tensor; pieces: int64 tensor, see above; words: least and most in a piece.
    """
    first, last = piece_range
    tiles = -(-words[1] // _TILE_WORDS)
    total = tiles * n * (last - first)
    whole = words[0] == words[1] and words[1] % _TILE_WORDS == 0
    launcher: Any = _copy
    launcher[(min(programs, total),)](
        index,
        start,
        row,
        n,
        pieces,
        num_pieces,
        first,
        tiles,
        total,
        records,
        record_stride,
        GATHER=gather,
        WHOLE_TILES=whole,
        TILE=_TILE_WORDS,
        num_warps=_WARPS,
    )
