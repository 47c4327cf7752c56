"""The header before every record on disk: enough to know, from the record alone, whether it may be served.

One page of 4096 bytes: the identity of the store, the block's key, the place it was written to, and
checksums (xxh3, 64 bits) of the data and of the header itself. A record that a crash tore, a drive damaged or
another model wrote fails one of these comparisons.
"""

import struct
from dataclasses import dataclass

from kvbm.digest import digest
from kvbm.errors import DamagedRecordError
from kvbm.storage.store import Bytes, Identity, Key

HEADER_BYTES = 4096
FORMAT = 1

_MAGIC = b"KVBMREC1"
# magic, format, namespace, rank, ranks, record bytes, slot, epoch,
# hash, group, sequence, written at, checksum
_FIELDS = struct.Struct("<8sI16sIIQQQ16sBQQQ")
_CHECK = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Header:
    """What a record says of itself."""

    key: Key
    slot: int
    epoch: int  # rises when the store is cleared, to the time of that in seconds since 1970 at least
    sequence: int  # of the write
    written_at: int  # seconds since 1970
    checksum: int


def encode_header(page: Bytes, identity: Identity, header: Header) -> None:
    """Fill a page of HEADER_BYTES."""
    page[:] = 0
    _FIELDS.pack_into(
        page.data,
        0,
        _MAGIC,
        FORMAT,
        identity.namespace,
        identity.rank,
        identity.ranks,
        identity.record_bytes,
        header.slot,
        header.epoch,
        header.key.hash,
        header.key.group,
        header.sequence,
        header.written_at,
        header.checksum,
    )
    _CHECK.pack_into(page.data, _FIELDS.size, digest(page[: _FIELDS.size]))


def decode_header(page: Bytes, identity: Identity) -> Header:
    """The header in a page; DamagedRecordError where it is not one of this store."""
    if digest(page[: _FIELDS.size]) != _CHECK.unpack_from(page.data, _FIELDS.size)[0]:
        raise DamagedRecordError("its header is damaged")
    magic, form, namespace, rank, ranks, size, slot, epoch, hash_, group, sequence, written_at, checksum = (
        _FIELDS.unpack_from(page.data)
    )
    if magic != _MAGIC or form != FORMAT:
        raise DamagedRecordError("it is of another format")
    if (namespace, rank, ranks, size) != (
        identity.namespace,
        identity.rank,
        identity.ranks,
        identity.record_bytes,
    ):
        raise DamagedRecordError("it is of another model or geometry")
    return Header(Key(hash_, group), slot, epoch, sequence, written_at, checksum)


def check_record(page: Bytes, record: Bytes, identity: Identity, key: Key, slot: int, epoch: int) -> Header:
    """The header in `page`; DamagedRecordError unless it and the bytes are this block's, in this place."""
    header = decode_header(page, identity)
    if (header.key, header.slot, header.epoch) != (key, slot, epoch):
        raise DamagedRecordError("it is another block's")
    if record_digest(record, identity) != header.checksum:
        raise DamagedRecordError("its checksum is wrong")
    return header


def record_digest(record: Bytes, identity: Identity) -> int:
    return digest(record[: identity.record_bytes])
