"""Several samples end to end in one row, and whether that pays."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from advisor.plan import most_packed_samples
from advisor.training.data.batches import batches_of
from advisor.training.data.lengths import bucket_length

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORTH_IT = 0.1
"""Share of the tokens computed without packing that has to be padding before packing pays (assumed)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingGain:
    """What packing the rows of a data set saves."""

    rows: int
    """Samples."""

    packed_rows: int
    """Rows that they are packed into."""

    tokens: int
    """Tokens of all samples."""

    seq_len: int
    unpacked_tokens: int
    """Tokens computed in an epoch without packing, padding included."""

    packed_tokens: int
    """The same with packing."""

    @property
    def fill(self) -> float:
        """Share of the packed rows that holds samples."""
        return self.tokens / (self.packed_rows * self.seq_len)

    @property
    def saved(self) -> float:
        """Share of the tokens computed without packing that packing saves."""
        return 1 - self.packed_tokens / self.unpacked_tokens

    @property
    def pays(self) -> bool:
        """Whether it is worth a block mask or variable-length kernels."""
        return self.saved >= WORTH_IT

    @property
    def reason(self) -> str:
        """Why it pays or does not, in a sentence."""
        each = self.rows / self.packed_rows
        return (
            f"Packing {'saves' if self.pays else 'would save'} {self.saved:.0%} of the tokens computed: {each:.1f} "
            f"samples to a row, {self.fill:.1%} full."
        )


def pack(lengths: Sequence[int] | NDArray[np.int64], seq_len: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to at most `seq_len`.

    Longest first, each into the fullest row that still takes it (best fit decreasing), by index where lengths are
    equal: O(n log n) and the same every time. Never more than 11/9 of the least possible number of rows, plus one,
    unless samples are so short that a row is full of as many as it may hold.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    most = most_packed_samples(seq_len)
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), seq_len
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at], with_room[room]
        rows[row].append(index)
        left = room - length
        if left > 0 and len(rows[row]) < most:
            if left not in with_room:
                insort(rooms, left)
                with_room[left] = []
            with_room[left].append(row)
    return rows


def packing_gain(lengths: Sequence[int] | NDArray[np.int64], seq_len: int, micro_batch: int) -> PackingGain:
    """What packing would save over batches of rows of similar lengths, padded to the bucket of the longest.

    Args:
        lengths: of the samples, in tokens; longer ones are cut.
        seq_len: tokens in a row.
        micro_batch: rows in a batch.
    """
    cut = np.minimum(np.asarray(lengths, dtype=np.int64), seq_len)
    batches = batches_of(cut, micro_batch, 1, (0, 0))
    unpacked = sum(len(batch) * bucket_length(int(cut[batch].max()), seq_len) for batch in batches)
    packed = [int(cut[row].sum()) for row in pack(cut, seq_len)]
    return PackingGain(
        rows=len(cut),
        packed_rows=len(packed),
        tokens=int(cut.sum()),
        seq_len=seq_len,
        unpacked_tokens=unpacked,
        packed_tokens=sum(bucket_length(tokens, seq_len) for tokens in packed),
    )
