"""The order of the rows: rows of similar length in one batch, the longest batches first, the rest shuffled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Lengths = NDArray[np.int64]

_GROUPED = 50
"""Batches whose rows are sorted together. Source: transformers trainer_pt_utils.py (get_length_grouped_indices)."""

FULL_STEPS = 2
"""Optimizer steps that get the longest batches: from the second on there are optimizer states."""


class LengthSampler(Sampler[int]):
    """Indices whose consecutive runs of `batch_size` are the batches.

    The order depends on the lengths, the seed and the epoch alone, so a resumed run continues with the same batches.
    A batch that is not full comes last.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches to an optimizer step, on all GPUs together.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, accumulation: int, seed: int) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._batch_size = batch_size
        self._accumulation = accumulation
        self._seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another epoch has another order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        batches = batches_of(self._lengths, self._batch_size, self._accumulation, (self._seed, self.epoch))
        return (int(index) for batch in batches for index in batch)


def batches_of(lengths: Lengths, batch_size: int, accumulation: int, seed: tuple[int, int]) -> list[Lengths]:
    """The batches of one epoch, in order."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(lengths))
    if len(order):
        longest = int(np.argmax(lengths[order]))
        order[[0, longest]] = order[[longest, 0]]  # never in the batch that is not full
    whole = len(order) - len(order) % batch_size
    full: list[Lengths] = []
    for at in range(0, whole, batch_size * _GROUPED):
        group = order[at : min(at + batch_size * _GROUPED, whole)]
        group = group[np.argsort(-lengths[group], kind="stable")]
        full += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    by_length = sorted(range(len(full)), key=lambda i: -int(lengths[full[i][0]]))
    first, others = by_length[: FULL_STEPS * accumulation], sorted(by_length[FULL_STEPS * accumulation :])
    shuffled = [others[i] for i in random.permutation(len(others))]
    last = [order[whole:]] if whole < len(order) else []
    return [*(full[i] for i in (*first, *shuffled)), *last]
