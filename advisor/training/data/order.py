"""The order of the rows, as a DataLoader takes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from advisor.training.data.batches import batches_of


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
