"""Attention as CUDA and as the CPU run it, on tensors without storage."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from advisor.memory.kernels import AttentionCall


class MathAttention:
    """Whether torch's math attention is running: its only sum is that of scores and mask."""

    running = False


def run_attention(call: AttentionCall, backend: str) -> torch.Tensor:
    """Call the kernel that was chosen, with the conversions that SDPA makes around it.

    Source: ATen/native/transformers/attention.cpp (scaled_dot_product_attention).
    """
    aten = torch.ops.aten
    if backend == "flash":
        return _flash(call)
    mask = _additive_mask(call)
    if backend == "efficient":
        if mask is not None:
            mask = _aligned_mask(mask, call)
        keep = any(t.requires_grad for t in (call.query, call.key, call.value))
        result: torch.Tensor = aten._scaled_dot_product_efficient_attention(
            call.query, call.key, call.value, mask, keep, call.dropout, call.causal, scale=call.scale
        )[0]
        return result
    if backend == "cudnn":
        keep = any(t.requires_grad for t in (call.query, call.key, call.value))
        result = aten._scaled_dot_product_cudnn_attention(
            call.query, call.key, call.value, mask, keep, call.dropout, call.causal, False, scale=call.scale
        )[0]
        return result
    MathAttention.running = True
    try:
        result = aten._scaled_dot_product_attention_math(
            call.query,
            call.key,
            call.value,
            mask,
            call.dropout,
            call.causal,
            None,
            scale=call.scale,
            enable_gqa=call.grouped,
        )[0]
    finally:
        MathAttention.running = False
    return result


def attention_on_cpu(call: AttentionCall) -> torch.Tensor:
    """torch's own choice for CPU tensors like these. Source: ATen/native/transformers/attention.cpp."""
    with _disable_current_modes():
        twins = [
            torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, requires_grad=t.requires_grad)
            if t is not None
            else None
            for t in (call.query, call.key, call.value, call.mask)
        ]
        choose: Any = torch._fused_sdp_choice
        choice = choose(
            *twins, dropout_p=call.dropout, is_causal=call.causal, scale=call.scale, enable_gqa=call.grouped
        )
    if choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value:
        output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            call.query,
            call.key,
            call.value,
            call.dropout,
            call.causal,
            attn_mask=_additive_mask(call),
            scale=call.scale,
        )[0]
        return output
    return run_attention(call, "math")


def _flash(call: AttentionCall) -> torch.Tensor:
    """flash: head dimensions are padded to a multiple of 8 and the output is cut back."""
    size = call.query.size(-1)
    scale = call.scale if call.scale is not None else size**-0.5
    padded = [_padded(tensor) for tensor in (call.query, call.key, call.value)]
    output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
        *padded, call.dropout, call.causal, False, scale=scale
    )[0]
    return output if size == output.size(-1) else output[..., :size]


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    missing = -tensor.size(-1) % 8
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _additive_mask(call: AttentionCall) -> torch.Tensor | None:
    """A boolean mask becomes one of the query's dtype, of the mask's own shape."""
    if call.mask is None or call.mask.dtype != torch.bool:
        return call.mask
    zero = torch.zeros((), dtype=call.query.dtype, device=call.query.device)
    return torch.where(call.mask.logical_not(), float("-inf"), zero)


def _aligned_mask(mask: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """The memory-efficient kernel wants strides that are multiples of 8, else a padded copy."""
    if mask.stride(-1) != 1 or any(mask.stride(dim) % 8 for dim in range(mask.dim() - 1)):
        columns = mask.size(-1)
        mask = torch.nn.functional.pad(mask, (0, 8 - columns % 8))[..., :columns]
    return mask.expand(call.query.size(0), call.query.size(1), call.query.size(2), call.key.size(2))
