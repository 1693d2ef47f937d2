"""The next plan to try where one ran out of memory: what costs least is given up first, the effective batch never."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from advisor.advise import METHOD_LABELS, SHORTEST_SEQ_LEN
from advisor.hardware import Gpu
from advisor.plan import METHODS, Optimizer, Plan
from advisor.profiles import default_plan
from advisor.search import at_micro_batch, divisors, runs_on

_SMALLER_STATES: dict[Optimizer, tuple[Optimizer, ...]] = {
    "adamw_torch": ("adamw_bnb_8bit", "paged_adamw_8bit"),
    "adamw_torch_fused": ("adamw_bnb_8bit", "paged_adamw_8bit"),
    "adamw_bnb_8bit": ("paged_adamw_8bit",),
    "adamw_8bit": ("paged_adamw_8bit",),
    "paged_adamw_32bit": ("paged_adamw_8bit",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDown:
    """A plan that needs less memory, and what it gives up."""

    plan: Plan
    change: str
    """What is different, a phrase."""


def step_down(
    plan: Plan,
    gpu: Gpu,
    *,
    shorter: bool = False,
    advised: Sequence[Plan] = (),
    has_bitsandbytes: bool = True,
) -> StepDown | None:
    """The next plan after one that ran out of memory; None where nothing is left to give up.

    Micro-batch halves and accumulation grows; then checkpointing, chunked loss, 8-bit states, paged states, a shorter
    sequence, and at last the next method.

    Args:
        plan: what ran out of memory.
        gpu: where.
        shorter: whether sequences may be cut, which changes what is learned.
        advised: the best plans of other methods on this GPU, as the advice has them.
        has_bitsandbytes: whether 8-bit states and 4-bit weights can be had here.
    """
    rungs: tuple[Callable[[], StepDown | None], ...] = (
        lambda: _smaller_batch(plan),
        lambda: _checkpointing(plan),
        lambda: _chunked_loss(plan),
        lambda: _smaller_states(plan, gpu) if has_bitsandbytes else None,
        lambda: _shorter(plan) if shorter else None,
        lambda: _next_method(plan, gpu, advised, has_bitsandbytes=has_bitsandbytes),
    )
    return next((found for rung in rungs if (found := rung()) is not None), None)


def _smaller_batch(plan: Plan) -> StepDown | None:
    smaller = [size for size in divisors(plan.effective_batch) if size <= plan.micro_batch // 2]
    if not smaller or plan.optimizer_in_backward:
        return None
    after = at_micro_batch(plan, smaller[-1])
    change = f"micro-batch {after.micro_batch} × accumulation {after.gradient_accumulation}"
    return StepDown(plan=after, change=f"{change} in place of {plan.micro_batch} × {plan.gradient_accumulation}")


def _checkpointing(plan: Plan) -> StepDown | None:
    if plan.gradient_checkpointing:
        return None
    return StepDown(plan=replace(plan, gradient_checkpointing=True), change="gradient checkpointing")


def _chunked_loss(plan: Plan) -> StepDown | None:
    if plan.loss == "chunked":
        return None
    return StepDown(plan=replace(plan, loss="chunked"), change="the chunked loss")


def _smaller_states(plan: Plan, gpu: Gpu) -> StepDown | None:
    for optimizer in _SMALLER_STATES.get(plan.optimizer, ()):
        if runs_on(optimizer, gpu):
            kind = "paged 8-bit" if optimizer.startswith("paged") else "8-bit"
            return StepDown(plan=replace(plan, optimizer=optimizer), change=f"{kind} optimizer states ({optimizer})")
    return None


def _shorter(plan: Plan) -> StepDown | None:
    seq_len = max(SHORTEST_SEQ_LEN, plan.seq_len // 2)
    if seq_len >= plan.seq_len:
        return None
    change = f"sequences of {seq_len:,} tokens in place of {plan.seq_len:,}"
    return StepDown(plan=replace(plan, seq_len=seq_len), change=change)


def _next_method(plan: Plan, gpu: Gpu, advised: Sequence[Plan], *, has_bitsandbytes: bool) -> StepDown | None:
    later = METHODS[METHODS.index(plan.method) + 1 :]
    for method in later:
        if method == "qlora" and not has_bitsandbytes:
            continue
        found = next((other for other in advised if other.method == method), None)
        smallest = found or _smallest(default_plan(method, model=plan.model, dtype=gpu.dtype), plan)
        kept = replace(smallest, model=plan.model, training=plan.training, gpu=plan.gpu)
        return StepDown(plan=kept, change=f"{METHOD_LABELS[method]} in place of {METHOD_LABELS[plan.method]}")
    return None


def _smallest(default: Plan, plan: Plan) -> Plan:
    """A method's default with a plan's batch and data, a sequence at a time."""
    lora = plan.lora if plan.lora is not None else default.lora
    return replace(
        default,
        lora=lora,
        micro_batch=1,
        gradient_accumulation=plan.effective_batch,
        seq_len=plan.seq_len,
        padding=plan.padding,
        packing=plan.packing,
        gradient_checkpointing=True,
        loss="chunked",
    )


__all__ = ["StepDown", "step_down"]
