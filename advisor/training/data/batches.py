"""Which rows make a batch, and which batch comes when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Lengths = NDArray[np.int64]

_GROUPED = 50
"""Batches whose rows are sorted together. Source: transformers trainer_pt_utils.py (get_length_grouped_indices)."""

FULL_STEPS = 2
"""Optimizer steps that get the longest batches: from the second on there are optimizer states."""


def batches_of(lengths: Lengths, batch_size: int, accumulation: int, seed: tuple[int, int]) -> list[Lengths]:
    """The batches of one epoch, in order: rows of similar length together, the longest batches first.

    The others are shuffled. A batch that is not full comes last.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches to an optimizer step.
        seed: the run's seed and the epoch.
    """
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
