"""How long the rows are, and how long a sequence should be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MULTIPLE = 64
"""Sequence lengths that the tool picks are multiples of this: GPU kernels work in tiles."""


@dataclass(frozen=True, slots=True, eq=False)
class LengthSummary:
    """The rows' lengths in tokens, shortest first."""

    ordered: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.ordered)

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return int(self.ordered.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.ordered[-1])

    def percentile(self, percent: float) -> int:
        """The length that `percent` of the rows do not exceed (nearest rank)."""
        rank = math.ceil(percent / 100 * self.rows)
        return int(self.ordered[max(rank, 1) - 1])

    def truncated(self, seq_len: int) -> int:
        """Rows longer than a sequence length."""
        return self.rows - int(np.searchsorted(self.ordered, seq_len, side="right"))

    def fitting_seq_len(self, context: int) -> int:
        """The 95th percentile rounded up, at most the model's context."""
        return min(round_up(self.percentile(95), MULTIPLE), context)


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def bucket_length(length: int, seq_len: int) -> int:
    """What a batch whose longest row has `length` tokens is padded to: one of at most about sixteen lengths.

    Few lengths mean that the allocator's blocks are used again. At most `seq_len`, so that no batch needs more memory
    than the plan's.
    """
    step = max(MULTIPLE, round_up(seq_len // 16, MULTIPLE))
    return min(round_up(length, step), seq_len)
