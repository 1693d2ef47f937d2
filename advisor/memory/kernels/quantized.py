"""What bitsandbytes' products with 4-bit weights allocate inside. Sources are files of bitsandbytes 0.50."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cache
from typing import Any

from advisor.memory.kernels.call import Call, Inside, copy_if_strided
from advisor.memory.kernels.hardware import Gpu


def gemm_4bit(call: Call) -> Inside:
    """Many tokens: the whole weight in 16 bits, and two fp32 copies of the scales if they are nested.

    bytes = N·K·itemsize + 2·4·⌈N·K/64⌉. Few tokens: a fused kernel that dequantises in registers.
    Source: bitsandbytes backends/cuda/ops.py (gemm_4bit, _dequant_linear_fallback).
    """
    inputs, _, shape, _, blocksize = call.args[:5]
    tokens = inputs.numel() // inputs.size(-1)
    if uses_fused_4bit(tokens, shape[0], shape[1], blocksize, inputs.dtype, call.gpu):
        return Inside(first=copy_if_strided(inputs))
    nested = call.kwargs.get("absmax_8bit")
    scales = () if nested is None else 2 * (4 * nested.numel(),)
    return Inside(first=(*scales, shape[0] * shape[1] * inputs.element_size()))


def uses_fused_4bit(tokens: int, rows: int, columns: int, blocksize: int, dtype: Any, gpu: Gpu) -> bool:
    """bitsandbytes' own choice, asked with this GPU's properties.

    Versions without it multiply from 4 bits for a single token only, and never where a gradient is needed.
    """
    if tokens > _FUSED_4BIT_LIMIT or columns % blocksize:
        return False
    choose = _bitsandbytes_choice((gpu.multiprocessors, *gpu.capability))
    return choose is not None and bool(choose(0, dtype, tokens, rows, columns))


_FUSED_4BIT_LIMIT = 1536
"""bitsandbytes dequantises above this many tokens on every GPU. Source: _gemm_4bit_custom_max_m."""


@cache
def _bitsandbytes_choice(properties: tuple[int, int, int]) -> Callable[..., bool] | None:
    """The installed `_gemm_4bit_use_custom_cuda`; its module imports only where torch has CUDA."""
    import ast
    from importlib.util import find_spec
    from pathlib import Path

    import torch

    package = find_spec("bitsandbytes")
    if package is None or package.origin is None:
        return None
    source = Path(package.origin).parent / "backends" / "cuda" / "ops.py"
    if not source.exists():
        return None
    wanted = [node for node in ast.parse(source.read_text()).body if _defines_4bit_choice(node)]
    if len(wanted) < 2:
        return None
    scope: dict[str, Any] = {
        "torch": torch,
        "functools": functools,
        "_gpu_dispatch_props": lambda _: properties,
    }
    exec(compile(ast.Module(wanted, []), str(source), "exec"), scope)
    choice: Callable[..., bool] = scope["_gemm_4bit_use_custom_cuda"]
    return choice


def _defines_4bit_choice(node: Any) -> bool:
    """The function, and the constant it compares with."""
    if getattr(node, "name", None) == "_gemm_4bit_use_custom_cuda":
        return True
    targets = getattr(node, "targets", ())
    return any(getattr(target, "id", None) == "_GEMM_4BIT_CUSTOM_FLOOR_M" for target in targets)


def gemm_4bit_on_cpu(call: Call) -> Inside:
    """The whole weight in the input's dtype and one fp32 copy of nested scales.

    Source: bitsandbytes backends/default/ops.py (_gemm_4bit_default_impl).
    """
    inputs, _, shape = call.args[:3]
    nested = call.kwargs.get("absmax_8bit")
    scales = () if nested is None else (4 * nested.numel(),)
    return Inside(first=(*scales, shape[0] * shape[1] * inputs.element_size()))
