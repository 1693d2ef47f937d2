"""What bitsandbytes' operations allocate inside. Sources are files of bitsandbytes 0.50."""

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
    if uses_fused_4bit(tokens, shape[0], shape[1], blocksize, str(inputs.dtype)[6:], call.gpu):
        return Inside(first=copy_if_strided(inputs))
    scales = 2 * _nested_scales(call)
    return Inside(first=(*scales, shape[0] * shape[1] * inputs.element_size()))


_ABSMAX_8BIT = 7
"""The position of the nested scales: torch hands an operator's named arguments on by position."""


def _nested_scales(call: Call) -> tuple[int, ...]:
    """The scales in fp32, where they are themselves quantised."""
    nested = call.args[_ABSMAX_8BIT] if len(call.args) > _ABSMAX_8BIT else None
    return () if nested is None else (4 * nested.numel(),)


def uses_fused_4bit(tokens: int, rows: int, columns: int, blocksize: int, dtype: str, gpu: Gpu) -> bool:
    """bitsandbytes' own choice, asked with this GPU's properties; False where it is not installed.

    Versions without it multiply from 4 bits for a single token only, and never where a gradient is needed.
    Needs no torch.
    """
    if tokens > FUSED_4BIT_LIMIT or columns % blocksize:
        return False
    choose = _bitsandbytes_choice((gpu.multiprocessors, *gpu.capability))
    return choose is not None and bool(choose(0, dtype, tokens, rows, columns))


FUSED_4BIT_LIMIT = 1536
"""bitsandbytes dequantises above this many tokens on every GPU. Source: _gemm_4bit_custom_max_m."""


class _DtypeNames:
    """Stands for torch where only its dtypes are compared with."""

    def __getattr__(self, name: str) -> str:
        return name


@cache
def _bitsandbytes_choice(properties: tuple[int, int, int]) -> Callable[..., bool] | None:
    """The installed `_gemm_4bit_use_custom_cuda`; its module imports only where torch has CUDA."""
    import ast
    from importlib.util import find_spec
    from pathlib import Path

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
        "torch": _DtypeNames(),
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
    return Inside(first=(*_nested_scales(call), shape[0] * shape[1] * inputs.element_size()))


def quantize_4bit_on_cpu(call: Call) -> Inside:
    """The weight in fp32 where it has 16 bits, scaled to its blocks, and the places of its codes.

    bytes = 4·N for each of the two, and for the places 4·N + N + N/2 (32 bits, 8 bits, every other one shifted); for
    fp4, whose codes are in another order, 4·N + 2·8·N, less the result, which comes after them.
    Source: bitsandbytes backends/default/ops.py (quantize_4bit).
    """
    weight, _, kind = call.args[:3]
    elements = weight.numel()
    copy = (4 * elements,) if weight.element_size() < 4 else ()
    places = (elements, elements // 2) if kind == "nf4" else (8 * elements, 8 * elements - elements // 2)
    return Inside(first=(*copy, 4 * elements, 4 * elements, *places))


def adam_8bit_on_cpu(call: Call) -> Inside:
    """Both states, the gradient, a root and a quotient in fp32, and the parameter where it has 16 bits.

    bytes = 4·5·N, or 4·6·N. Source: bitsandbytes backends/cpu/ops.py (_optimizer_update_8bit_blockwise_cpu).
    """
    return Inside(first=(4 * call.args[2].numel(),) * (5 + _is_narrow(call)))


def adam_32bit_on_cpu(call: Call) -> Inside:
    """The gradient, a root and a quotient in fp32, and the parameter where it has 16 bits.

    bytes = 4·3·N, or 4·4·N. Source: bitsandbytes backends/cpu/ops.py (_optimizer_update_32bit_cpu).
    """
    return Inside(first=(4 * call.args[2].numel(),) * (3 + _is_narrow(call)))


def _is_narrow(call: Call) -> bool:
    parameter = call.args[2]
    return bool(parameter.element_size() < 4)
