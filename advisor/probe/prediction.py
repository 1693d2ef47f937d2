"""What was predicted of a plan that is probed, by each tier that can say something of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from advisor.errors import AdvisorError, EnvironmentLacksError, PlanError, UnsupportedError
from advisor.hardware import Gpu
from advisor.memory.estimate import Memory, Parameters, estimate
from advisor.memory.ledger import COMPONENTS
from advisor.plan import Plan
from advisor.profiles import ModelSource, profile_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A plan's memory as one tier has it."""

    tier: Literal["estimate", "trace"]
    memory: Memory


def predict(plan: Plan, model: ModelSource, gpu: Gpu, *, longest: int | None = None) -> tuple[Prediction, ...]:
    """The closed form's and the trace's memory of what a probe runs; a tier that cannot say it is left out.

    Args:
        plan: the plan.
        model: its model.
        gpu: whose kernels run.
        longest: tokens of the data's longest row, for which a probe's batch is only as wide as the training's.
    """
    if longest is not None and not plan.packing:
        from advisor.training.data.lengths import bucket_length

        plan = replace(plan, seq_len=bucket_length(min(longest, plan.seq_len), plan.seq_len))
    found: list[Prediction] = []
    with suppress(PlanError, UnsupportedError):
        memory = estimate(plan, profile_of(model).architecture, gpu)
        found.append(Prediction(tier="estimate", memory=replace(memory, moments=measurable_moments(memory))))
    with suppress(EnvironmentLacksError, PlanError, UnsupportedError):
        found.append(Prediction(tier="trace", memory=_traced(plan, model, gpu)))
    return tuple(found)


def measurable_moments(memory: Memory) -> Mapping[str, int]:
    """Moments of the closed form that a probe has too: its "loading" is what is there when a later step begins."""
    return {moment: peak for moment, peak in memory.moments.items() if moment != "loading"}


def _traced(plan: Plan, model: ModelSource, gpu: Gpu) -> Memory:
    from advisor.traced import trace_plan

    return trace_plan(plan, model, gpu).memory if gpu.backend != "cpu" else _traced_on_cpu(plan, model, gpu)


def _traced_on_cpu(plan: Plan, model: ModelSource, gpu: Gpu) -> Memory:
    """The trace with the CPU's kernels; what its allocator holds is what is allocated."""
    from advisor.memory import kernels
    from advisor.memory.trace.run import record, summarize

    try:
        events, built = record(plan, model.config, kernels.Cpu(), steps=2)
    except AdvisorError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise EnvironmentLacksError(f"{model.label} cannot be traced.", why=str(error)[:300]) from error
    run = summarize(events, built, kernels.Gpu())
    peaks = {"saving": run.saving_bytes, **run.peaks}
    return Memory(
        allocated_bytes=run.allocated_bytes,
        reserved_bytes=run.allocated_bytes,
        context_bytes=gpu.context_bytes,
        at=run.at,
        components={name: run.components.get(name, 0) for name in COMPONENTS},
        moments=peaks,
        parameters=Parameters(total=run.total_parameters, trainable=run.trainable_parameters),
        host_bytes=0,
    )


__all__ = ["Prediction", "measurable_moments", "predict"]
