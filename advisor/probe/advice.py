"""An advice with the speeds that earlier probes measured on this machine in the place of the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from advisor.advise import METHOD_LABELS, Advice, MethodAdvice, conclude
from advisor.probe.measurement import Measurement
from advisor.probe.results import calibration, day
from advisor.speed import Speed


def with_measured_speeds(advice: Advice, architecture: Mapping[str, Any]) -> Advice:
    """The same advice; a plan that was probed here has the speed that was measured, and a warning says so.

    Args:
        advice: for a GPU of this machine; any other is returned as it is.
        architecture: the keys of its model's config.json.
    """
    known = calibration(advice.gpu)
    if known is None:
        return advice
    measured = {part.method: known.speed_of(part.plan, architecture) for part in advice.methods}
    parts = tuple(_timed(part, measured[part.method], advice.request.tokens) for part in advice.methods)
    said = [
        f"The speed of {METHOD_LABELS[method]} was measured here by a probe on {day(one)}."
        for method, one in measured.items()
        if one is not None
    ]
    if not said:
        return advice
    return conclude(advice.model, advice.gpu, advice.request, parts, warnings=(*advice.warnings, *said))


def measured_speed(measurement: Measurement) -> Speed | None:
    """A measurement's speed in the words of every tier; None where nothing was timed."""
    seconds, rate = measurement.seconds_per_step, measurement.tokens_per_second
    if not seconds or rate is None or measurement.micro_step_seconds is None or measurement.optimizer_seconds is None:
        return None
    return Speed(
        step_seconds=seconds,
        tokens_per_second=rate,
        parts={
            "micro-steps": measurement.plan.gradient_accumulation * measurement.micro_step_seconds,
            "optimizer": measurement.optimizer_seconds,
        },
        basis=f"a probe on this {measurement.device_name} on {day(measurement)}",
        measured=True,
    )


def _timed(part: MethodAdvice, measurement: Measurement | None, tokens: int | None) -> MethodAdvice:
    speed = measured_speed(measurement) if measurement is not None else None
    if speed is None:
        return part
    return replace(part, speed=speed, run_seconds=tokens / speed.tokens_per_second if tokens else None)


__all__ = ["measured_speed", "with_measured_speeds"]
