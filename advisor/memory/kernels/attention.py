"""What attention kernels allocate inside, in backward.

Sources are files of pytorch/pytorch (aten/src/ATen/native/transformers/cuda/...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advisor.memory.kernels.call import Call, Inside, copy_if_strided, round_up
from advisor.memory.kernels.hardware import Gpu

if TYPE_CHECKING:
    import torch


def flash_backward(call: Call) -> Inside:
    """Arguments as (batch, heads, tokens, head size).

    bytes = softmax_d 4·B·H·⌈S⌉₁₂₈ + dq_accum 4·B·⌈S⌉₁₂₈·H·⌈D⌉ + dk, dv for every query head if grouped
    + contiguous copies of the gradient and the output.
    Source: flash_attn/flash_api.cpp (mha_bwd), attention_backward.cu (_flash_attention_backward).
    """
    gradient, query, key, _, output = (tensor.transpose(1, 2) for tensor in call.args[:5])
    return _flash_backward_inside(gradient, query, key, output)


def flash_backward_of_package(call: Call) -> Inside:
    """As `flash_backward`, arguments as (batch, tokens, heads, head size)."""
    gradient, query, key, _, output = call.args[:5]
    if query.dim() == 3:
        return _flash_packed_backward(call.args)
    return _flash_backward_inside(gradient, query, key, output)


def _flash_packed_backward(args: tuple[Any, ...]) -> Inside:
    """Sequences one after the other, as (tokens, heads, head size): 128 rows more for each.

    Source: flash_attn/flash_api.cpp (mha_varlen_bwd).
    """
    gradient, query, key, _, output, _, lengths = args[:7]
    tokens, heads, size = query.shape
    rows = tokens + 128 * (lengths.numel() - 1)
    head = round_up(size, 32 if size <= 128 else 64)
    expanded = 2 * (key.size(0) * heads * size * query.element_size(),)
    return Inside(
        first=(*copy_if_strided(gradient), *copy_if_strided(output)),
        then=(4 * heads * rows, 4 * rows * heads * head, *(expanded if key.size(1) != heads else ())),
    )


def _flash_backward_inside(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, output: torch.Tensor
) -> Inside:
    batch, tokens, heads, size = query.shape
    rounded = round_up(tokens, 128)
    head = round_up(size, 32 if size <= 128 else 64)
    expanded = 2 * (batch * key.size(1) * heads * size * query.element_size(),)
    return Inside(
        first=(*copy_if_strided(gradient), *copy_if_strided(output)),
        then=(
            4 * batch * heads * rounded,
            4 * batch * rounded * heads * head,
            *(expanded if key.size(2) != heads else ()),
        ),
    )


def efficient_backward(call: Call) -> Inside:
    """The row sums of gradient × output, and fp32 accumulators for what registers cannot hold.

    bytes = delta 4·B·H·S + `_efficient_workspace`. Before the workspace, where another kernel computes delta: the
    product 4·B·S·H·D, its sum, and in 16 bits both factors in fp32.
    Source: attention_backward.cu (_efficient_attention_backward).
    """
    gradient, query, key, value = (tensor.transpose(1, 2) for tensor in call.args[:4])
    batch, tokens, heads, size = query.shape
    is_half = query.element_size() == 2
    delta = 4 * batch * heads * tokens
    block = _efficient_block(is_half, max(size, value.size(3)), float(call.args[9]) > 0, call.gpu)
    product = 4 * batch * tokens * heads * value.size(3)
    copies = 2 * (product,) if is_half else ()
    outside = (*copies, product, delta, delta) if _delta_comes_first(is_half, block, call.gpu) else ()
    workspace = _efficient_workspace(
        batch * heads, tokens, key.size(1), (size, value.size(3)), block, accumulates=_accumulates(is_half, block)
    )
    return Inside(first=copy_if_strided(gradient), brief=outside, then=(delta, workspace))


@dataclass(frozen=True, slots=True)
class _Block:
    """The tile of a memory-efficient backward kernel, and the head size it is compiled for."""

    queries: int
    keys: int
    largest_head: int


_SMALL_SHARED_MEMORY = ((7, 5), (8, 6), (8, 9), (12, 0), (12, 1))
"""Capabilities whose shared memory does not hold the tiles of 128 queries."""


def _efficient_block(is_half: bool, head_size: int, dropout: bool, gpu: Gpu) -> _Block:
    """The first compiled kernel that takes this head size and fits into shared memory.

    Source: mem_eff_attention/kernels/generate_kernels.py (BwdKernel.get_all, its sort order).
    """
    largest = next(limit for limit in (32, 64, 128, 2**16) if head_size <= limit)
    if is_half and not dropout and 64 < head_size <= 96 and gpu.capability in ((8, 6), (8, 9)):
        return _Block(128, 64, 96)
    wide = gpu.capability >= (8, 0) or (gpu.capability >= (7, 0) and is_half)
    if not (wide and largest > 64 and is_half) or gpu.capability in _SMALL_SHARED_MEMORY:
        return _Block(64, 64, largest)
    in_registers = largest <= 128 and gpu.capability >= (8, 0)
    return _Block(128, 128 if in_registers else 64, largest)


def _accumulates(is_half: bool, block: _Block) -> bool:
    """Whether dk and dv in fp32 lie outside registers. Source: kernel_backward.h (kOutputInRF, kNeedsAccumGradK)."""
    return is_half and block.largest_head > block.queries


def _delta_comes_first(is_half: bool, block: _Block, gpu: Gpu) -> bool:
    """Whether delta is no part of the kernel. Source: kernel_backward.h (kKernelComputesDelta)."""
    return not is_half or (_accumulates(is_half, block) and gpu.capability < (7, 5))


def _efficient_workspace(
    sequences: int, queries: int, keys: int, head_sizes: tuple[int, int], block: _Block, *, accumulates: bool
) -> int:
    """bytes = 4·B·H·(a tile of dk and dv for every split of the keys + dq tiles with a 16-byte lock each).

    There are at most 200 splits for all sequences and heads together.
    Source: mem_eff_attention/kernel_backward.h (workspace_elements_gk, _gv, _gq), attention_backward.cu
    (num_splits_key).
    """
    size, value_size = head_sizes
    elements = 0
    if accumulates:
        splits = max(1, min(-(-keys // block.keys), 200 // sequences))
        if sequences >= 256 and keys <= 2 * block.keys:
            splits = 1
        elements += splits * block.keys * (round_up(size, block.queries) + round_up(value_size, block.queries))
    tiles = -(-queries // block.queries) * -(-size // block.keys)
    elements += tiles * (block.queries * block.keys + 4)
    return 4 * sequences * round_up(elements, 4)
