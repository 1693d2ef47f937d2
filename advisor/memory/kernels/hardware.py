"""What kernels look at before they choose a path."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advisor import hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What kernels look at before they choose a path."""

    capability: tuple[int, int] = (8, 0)
    """Compute capability."""

    multiprocessors: int = 108
    """Streaming multiprocessors; bitsandbytes and flash attention split work by their number."""

    total_bytes: int | None = None
    """What a process may have; None replays without a limit."""

    has_flash: bool = True
    """torch's Windows builds have no flash attention."""

    prefers_cudnn: bool = False
    """cuDNN attention first, as torch built with a recent cuDNN does on Hopper."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """torch's CPU kernels, on which a trace can be held against real execution."""


Hardware = Gpu | Cpu

ASSUMED_CAPABILITY = (8, 0)
"""Of a GPU about which nobody said more than its memory."""

ASSUMED_MULTIPROCESSORS = 108
"""An A100's, where no profile counts them. They decide only how bitsandbytes multiplies few tokens."""

_CUDNN_FIRST = (9, 10)
"""Majors of the capabilities on which torch asks cuDNN first, given cuDNN 9.15.1 or newer (torch 2.10 on).

Source: transformers/cuda/sdp_utils.cpp (check_prefer_cudnn_attention).
"""


def hardware_of(gpu: hardware.Gpu) -> Gpu:
    """What kernels look at, of a GPU as the rest of the project knows it.

    A capability or a number of multiprocessors that nobody said is an A100's. Flash attention is this
    machine's matter, not the card's: torch's Windows builds leave it out.
    """
    count = gpu.profile.multiprocessors if gpu.profile is not None else None
    return Gpu(
        capability=gpu.capability or ASSUMED_CAPABILITY,
        multiprocessors=count or ASSUMED_MULTIPROCESSORS,
        total_bytes=gpu.total_bytes,
        has_flash=sys.platform != "win32",
        prefers_cudnn=(gpu.capability or ASSUMED_CAPABILITY)[0] in _CUDNN_FIRST,
    )
