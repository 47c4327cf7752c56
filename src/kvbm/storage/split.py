"""How the KV heads of a block are shared out over tensor-parallel ranks, and a rank's record made of others'.

A rank's record is a number of parts; of each the rows are alike and hold the rank's heads side by side. So
the records of two numbers of ranks differ in how many heads lie side by side, and in nothing else.
"""

from collections.abc import Sequence

import msgspec

from kvbm.storage.store import Bytes


class Part(msgspec.Struct, frozen=True):
    """Rows of a record, one after the other; head_bytes: of one head in one row."""

    rows: int
    head_bytes: int


class Share(msgspec.Struct, frozen=True):
    """Heads that a rank takes from the record of a rank of another number of ranks."""

    rank: int  # of theirs
    theirs: int  # first of these heads in their record
    ours: int  # and in ours
    heads: int


class Split(msgspec.Struct, frozen=True):
    """heads: KV heads of the model. Where ranks outnumber them, several ranks in a row have the same."""

    heads: int
    parts: tuple[Part, ...]

    def allows(self, ranks: int) -> bool:
        """Whether the heads can be shared out evenly over so many ranks."""
        return ranks > 0 and (self.heads % ranks == 0 or ranks % self.heads == 0)

    def heads_each(self, ranks: int) -> int:
        return max(1, self.heads // ranks)

    def record_bytes(self, ranks: int) -> int:
        return self.heads_each(ranks) * sum(part.rows * part.head_bytes for part in self.parts)

    def holders(self, ranks: int) -> list[int]:
        """Ranks that together have every head once."""
        return sorted({head * ranks // self.heads for head in range(self.heads)})

    def shares(self, rank: int, ranks: int, theirs: int) -> list[Share]:
        """What rank `rank` of `ranks` takes from which rank of `theirs`, each of them a holder."""
        own, other = self.heads_each(ranks), self.heads_each(theirs)
        first = rank * self.heads // ranks
        shares = []
        at = first
        while at < first + own:
            source = at * theirs // self.heads
            begin = source * self.heads // theirs
            end = min(first + own, begin + other)
            shares.append(Share(source, at - begin, at - first, end - at))
            at = end
        return shares

    def recut(
        self, shares: Sequence[Share], records: Sequence[Bytes], theirs: int, out: Bytes, ours: int
    ) -> None:
        """Fill `out`, a record of one of `ours` ranks, from records of `theirs` ranks, one for each share."""
        own, other = self.heads_each(ours), self.heads_each(theirs)
        own_at = other_at = 0
        for part in self.parts:
            size = part.head_bytes
            row = own * size
            target = out[own_at : own_at + part.rows * row].reshape(part.rows, row)
            own_at += part.rows * row
            row = other * size
            stretch = slice(other_at, other_at + part.rows * row)
            other_at += part.rows * row
            for share, record in zip(shares, records, strict=True):
                source = record[stretch].reshape(part.rows, row)
                target[:, share.ours * size : (share.ours + share.heads) * size] = source[
                    :, share.theirs * size : (share.theirs + share.heads) * size
                ]
