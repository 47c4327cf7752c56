"""Descriptors of a layout's pieces, built in numpy: what to copy where, for any blocks and records."""

import numpy as np
from numpy.typing import NDArray

from kvbm.transfer.layout import KvLayout

Addresses = NDArray[np.int64]


class PieceTable:
    """All pieces of a block in the order of the record.

    address, block_stride, size, offset: int64 arrays of shape (pieces,), in bytes. Piece p of block b lies
    at address[p] + b * block_stride[p], and at offset[p] of the record.
    """

    def __init__(self, layout: KvLayout) -> None:
        runs = layout.runs
        counts = [run.pieces for run in runs]
        position = np.concatenate([np.arange(count) for count in counts])

        def each(name: str) -> Addresses:
            return np.repeat(np.array([getattr(run, name) for run in runs], np.int64), counts)

        self.size = each("piece_bytes")
        self.address = each("address") + position * each("piece_stride")
        self.block_stride = each("block_stride")
        self.offset = each("record_offset") + position * self.size

    def __len__(self) -> int:
        return len(self.size)

    @property
    def copies(self) -> int:
        """How many a block takes: 1 where it is one stretch of memory on the device too."""
        return len(self.joined(0, len(self))[0])

    def aligned(self, alignment: int) -> bool:
        """Whether every piece starts and ends at a multiple of `alignment`, on the device and in records."""
        return not any(
            (array % alignment).any() for array in (self.address, self.block_stride, self.size, self.offset)
        )

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Where pieces first .. last-1 lie in a record: offset and bytes."""
        start = int(self.offset[first])
        return start, int(self.offset[last - 1] + self.size[last - 1]) - start

    def joined(self, first: int, last: int) -> tuple[Addresses, Addresses, Addresses, Addresses]:
        """Pieces first .. last-1 as (address, block_stride, size, offset), neighbours made one."""
        address, stride, size, offset = (
            array[first:last] for array in (self.address, self.block_stride, self.size, self.offset)
        )
        apart = (address[1:] != address[:-1] + size[:-1]) | (stride[1:] != stride[:-1])
        starts = np.concatenate(([0], np.flatnonzero(apart) + 1))
        return address[starts], stride[starts], np.add.reduceat(size, starts), offset[starts]


def block_copies(
    table: PieceTable,
    piece_range: tuple[int, int],
    blocks: NDArray[np.integer],
    slots: NDArray[np.integer],
    *,
    records: int,
    slot_bytes: int,
    chunk_slots: int,
) -> tuple[Addresses, Addresses, Addresses]:
    """The fewest copies, as (device address, record address, bytes), shape (n,) each.

    records: address of the first record. Slots in different chunks of `chunk_slots` are not joined.
    """
    address, stride, size, offset = table.joined(*piece_range)
    slots = slots.astype(np.int64)
    device = (address[:, None] + blocks.astype(np.int64) * stride[:, None]).ravel()
    host = (records + offset[:, None] + slots * slot_bytes).ravel()
    if len(size) > 1:
        return device, host, np.repeat(size, len(slots))
    return _join(device, host, int(size[0]), slots, chunk_slots)


def record_copies(
    slots: NDArray[np.integer],
    rows: int,
    *,
    records: int,
    size: int,
    row_bytes: int,
    slot_bytes: int,
    chunk_slots: int,
) -> tuple[Addresses, Addresses, Addresses, NDArray[np.int64]]:
    """The fewest copies between records in slots, or a part of each, and dense rows, `rows` at a time.

    records: address of the part in the first slot, of `size` bytes. row_bytes: from one row to the next;
    neighbours are made one where that is slot_bytes.
    Returns (offset in the rows, record address, bytes), shape (n,) each; and where each time's begin among
    them, the end included: shape (times + 1,).
    """
    slots = slots.astype(np.int64)
    row = np.arange(len(slots), dtype=np.int64) % rows
    together = (slots[1:] == slots[:-1] + 1) & (slots[1:] % chunk_slots != 0) & (row[1:] != 0)
    if row_bytes != slot_bytes:
        together[:] = False
    starts = np.concatenate(([0], np.flatnonzero(~together) + 1))
    lengths = np.diff(starts, append=len(slots))
    return (
        row[starts] * row_bytes,
        records + slots[starts] * slot_bytes,
        lengths * row_bytes - (row_bytes - size),  # without the padding of the last
        np.searchsorted(starts, np.arange(0, len(slots) + rows, rows)),
    )


def _join(
    device: Addresses, host: Addresses, size: int, slots: Addresses, chunk_slots: int
) -> tuple[Addresses, Addresses, Addresses]:
    if not len(slots):
        return device, host, host
    together = (device[1:] == device[:-1] + size) & (host[1:] == host[:-1] + size)
    starts = np.concatenate(([0], np.flatnonzero(~(together & (slots[1:] % chunk_slots != 0))) + 1))
    ends = np.append(starts[1:], len(slots))
    return device[starts], host[starts], (ends - starts) * size
