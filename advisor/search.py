"""The search behind the advice: of one method's plans, the fastest that fits, or else the smallest.

Every knob is tried: micro-batch (the effective batch stays), checkpointing, loss, optimizer, attention. Combinations
are taken in the order of the speed they could reach at best, and memory grows with the micro-batch, so most of them
are never computed; a test holds the result equal to trying everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from advisor.architecture import Architecture
from advisor.fit import Fit, check_fit
from advisor.hardware import Gpu
from advisor.memory.estimate import reserved_bytes, simulate
from advisor.memory.ledger import Ledger
from advisor.memory.step import paged_bytes
from advisor.plan import Attention, Loss, Optimizer, Plan
from advisor.speed import relative_seconds

OPTIMIZERS: tuple[Optimizer, ...] = ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit")
LOSSES: tuple[Loss, ...] = ("chunked", "standard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan with what was computed of it."""

    plan: Plan
    ledger: Ledger
    fit: Fit
    seconds: float
    """Relative step time, for comparing plans; seconds only where the GPU's rates are known."""

    spilled_bytes: int
    """Paged optimizer states that do not fit beside the rest and so live in host RAM."""


def divisors(number: int) -> tuple[int, ...]:
    """Micro-batches that divide an effective batch, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))


def evaluate(plan: Plan, arch: Architecture, gpu: Gpu) -> Candidate:
    """Peak, fit and relative step time of one plan."""
    ledger = simulate(plan, arch, gpu)
    fit = check_fit(reserved_bytes(ledger), gpu)
    paged = paged_bytes(plan, arch)
    spilled = max(0, min(paged, fit.needed_bytes + paged - gpu.total_bytes))
    seconds = relative_seconds(plan, arch, gpu, spilled_bytes=spilled)
    return Candidate(plan=plan, ledger=ledger, fit=fit, seconds=seconds, spilled_bytes=spilled)


def combinations(base: Plan, attentions: tuple[Attention, ...]) -> tuple[Plan, ...]:
    """The base plan with every combination of the knobs, at micro-batch 1."""
    knobs = product((False, True), LOSSES, OPTIMIZERS, attentions)
    return tuple(
        replace(
            base,
            gradient_checkpointing=checkpointing,
            loss=loss,
            optimizer=optimizer,
            attention=attention,
            micro_batch=1,
            gradient_accumulation=base.effective_batch,
        )
        for checkpointing, loss, optimizer, attention in knobs
    )


def at_micro_batch(plan: Plan, micro_batch: int) -> Plan:
    """The same effective batch in larger or smaller pieces."""
    return replace(plan, micro_batch=micro_batch, gradient_accumulation=plan.effective_batch // micro_batch)


def search(base: Plan, arch: Architecture, gpu: Gpu, *, attentions: tuple[Attention, ...] = ("sdpa",)) -> Candidate:
    """The fastest of a method's plans that fits the GPU; the smallest if none does.

    Args:
        base: method, model, dtype, sequence length, adapters; its effective batch is kept.
        arch: the model.
        gpu: the GPU.
        attentions: implementations that can be used there.
    """
    sizes = divisors(base.effective_batch)
    plans = combinations(base, attentions)
    best = smallest(plans, sizes, arch, gpu)
    if not best.fit.fits:
        return best
    reach = {plan: relative_seconds(at_micro_batch(plan, sizes[-1]), arch, gpu) for plan in plans}
    bounds: dict[tuple[bool, Attention], tuple[int, ...]] = {}
    for plan in sorted(plans, key=reach.__getitem__):
        if reach[plan] >= best.seconds:
            break
        group = plan.gradient_checkpointing, plan.attention
        if group not in bounds:
            bounds[group] = _sizes_within_reach(plan, sizes, arch, gpu)
        found = largest_that_fits(plan, bounds[group], arch, gpu)
        if found is not None and found.seconds < best.seconds:
            best = found
    return best


def smallest_plan(
    base: Plan, arch: Architecture, gpu: Gpu, *, attentions: tuple[Attention, ...] = ("sdpa",)
) -> Candidate:
    """The method's plan that needs least memory, whether or not it fits."""
    return smallest(combinations(base, attentions), divisors(base.effective_batch), arch, gpu)


def smallest(plans: tuple[Plan, ...], sizes: tuple[int, ...], arch: Architecture, gpu: Gpu) -> Candidate:
    """The plan that needs least: checkpointing, the frugal loss and states, and one sequence.

    Or two, where heads are grouped: only a padded batch has a mask, and a mask spares them the math kernel.
    """
    tried = [
        evaluate(at_micro_batch(plan, size), arch, gpu)
        for plan in plans
        if plan.gradient_checkpointing and _frugal(plan) == plan
        for size in sizes[: _irregular(arch)]
    ]
    return min(tried, key=lambda candidate: candidate.fit.needed_bytes)


def largest_that_fits(plan: Plan, sizes: tuple[int, ...], arch: Architecture, gpu: Gpu) -> Candidate | None:
    """The largest micro-batch of a combination that fits, by bisection from the top; None if none does."""
    found = None
    low, high = 0, len(sizes) - 1
    middle = high
    while low <= high:
        candidate = evaluate(at_micro_batch(plan, sizes[middle]), arch, gpu)
        if candidate.fit.fits:
            found, low = candidate, middle + 1
        else:
            high = middle - 1
        middle = (low + high + 1) // 2
    return found


def _sizes_within_reach(plan: Plan, sizes: tuple[int, ...], arch: Architecture, gpu: Gpu) -> tuple[int, ...]:
    """The micro-batches at which a combination's most frugal sister fits: no other loss or optimizer goes further."""
    start = _irregular(arch) - 1
    found = largest_that_fits(_frugal(plan), sizes[start:], arch, gpu)
    limit = found.plan.micro_batch if found else 0
    return tuple(size for index, size in enumerate(sizes) if size <= limit or index < start)


def _frugal(plan: Plan) -> Plan:
    return replace(plan, loss=LOSSES[0], optimizer=OPTIMIZERS[-1])


def _irregular(arch: Architecture) -> int:
    """How many of the smallest micro-batches have to be looked at one by one: memory grows from the last of them on.

    Grouped-query heads without a mask may fall to the math kernel, so one sequence can need more than two.
    """
    return 2 if arch.heads != arch.kv_heads else 1
