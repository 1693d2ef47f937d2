"""What a program hears that reads values or counts from tensors which have none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import torch

_aten = torch.ops.aten
_Answer = Callable[..., Any]
_Indices = Iterable[torch.Tensor | None]
_INDEXED = frozenset({_aten.index.Tensor, _aten.index_put_.default})


class Answers:
    """Answers of one run.

    Args:
        padded: what the question "are all of these tokens real?" is answered with, negated.
        tokens: the longest sequence, which is what code asks for when it reads an integer back.
        samples: how many begin in a packed batch; 0 where none is packed.
    """

    def __init__(self, *, padded: bool, tokens: int, samples: int) -> None:
        self._padded = padded
        self._tokens = tokens
        self._samples = samples

    def value(self, tensor: torch.Tensor, *, phase: str, operation: str) -> Any:
        """The value of a tensor, during a phase of the step and after an operation."""
        if tensor.dtype == torch.bool:
            # A number turned into a truth value asks whether positions restart, as packed sequences' do
            # (transformers/modeling_flash_attention_utils.py, _is_packed_sequence); `all` asks about the mask, or
            # whether no row holds a second sample (masking_utils.py, find_packed_sequence_indices).
            restarts = operation.startswith("aten._to_copy")
            if self._samples:
                return restarts
            return not restarts and not self._padded
        if tensor.is_floating_point():
            # A gradient scaler asks how many gradients are not finite.
            return 0.0 if phase == "optimizer step" else 1.0
        return self._tokens

    def selections(self) -> Mapping[Any, _Answer]:
        """Operations whose result is as large as values say, each in others that need none.

        As large as it can be; what nonzero finds in a packed batch is where samples begin.
        """
        return {
            _aten.nonzero.default: self._nonzero,
            _aten.masked_select.default: _masked_select,
            _aten.index.Tensor: _index,
            _aten.index_put_.default: _index_put,
        }

    def _nonzero(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty((self._samples or tensor.numel(), tensor.dim()), dtype=torch.int64)


def _masked_select(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tensor.new_empty(torch.broadcast_shapes(tensor.shape, mask.shape).numel())


def _index(tensor: torch.Tensor, indices: _Indices) -> Any:
    return _aten.index.Tensor(tensor, _places(indices))


def _index_put(tensor: torch.Tensor, indices: _Indices, values: torch.Tensor, accumulate: bool = False) -> Any:
    return _aten.index_put_.default(tensor, _places(indices), values, accumulate)


def _places(indices: _Indices) -> list[torch.Tensor | None]:
    """A mask becomes the places that nonzero finds. Source: ATen/native/IndexingUtils.h (expandTensors)."""
    places: list[torch.Tensor | None] = []
    for index in indices:
        places += index.nonzero().unbind(1) if is_mask(index) else [index]
    return places


def is_mask(index: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether an index says which places are taken, and not where they are."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def depends_on_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation of `Answers.selections` is asked about values that are not there.

    One value fills what a mask takes, without its places. Source: TensorAdvancedIndexing.cpp (index_put_).
    """
    if args[0].device.type != "meta":
        return False
    if func is _aten.index_put_.default and args[2].numel() == 1 and not any(args[3:]):
        return False
    return func not in _INDEXED or any(map(is_mask, args[1]))
