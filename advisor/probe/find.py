"""The largest micro-batch, or the longest sequence, that really runs: bisection from the estimate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from advisor.errors import AdvisorError, RunFailedError
from advisor.fit import check_fit
from advisor.hardware import Gpu
from advisor.memory.estimate import estimate
from advisor.plan import Plan
from advisor.probe.measure import Progress, Subject, measure
from advisor.probe.measurement import Measurement
from advisor.profiles import profile_of

Field = Literal["micro_batch", "seq_len"]

LARGEST_MICRO_BATCH = 1024
SEQ_LEN_STEP = 64
"""Sequence lengths are tried in multiples of this, as the tool picks them."""

_FINDING_STEPS = 2
"""The second has the optimizer's states; a third finds nothing more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One value that was tried."""

    value: int
    measurement: Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to."""

    field: Field
    largest: int | None
    """The largest that ran; None where not even the smallest did."""

    estimated: int | None
    """The largest that fits by the estimate; None where it knows nothing of the model, or nothing fits."""

    limit: int
    """The largest that was allowed."""

    tries: tuple[Try, ...]
    """In the order in which they were made."""

    @property
    def measurement(self) -> Measurement:
        """Of the largest that ran; of the smallest that did not where none did."""
        ran = [one for one in self.tries if one.value == self.largest]
        return ran[-1].measurement if ran else min(self.tries, key=lambda one: one.value).measurement


def find_largest(field: Field, plan: Plan, subject: Subject, progress: Progress = lambda _: None) -> Found:
    """The largest value of a plan's field that runs, each try in a clean process.

    Args:
        field: what grows; the rest of the plan stays.
        plan: the plan.
        subject: model and device.
        progress: called with the name of what begins.

    Raises:
        RunFailedError: a try failed for another reason than memory.
    """
    unit = 1 if field == "micro_batch" else SEQ_LEN_STEP
    limit = LARGEST_MICRO_BATCH if field == "micro_batch" else _context(subject)
    tries: list[Try] = []
    subject = replace(subject, steps=_FINDING_STEPS, saves=False)

    def runs(count: int) -> bool:
        value = count * unit
        found = measure(grown(plan, field, value), subject, lambda stage: progress(f"{field} {value}: {stage}"))
        if found.outcome not in ("ran", "out_of_memory"):
            raise failure(found)
        tries.append(Try(value=value, measurement=found))
        return found.outcome == "ran"

    estimated = largest_by_estimate(field, plan, subject)
    start = (estimated if estimated is not None else getattr(plan, field)) // unit
    largest = bisect(runs, start=min(max(start, 1), limit // unit), limit=limit // unit)
    return Found(
        field=field,
        largest=None if largest is None else largest * unit,
        estimated=estimated,
        limit=limit,
        tries=tuple(tries),
    )


def grown(plan: Plan, field: Field, value: int) -> Plan:
    """The plan with another value of that field."""
    return replace(plan, micro_batch=value) if field == "micro_batch" else replace(plan, seq_len=value)


def bisect(runs: Callable[[int], bool], *, start: int, limit: int) -> int | None:
    """The largest number from 1 to `limit` that runs, where all smaller ones run too; None where 1 does not.

    Steps away from a good first guess double, and then the gap is halved: a right guess takes two tries.
    """
    low, high, step = 0, limit + 1, 1
    now = start
    while low < high - 1:
        if runs(now):
            low = now
        else:
            high = now
        if low == 0:
            now = max(1, high - step)
        elif high == limit + 1:
            now = min(limit, low + step)
        else:
            now = (low + high) // 2
        step *= 2
    return low or None


def largest_by_estimate(field: Field, plan: Plan, subject: Subject) -> int | None:
    """The largest value that fits in closed form; None where nothing fits or the model is not known to it."""
    unit = 1 if field == "micro_batch" else SEQ_LEN_STEP
    limit = LARGEST_MICRO_BATCH if field == "micro_batch" else _context(subject)
    gpu = _as_capped(subject)
    try:
        architecture = profile_of(subject.model).architecture

        def fits(count: int) -> bool:
            candidate = grown(plan, field, count * unit)
            return check_fit(estimate(candidate, architecture, gpu).reserved_bytes, gpu).fits

        found = _largest(fits, limit // unit)
    except AdvisorError:
        return None
    return found * unit if found else None


def _as_capped(subject: Subject) -> Gpu:
    """The GPU that the answer is about, with no more free than a cap leaves."""
    gpu = subject.target
    if subject.cap_bytes is None:
        return gpu
    return replace(gpu, free_bytes=min(gpu.total_bytes, subject.cap_bytes + gpu.context_bytes))


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    low, high = 0, limit + 1
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _context(subject: Subject) -> int:
    longest = subject.model.config.get("max_position_embeddings")
    context = longest if isinstance(longest, int) and longest > 0 else 2**17
    return max(SEQ_LEN_STEP, context // SEQ_LEN_STEP * SEQ_LEN_STEP)


def failure(found: Measurement) -> RunFailedError:
    """Why a probe came to no answer."""
    where = f" during {found.failed_at}" if found.failed_at else ""
    hint = found.hint or "Run it again with --debug; phi3-advise doctor says what this machine lacks."
    error = RunFailedError(f"The probe failed{where}.", why=found.message, hint=hint)
    error.exit_code = found.exit_code
    if found.log:
        # A traceback shows it, and so only --debug does.
        error.add_note(found.log)
    return error


__all__ = ["Found", "Try", "bisect", "failure", "find_largest", "largest_by_estimate"]
