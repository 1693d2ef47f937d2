"""Which attention kernel runs, and why: the choice that `scaled_dot_product_attention` makes, without torch.

Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (torch 2.11 to 2.13) and
transformers/integrations/sdpa_attention.py (5.15 to 5.23).
"""

from __future__ import annotations

from typing import Literal

from advisor.architecture import Architecture
from advisor.plan import ITEMSIZE, Plan
from advisor.profiles import Backend

Kernel = Literal["flash", "efficient", "math", "eager"]

_FLASH_LARGEST_HEAD = 256


def needs_mask(plan: Plan, arch: Architecture) -> bool:
    """Whether a mask is materialised: a padded batch, or sequences that reach the sliding window."""
    padded = plan.padding == "longest" and plan.micro_batch > 1
    windowed = arch.window is not None and plan.seq_len >= arch.window
    return padded or windowed or plan.attention == "eager"


def mask_rows(plan: Plan, arch: Architecture) -> int:
    """Sequences in the mask: one for each if they are padded differently, one for all, or none.

    Source: transformers/masking_utils.py, sdpa_mask, eager_mask and flash_attention_mask.
    """
    if plan.attention == "flash_attention_2" or not needs_mask(plan, arch):
        return 0
    return plan.micro_batch if plan.padding == "longest" or plan.attention == "eager" else 1


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
    itemsize = ITEMSIZE[plan.autocast] if plan.autocast != "none" else attention_itemsize(plan)
    masked = needs_mask(plan, arch)
    grouped = arch.heads != arch.kv_heads and not masked and arch.head_dim <= _FLASH_LARGEST_HEAD
    old = backend == "cuda" and capability is not None and capability < (8, 0)
    reasons = [
        (itemsize == 4, "fp32 inputs"),
        (masked, "a mask"),
        (arch.head_dim > _FLASH_LARGEST_HEAD, f"a head dimension of {arch.head_dim}"),
        (old, f"compute capability {'.'.join(map(str, capability or ()))}"),
    ]
    against = [reason for holds, reason in reasons if holds]
    if not against:
        return "flash", "16-bit inputs without a mask"
    if grouped:
        return "math", f"grouped-query heads with {' and '.join(against)} leave only the math kernel"
    return "efficient", f"{' and '.join(against)} rule{'s' if len(against) == 1 else ''} flash attention out"


def attention_itemsize(plan: Plan) -> int:
    """Itemsize of queries, keys and values where autocast is off."""
    return 4 if plan.upcast_frozen else ITEMSIZE[plan.dtype]
