"""An advice proven: the shortlist's plans traced, judged again, and made smaller where they no longer fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from advisor.advise import METHOD_LABELS, Advice, MethodAdvice, conclude, describe_method
from advisor.plan import Method, Plan
from advisor.profiles import ModelSource
from advisor.search import at_micro_batch, divisors
from advisor.traced import Progress, TracedPlan, trace_plan

MOST_STEPS_DOWN = 3
"""Each one is another trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """A method after its trace, and what is to be said about it."""

    part: MethodAdvice
    traced: TracedPlan
    warning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """An advice whose memory is traced, and the traces."""

    advice: Advice
    traced: Mapping[Method, TracedPlan]


def trace_shortlist(advice: Advice, model: ModelSource, *, progress: Progress | None = None) -> Proof:
    """The same advice with the memory of every plan that fits by trace, or of the one that misses least.

    Args:
        advice: in closed form.
        model: what it is about.
        progress: called with the method and the name of what begins.

    Raises:
        InputError: the model cannot be built from what is known of it.
        EnvironmentLacksError: a package is missing, or an operation cannot be traced.
    """
    traced = {part.method: _trace(part, advice, model, progress) for part in advice.methods if _listed(part, advice)}
    parts = tuple(traced[part.method].part if part.method in traced else part for part in advice.methods)
    said = [judged.warning for judged in traced.values() if judged.warning]
    said += [warning for judged in traced.values() for warning in judged.traced.warnings]
    warnings = tuple(dict.fromkeys((*advice.warnings, *said)))
    proven = conclude(advice.model, advice.gpu, advice.request, parts, warnings=warnings)
    return Proof(advice=proven, traced={method: judged.traced for method, judged in traced.items()})


def _listed(part: MethodAdvice, advice: Advice) -> bool:
    return part.fits or part is advice.choice


def _trace(part: MethodAdvice, advice: Advice, model: ModelSource, progress: Progress | None) -> _Judged:
    """A method's plan by trace; while it does not fit, the next smaller micro-batch's."""
    label = METHOD_LABELS[part.method]

    def tell(what: str) -> None:
        if progress is not None:
            progress(f"{label}: {what}")

    plan = part.plan
    smaller = _smaller_batches(plan)
    traced = trace_plan(plan, model, advice.gpu, progress=tell)
    judged = _describe(traced, advice)
    for size in reversed(smaller[-MOST_STEPS_DOWN:] if part.fits else []):
        if judged.fits:
            break
        traced = trace_plan(at_micro_batch(plan, size), model, advice.gpu, progress=tell)
        judged = _describe(traced, advice)
    return _Judged(part=judged, traced=traced, warning=_difference(part, judged))


def _smaller_batches(plan: Plan) -> list[int]:
    """Micro-batches to step down to, ascending: parts of the effective batch, which backward's steps make smaller."""
    if plan.optimizer_in_backward:
        return list(range(1, plan.micro_batch))
    return [size for size in divisors(plan.effective_batch) if size < plan.micro_batch]


def _describe(traced: TracedPlan, advice: Advice) -> MethodAdvice:
    assert traced.fit is not None
    fit, paged = traced.fit, traced.memory.host_bytes
    spilled = max(0, min(paged, fit.needed_bytes + paged - fit.total_bytes))
    return describe_method(
        traced.plan, traced.memory, fit, advice.model, advice.gpu, advice.request, spilled_bytes=spilled, tier="trace"
    )


def _difference(before: MethodAdvice, after: MethodAdvice) -> str:
    """What the trace changed, in a sentence; empty where it changed nothing that decides."""
    label = METHOD_LABELS[before.method]
    label = label[0].upper() + label[1:]
    if before.fits and not after.fits:
        return f"{label} fits by the estimate, but not by the trace, down to a micro-batch of {after.plan.micro_batch}."
    if before.plan != after.plan:
        sizes = f"a micro-batch of {before.plan.micro_batch} does not fit; {after.plan.micro_batch} does"
        return f"{label}: by the trace {sizes}."
    if after.fits and not before.fits:
        return f"{label} does not fit by the estimate, but does by the trace."
    return ""
