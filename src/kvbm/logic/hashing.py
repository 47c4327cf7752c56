"""Sequence hashes: 16 bytes that name a block by everything that determines its bytes.

    root      = H(namespace, block size, cache salt, adapter)
    block[0]  = H(root,       tokens of block 0, extra keys of block 0)
    block[i]  = H(block[i-1], tokens of block i, extra keys of block i)

H is BLAKE2b (RFC 7693) with a 16-byte digest: an attacker who chooses prompts needs about 2**64 work for
two sequences that collide, and nothing depends on PYTHONHASHSEED, the process or the machine.
Hashes travel in arrays of shape (n, 2), dtype uint64: the 16 bytes as two little-endian words.
"""

import json
from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b, sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbm.logic.arrays import GrowingArray

HASH_BYTES = 16

Hashes = NDArray[np.uint64]

_TOKEN = np.dtype("<u4")
_WORD = np.dtype("<u8")
_PAGE_NAMESPACE = b"sglang-cache-namespace-v1"
# Copying a prepared state costs 0.45 µs a block where constructing one costs 1.3 µs.
_BLOCK_STATE = blake2b(digest_size=HASH_BYTES, person=b"kvbm block")


def namespace_digest(fields: Mapping[str, object]) -> bytes:
    """Digest of what all blocks of a cache have in common: model, dtypes, geometry, layout.

    `fields` holds JSON-serialisable values; their order does not matter.
    """
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return blake2b(canonical.encode(), digest_size=HASH_BYTES, person=b"kvbm namespace").digest()


def epoch_namespace(namespace: bytes, weights: str) -> bytes:
    """Namespace of the same cache with other weights, which have this name."""
    return namespace_digest({"namespace": namespace.hex(), "weights": weights})


def root_hash(
    namespace: bytes, block_size: int, *, salt: str | None = None, adapter: str | None = None
) -> bytes:
    """Start of the chain of one sequence; sequences share blocks only when their roots are equal."""
    state = blake2b(digest_size=HASH_BYTES, person=b"kvbm root")
    # Every field is prefixed with its length, so no two different sets of fields encode alike.
    for part in (namespace, block_size.to_bytes(4, "little"), _optional(salt), _optional(adapter)):
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def _optional(text: str | None) -> bytes:
    return b"\0" if text is None else b"\1" + text.encode("utf-8", "surrogatepass")


def salt_tag(salt: str | None) -> int:
    """A number of 32 bits by which the blocks of a salt can be found; 0 without."""
    if salt is None:
        return 0
    return int.from_bytes(blake2b(_optional(salt), digest_size=4).digest(), "little") % 0xFFFFFFFE + 1


class SequenceHasher:
    """The hash chain of one sequence, extended as the sequence grows. Not thread-safe.

    state: of the hash function, prepared, of whose digests the first 16 bytes become names.
    """

    def __init__(self, root: bytes, block_size: int, state: Any = _BLOCK_STATE) -> None:
        self.block_size = block_size
        self._last = root
        self._state = state
        self._hashes = GrowingArray(_WORD, width=2)

    def __len__(self) -> int:
        """Number of blocks hashed."""
        return len(self._hashes)

    @property
    def num_tokens(self) -> int:
        """Number of tokens hashed: always whole blocks. The next `extend` starts here."""
        return len(self._hashes) * self.block_size

    @property
    def hashes(self) -> Hashes:
        """View of all hashes so far, shape (len(self), 2)."""
        return self._hashes.rows

    def extend(
        self, tokens: Sequence[int] | NDArray[np.integer], extra_keys: Mapping[int, bytes] | None = None
    ) -> None:
        """Hash the whole blocks among `tokens`, which follow token number `num_tokens`.

        Tokens after the last whole block are ignored: give them again when the block is full.
        `extra_keys` maps a block's index in the sequence to bytes that, beside the tokens, determine its
        contents (the identity of an image, for example).
        """
        data = _token_bytes(tokens)
        stride = self.block_size * _TOKEN.itemsize
        added = len(data) // stride
        # As a list at once: half the time of slicing in the loop.
        blocks: list[bytes] = np.frombuffer(data, np.dtype((np.void, stride)), added).tolist()
        if extra_keys:
            first = len(self._hashes)
            blocks = [tokens + extra_keys.get(first + i, b"") for i, tokens in enumerate(blocks)]
        copy_state = self._state.copy
        last = self._last
        chain = bytearray()
        for block in blocks:
            state = copy_state()
            state.update(last + block)
            last = state.digest()
            chain += last[:HASH_BYTES]
        self._last = last
        self._hashes.append(np.frombuffer(chain, _WORD).reshape(-1, 2))


def page_hasher(block_size: int, *, salt: str | None = None) -> SequenceHasher:
    """Names of the blocks of plain text as SGLang gives them to its pages, the first half of each.

    They say nothing of the model: whoever exchanges blocks by them keeps them apart by a namespace.
    """
    root = b""
    if salt is not None:
        text = salt.encode("utf-8", "surrogatepass")
        root = sha256(_PAGE_NAMESPACE + b"\0\1" + len(text).to_bytes(8, "little") + text).digest()
    return SequenceHasher(root, block_size, sha256())


def _token_bytes(tokens: Sequence[int] | NDArray[np.integer]) -> bytes:
    if isinstance(tokens, np.ndarray):
        return tokens.astype(_TOKEN).tobytes()
    # array() converts a list of ints twice as fast as numpy does.
    packed = array("I", tokens)
    return packed.tobytes() if packed.itemsize == _TOKEN.itemsize else np.asarray(packed, _TOKEN).tobytes()
