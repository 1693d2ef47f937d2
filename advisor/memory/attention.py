"""Which attention kernel runs, and why: the choice that `scaled_dot_product_attention` makes, without torch.

Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (torch 2.11 to 2.13) and
transformers/integrations/sdpa_attention.py (5.15 to 5.23).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from advisor.architecture import Architecture
from advisor.plan import ITEMSIZE, Plan
from advisor.profiles import Backend

Kernel = Literal["flash", "efficient", "cudnn", "math", "eager"]

_FLASH_LARGEST_HEAD = 256
_CUDNN_LARGEST_HEAD = 128
_CUDNN_FIRST = (9, 10)
"""Majors of the capabilities on which torch asks cuDNN first (check_prefer_cudnn_attention; cuDNN 9.15.1 on)."""

_LITTLE_SHARED_MEMORY = (((8, 6), (8, 9)), ((12, 0), (12, 1)))
"""Ranges of capabilities on which flash attention has no backward for heads of 193 to 224 features."""

ASSUMED_CAPABILITY = (8, 0)
"""Of a GPU whose capability nobody said, and of other vendors' GPUs, which have flash attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What the choice looks at."""

    dtype: str
    masked: bool
    grouped: bool
    """Keys and values have fewer heads, and the kernel is asked to share them."""

    head: int
    capability: tuple[int, int]


def is_padded(plan: Plan) -> bool:
    """Whether some token of the worst batch is padding: a single sequence is as long as the longest."""
    return plan.padding == "longest" and plan.micro_batch > 1


def needs_mask(plan: Plan, arch: Architecture) -> bool:
    """Whether a mask is materialised: eager attention, a padded or packed batch, sequences that reach the window.

    Source: transformers/masking_utils.py, _ignore_causal_mask_sdpa and find_packed_sequence_indices.
    """
    if plan.attention == "flash_attention_2":
        return False
    windowed = arch.window is not None and plan.seq_len >= arch.window
    return is_padded(plan) or plan.packing or windowed or plan.attention == "eager"


def mask_rows(plan: Plan, arch: Architecture) -> int:
    """Rows in the mask: one for all if nothing sets them apart, and eager attention does not spread it out.

    Source: transformers/masking_utils.py, sdpa_mask and eager_mask.
    """
    if not needs_mask(plan, arch):
        return 0
    return plan.micro_batch if is_padded(plan) or plan.packing or plan.attention == "eager" else 1


def choose_kernel(
    plan: Plan, arch: Architecture, *, capability: tuple[int, int] | None, backend: Backend
) -> tuple[Kernel, str]:
    """The attention kernel of a plan on a GPU, with the reason.

    Args:
        plan: its attention, precision and padding decide.
        arch: its head dimension, grouped heads and sliding window decide.
        capability: the GPU's compute capability; None where it is unknown or not CUDA.
        backend: the GPU's software stack.
    """
    if plan.attention == "eager":
        return "eager", "the plan asks for eager attention, which keeps all scores"
    if plan.attention == "flash_attention_2":
        return "flash", "the plan asks for flash-attn 2"
    masked = needs_mask(plan, arch)
    call = _Call(
        dtype=plan.autocast if plan.autocast != "none" else "float32" if plan.upcast_frozen else plan.dtype,
        masked=masked,
        grouped=arch.heads != arch.kv_heads and not masked and arch.head_dim <= _FLASH_LARGEST_HEAD,
        head=arch.head_dim,
        capability=capability if backend == "cuda" and capability is not None else ASSUMED_CAPABILITY,
    )
    if call.capability[0] in _CUDNN_FIRST and not _against_cudnn(call):
        return "cudnn", "torch prefers cuDNN's kernel on this GPU"
    flash = _against_flash(call)
    if not flash:
        return "flash", "16-bit inputs without a mask"
    efficient = _against_efficient(call)
    if not efficient:
        return "efficient", f"{' and '.join(flash)} rule{'s' if len(flash) == 1 else ''} flash attention out"
    return "math", f"{' and '.join(efficient)} with {' and '.join(flash)} leave only the math kernel"


def _against_flash(call: _Call) -> list[str]:
    """Source: sdp_utils.cpp, can_use_flash_attention."""
    narrow = any(low <= call.capability <= high for low, high in _LITTLE_SHARED_MEMORY) and 192 < call.head <= 224
    reasons = [
        (call.dtype == "float32", "fp32 inputs"),
        (call.masked, "a mask"),
        (call.head > _FLASH_LARGEST_HEAD or narrow, f"a head dimension of {call.head}"),
        (call.capability < (8, 0), f"compute capability {'.'.join(map(str, call.capability))}"),
    ]
    return [reason for holds, reason in reasons if holds]


def _against_efficient(call: _Call) -> list[str]:
    """Source: sdp_utils.cpp, can_use_mem_efficient_attention and minimum_gemm_alignment."""
    itemsize = ITEMSIZE[call.dtype]
    tensor_cores = call.capability >= (8, 0) or (call.capability >= (7, 0) and itemsize == 2)
    alignment = 4 if call.capability >= (8, 0) else 1
    alignment = max(alignment, 16 // itemsize) if tensor_cores else alignment
    reasons = [
        (call.grouped, "grouped-query heads"),
        (call.dtype == "bfloat16" and call.capability < (8, 0), "bfloat16 before compute capability 8.0"),
        (call.head % alignment != 0, f"a head dimension of {call.head}"),
    ]
    return [reason for holds, reason in reasons if holds]


def _against_cudnn(call: _Call) -> bool:
    """Source: sdp_utils.cpp, can_use_cudnn_attention."""
    return call.dtype == "float32" or call.head > _CUDNN_LARGEST_HEAD or call.head % 8 != 0


def attention_itemsize(plan: Plan) -> int:
    """Itemsize of the hidden states between layers: the embedding's, which kbit preparation stores in fp32."""
    return 4 if plan.upcast_frozen else ITEMSIZE[plan.dtype]
