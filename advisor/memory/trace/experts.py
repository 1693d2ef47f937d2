"""Products of a mixture's experts, as CUDA computes them, on tensors without storage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from advisor.memory.kernels import Gpu, Hardware


@contextmanager
def grouped_products(hardware: Hardware) -> Iterator[None]:
    """transformers multiplies expert by expert, in an operator of its own, below compute capability 8.0.

    Source: transformers/integrations/moe.py (_can_use_grouped_mm).
    """
    try:
        from transformers.integrations import moe

        original: Any = moe._can_use_grouped_mm
    except (ImportError, AttributeError):
        yield
        return

    def on_this_gpu(*args: Any, **kwargs: Any) -> bool:
        runs = bool(original(*args, **kwargs))
        return runs and not (isinstance(hardware, Gpu) and hardware.capability < (8, 0))

    moe._can_use_grouped_mm = on_this_gpu
    try:
        yield
    finally:
        moe._can_use_grouped_mm = original


def grouped_operation() -> Any:
    """torch's grouped product as an operator, or None where torch has none."""
    packet = getattr(torch.ops.aten, "_grouped_mm", None)
    return None if packet is None else packet.default


def grouped_product(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The result of _grouped_mm in a dtype that only its function for storage-less tensors refuses.

    CUDA multiplies group by group in fp32 and float16, as it does in bfloat16 before Hopper, and allocates the
    result alone: rows padded to 16 bytes. Tensors are (rows, columns) or (groups, rows, columns); two of the first
    kind make a product a group.
    Source: ATen/native/cuda/GroupedBlas.cpp (_grouped_mm_cuda, _grouped_mm_fallback),
    ATen/native/GroupedMMUtils.h (create_grouped_gemm_output_tensor).
    """
    left, right = args[:2]
    offsets: Any = args[2] if len(args) > 2 else kwargs.get("offs")
    groups: tuple[int, ...] = ()
    if left.dim() == right.dim():
        groups = (left.size(0) if left.dim() == 3 else offsets.numel(),)
    rows, columns = left.size(-2), right.size(-1)
    row = -(-columns * left.element_size() // 16) * 16 // left.element_size()
    strides = (*((rows * row,) if groups else ()), row, 1)
    return torch.empty_strided((*groups, rows, columns), strides, dtype=left.dtype, device=left.device)
