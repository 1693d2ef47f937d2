"""An operation's call, and what its kernel allocates inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advisor.memory.kernels.hardware import Gpu, Hardware

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Inside:
    """Sizes in bytes of what a kernel allocates and frees; `first` comes before its outputs.

    After them come `brief`, gone before `then`.
    """

    first: tuple[int, ...] = ()
    brief: tuple[int, ...] = ()
    then: tuple[int, ...] = ()


NOTHING = Inside()


@dataclass(frozen=True, slots=True)
class Call:
    """An operation's arguments, and the hardware it runs on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hardware: Hardware

    @property
    def gpu(self) -> Gpu:
        """The hardware of a rule for GPUs."""
        assert isinstance(self.hardware, Gpu)
        return self.hardware


Rule = Callable[[Call], Inside]
"""What an operation's kernel allocates."""


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def bytes_of(tensor: torch.Tensor) -> int:
    """The size of a dense copy."""
    return tensor.numel() * tensor.element_size()


def copy_if_strided(tensor: torch.Tensor) -> tuple[int, ...]:
    """What `tensor.contiguous()` allocates."""
    return () if tensor.is_contiguous() else (bytes_of(tensor),)
