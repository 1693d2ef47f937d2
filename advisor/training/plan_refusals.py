"""What a plan says that is not trained on a device, whatever model it is of: known without torch, before a download."""

from __future__ import annotations

from advisor.errors import PlanError
from advisor.plan import Plan


def refuse_scaling_on_the_processor(plan: Plan, device: str) -> None:
    """Mixed precision in float16 needs its gradients scaled.

    Raises:
        PlanError: the plan asks for it on the processor.
    """
    if device == "cpu" and plan.autocast == "float16":
        raise PlanError(
            "autocast",
            "float16 has no gradient scaling on the CPU",
            why="accelerate leaves mixed precision in float16 out there without a word.",
            hint='Write autocast = "bfloat16" or "none".',
        )


def refuse_products_in_fp32(plan: Plan) -> None:
    """4-bit weights compute in the dtype of their inputs.

    Raises:
        PlanError: that would be fp32, though the plan does not say so.
    """
    if plan.quantization is not None and plan.dtype != "float32" and plan.upcast_frozen and plan.autocast == "none":
        raise PlanError(
            "upcast_frozen",
            f"the 4-bit weights would compute in fp32, not in {plan.dtype}",
            why="Norms and embeddings in fp32 hand fp32 to every layer, and bitsandbytes computes in what it gets.",
            hint=f'Write upcast_frozen = false, or autocast = "{plan.dtype}".',
        )
