"""Which attention kernel scaled_dot_product_attention runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from advisor.memory.kernels.hardware import Gpu

if TYPE_CHECKING:
    import torch

AttentionBackend = Literal["flash", "efficient", "cudnn", "math"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """The arguments of scaled_dot_product_attention; tensors are (batch, heads, tokens, head size)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """An attention kernel and why the better ones were passed over."""

    name: AttentionBackend
    reason: str


def choose_attention(call: AttentionCall, gpu: Gpu) -> Choice:
    """The kernel that scaled_dot_product_attention runs, and the reason.

    Source: transformers/cuda/sdp_utils.cpp (priority_order, can_use_flash_attention,
    can_use_mem_efficient_attention, can_use_cudnn_attention) and sdp_utils_cpp.h.
    """
    tried: list[str] = []
    checks: list[tuple[AttentionBackend, str | None]] = [
        ("flash", _why_not_flash(call, gpu)),
        ("efficient", _why_not_efficient(call, gpu)),
    ]
    if gpu.prefers_cudnn:
        checks.insert(0, ("cudnn", _why_not_cudnn(call, gpu)))
    for backend, refusal in checks:
        if refusal is None:
            return Choice(backend, "; ".join(tried) or "the first choice")
        tried.append(f"no {backend}: {refusal}")
    return Choice("math", "; ".join(tried))


def _grouped_without_support(call: AttentionCall) -> bool:
    return call.query.size(1) != call.key.size(1)


def _wrong_heads(call: AttentionCall) -> bool:
    """Unequal heads that no kernel with grouped-query support may share."""
    return _grouped_without_support(call) and not call.grouped


def _why_not_flash(call: AttentionCall, gpu: Gpu) -> str | None:
    import torch

    size = call.query.size(-1)
    if not gpu.has_flash:
        return "this torch was built without it"
    if gpu.capability < (8, 0):
        return "needs compute capability 8.0"
    if call.mask is not None:
        return "takes no mask"
    if call.query.dtype not in (torch.float16, torch.bfloat16):
        return "computes in 16 bits only"
    if size > 256 or call.value.size(-1) != size or call.key.size(-1) != size:
        return "needs one head size, at most 256"
    if _no_flash_backward(call, gpu):
        return "has no backward for this head size on this capability"
    if call.causal and call.query.size(2) != call.key.size(2):
        return "needs as many keys as queries when causal"
    if _wrong_heads(call):
        return "needs as many key heads as query heads"
    return None


def _no_flash_backward(call: AttentionCall, gpu: Gpu) -> bool:
    """Heads above 192 on consumer Ampere, Ada and Blackwell."""
    size = call.query.size(-1)
    narrow = (8, 6) <= gpu.capability <= (8, 9) or (12, 0) <= gpu.capability <= (12, 1)
    return narrow and _needs_gradient(call) and size > 192 and not (call.dropout == 0 and size > 224)


def _needs_gradient(call: AttentionCall) -> bool:
    import torch

    return torch.is_grad_enabled() and any(t.requires_grad for t in (call.query, call.key, call.value))


def _why_not_efficient(call: AttentionCall, gpu: Gpu) -> str | None:
    import torch

    dtype = call.query.dtype
    if dtype not in (torch.float16, torch.float32, torch.bfloat16):
        return "does not compute in this dtype"
    if dtype == torch.bfloat16 and gpu.capability < (8, 0):
        return "bfloat16 needs compute capability 8.0"
    if _grouped_without_support(call):
        return "needs as many key heads as query heads"
    alignment = _gemm_alignment(dtype.itemsize, gpu)
    if call.query.size(-1) % alignment or call.value.size(-1) % alignment:
        return f"needs head sizes that are multiples of {alignment}"
    return None


def _gemm_alignment(itemsize: int, gpu: Gpu) -> int:
    """Elements that a tensor-core load takes. Source: sdp_utils.cpp, minimum_gemm_alignment."""
    tensor_cores = gpu.capability >= (8, 0) or (gpu.capability >= (7, 0) and itemsize == 2)
    alignment = 4 if gpu.capability >= (8, 0) else 1
    return max(alignment, 16 // itemsize) if tensor_cores else alignment


def _why_not_cudnn(call: AttentionCall, gpu: Gpu) -> str | None:
    import torch

    if gpu.capability < (8, 0):
        return "needs compute capability 8.0"
    if call.query.dtype not in (torch.float16, torch.bfloat16):
        return "computes in 16 bits only"
    sizes = (call.query.size(-1), call.value.size(-1))
    if max(sizes) > 128 or any(size % 8 for size in sizes):
        return "needs head sizes that are multiples of 8, at most 128"
    if _wrong_heads(call):
        return "needs as many key heads as query heads"
    return None
