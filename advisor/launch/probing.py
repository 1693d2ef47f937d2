"""The dry run on the device: after the preflight, before the training; smaller plans until one holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from advisor.launch.attempt import next_plan
from advisor.launch.resolve import Launch, Progress
from advisor.launch.stepdown import StepDown
from advisor.plan import Plan

if TYPE_CHECKING:
    from advisor.probe.measurement import Measurement

MOST_PROBES = 10
"""A plan that does not hold after so many steps down is no plan for this device."""

HOPELESS = 1.5
"""A plan that needs so many times what there is, by the estimate, is not run to find out; assumed."""

Measure = Callable[[Plan, Progress], "Measurement"]
Consent = Callable[[StepDown], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What a dry run measured."""

    launch: Launch
    """The run by the plan that held; by the last one that was tried where none did."""

    holds: bool
    """Whether its peak stays within what is free."""

    reserved_bytes: int | None
    allocated_bytes: int | None
    step_seconds: float | None
    tokens_per_second: float | None
    steps_down: tuple[StepDown, ...] = ()
    """What was given up on the way."""

    message: str = ""


def is_hopeless(launch: Launch) -> bool:
    """Whether a probe could only confirm what the estimate says."""
    return launch.fit is not None and launch.fit.needed_bytes > HOPELESS * launch.fit.total_bytes


def probe_launch(
    launch: Launch,
    progress: Progress,
    *,
    steps_down: bool = True,
    consents: Consent | None = None,
    measure: Measure | None = None,
) -> Probed:
    """Probes a run's plan; while its peak is over what is free, the next smaller one's.

    Args:
        launch: what would be trained.
        progress: called with the name of what begins.
        steps_down: whether a smaller plan may be taken.
        consents: asked whether sequences may be cut, until it says no; None where nobody can answer, and none are.
        measure: measures one plan; by default a probe of its own.

    Raises:
        RunFailedError: a probe failed for another reason than memory.
    """
    from advisor.probe.find import failure

    run = measure or _measure_for(launch)
    steps: list[StepDown] = []
    while True:
        found = run(launch.job.plan, progress)
        if found.outcome not in ("ran", "out_of_memory"):
            error = failure(found)
            error.hint = f"{error.hint} To train without a dry run: --no-probe".strip()
            raise error
        probed = _probed(launch, found, tuple(steps))
        if probed.holds or not steps_down or len(steps) + 1 >= MOST_PROBES:
            return probed
        step = next_plan(launch, shorter=consents is not None)
        cuts = step is not None and step.plan.seq_len < launch.job.plan.seq_len
        if step is not None and consents is not None and cuts and not consents(step):
            consents, step = None, next_plan(launch)
        if step is None:
            return probed
        steps.append(step)
        progress(f"out of memory; next: {step.change}")
        launch = launch.with_plan(step.plan)


def _measure_for(launch: Launch) -> Measure:
    from advisor.probe.measure import Subject, measure

    longest = launch.data.lengths[-1] if launch.data is not None and launch.data.lengths else None
    subject = Subject(model=launch.model, gpu=launch.gpu, longest=longest)
    return lambda plan, progress: measure(plan, subject, progress)


def _probed(launch: Launch, found: Measurement, steps: tuple[StepDown, ...]) -> Probed:
    holds = found.outcome == "ran"
    job = replace(launch.job, probed_reserved_bytes=found.reserved_bytes if holds else None)
    return Probed(
        launch=replace(launch, job=job),
        holds=holds,
        reserved_bytes=found.reserved_bytes,
        allocated_bytes=found.allocated_bytes,
        step_seconds=found.seconds_per_step,
        tokens_per_second=found.tokens_per_second,
        steps_down=steps,
        message=_said(found),
    )


def _said(found: Measurement) -> str:
    """Speed where it ran; where and why it did not otherwise."""
    from advisor.units import duration

    if found.outcome == "ran":
        seconds, rate = found.seconds_per_step, found.tokens_per_second
        return f"{duration(seconds)} a step, {rate:,.0f} tokens/s." if seconds and rate else ""
    where = f"Out of memory during {found.failed_at}. " if found.failed_at else "Out of memory. "
    return f"{where}{found.message}".strip()


__all__ = ["Probed", "is_hopeless", "probe_launch"]
