"""Full fine-tuning where no ordinary plan fits: each weight is stepped in backward, and no gradient is kept.

That costs gradient clipping, which needs all gradients at once, and accumulation, which adds to them: the micro-batch
is the effective batch. So such plans are looked at only where nothing else fits, and of them the one is taken that
comes nearest to the effective batch that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from advisor.plan import Plan


def can_step_in_backward(base: Plan) -> bool:
    """Whether a plan may step in backward: every weight is trained, and no gradient has to be unscaled first."""
    return base.method == "full" and base.autocast != "float16"


def stepping_in_backward(plan: Plan, micro_batch: int) -> Plan:
    """The same plan without accumulation, its weights stepped in backward."""
    return replace(plan, micro_batch=micro_batch, gradient_accumulation=1, optimizer_in_backward=True)


def largest_that(fits: Callable[[int], bool], most: int, regular_from: int) -> int | None:
    """The largest number from 1 up to `most` that fits; None where none does.

    Args:
        fits: whether a number does; from `regular_from` on, only if all smaller ones from there do.
        most: the largest number.
        regular_from: numbers below are looked at one by one.
    """
    if fits(most):
        return most
    low, high = min(regular_from, most), most
    if not fits(low):
        return next((size for size in range(low - 1, 0, -1) if fits(size)), None)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def cost_of_stepping_in_backward(plan: Plan, effective_batch: int) -> str:
    """What a plan that steps in backward gives up, in words.

    Args:
        plan: such a plan.
        effective_batch: that was asked for.
    """
    given_up = "gradients are not clipped"
    if plan.effective_batch == effective_batch:
        return f"{given_up}, and the whole effective batch of {effective_batch:,} is one micro-batch"
    return f"{given_up}, and the effective batch becomes {plan.effective_batch:,} in place of {effective_batch:,}"


__all__ = ["can_step_in_backward", "cost_of_stepping_in_backward", "largest_that", "stepping_in_backward"]
