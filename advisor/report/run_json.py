"""The JSON output of what ran: a probe, a launch, a merge; docs/schema.json describes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from advisor.plan import plan_to_fields
from advisor.report.json import SCHEMA, gpu_object, memory_object, speed_object

if TYPE_CHECKING:
    from advisor.launch.attempt import Attempt
    from advisor.launch.probing import Probed
    from advisor.launch.resolve import Launch
    from advisor.probe.answer import ProbeAnswer
    from advisor.probe.find import Found
    from advisor.training.merge import Merged


def probe_object(answer: ProbeAnswer) -> dict[str, Any]:
    """One plan by probe: what was measured beside what every tier predicted; null is unknown."""
    found = answer.measurement
    return {
        "schema": SCHEMA,
        "tier": "probe",
        "plan": plan_to_fields(answer.plan),
        "parameters": _probed_parameters(answer),
        "memory": _probed_memory(answer),
        "gpu": gpu_object(answer.gpu),
        "as": answer.imitation.name if answer.imitation is not None else None,
        "not_imitated": list(answer.imitation.not_imitated) if answer.imitation is not None else [],
        "fits": answer.fits,
        "reason": answer.reason,
        "speed": _measured_speed(answer),
        "measured": {
            "outcome": found.outcome,
            "failed_at": found.failed_at,
            "message": found.message,
            "meter": found.meter,
            "steps": found.steps,
            "step_allocated_bytes": found.step_allocated_bytes,
            "step_reserved_bytes": found.step_reserved_bytes,
            "driver_bytes": found.driver_bytes,
            "context_bytes": found.context_bytes,
            "host_peak_bytes": found.host_peak_bytes,
            "seconds": found.seconds,
            "released": found.released,
            "date": found.date,
            "versions": dict(found.versions),
        },
        "predicted": [{"tier": one.tier, "memory": memory_object(one.memory)} for one in answer.predictions],
        "found": _found_object(answer.found),
        "warnings": list(answer.warnings),
    }


def _probed_parameters(answer: ProbeAnswer) -> dict[str, int] | None:
    found = answer.measurement
    if found.total_parameters is None or found.trainable_parameters is None:
        return None
    return {"total": found.total_parameters, "trainable": found.trainable_parameters}


def _probed_memory(answer: ProbeAnswer) -> dict[str, Any] | None:
    """As every tier has it; a measurement knows no components, and the device's other users are not in it."""
    found = answer.measurement
    if found.allocated_bytes is None or found.reserved_bytes is None:
        return None
    return {
        "allocated_bytes": found.allocated_bytes,
        "reserved_bytes": found.reserved_bytes,
        "context_bytes": answer.context_bytes,
        "total_bytes": found.reserved_bytes + answer.context_bytes,
        "host_bytes": None,
        "at": found.at,
        "components": None,
        "moments": dict(found.moments),
    }


def _measured_speed(answer: ProbeAnswer) -> dict[str, Any] | None:
    from advisor.probe.advice import measured_speed

    return speed_object(measured_speed(answer.measurement))


def _found_object(found: Found | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "field": found.field,
        "largest": found.largest,
        "estimated": found.estimated,
        "limit": found.limit,
        "tries": [
            {
                "value": one.value,
                "outcome": one.measurement.outcome,
                "allocated_bytes": one.measurement.allocated_bytes,
                "reserved_bytes": one.measurement.reserved_bytes,
            }
            for one in found.tries
        ],
    }


def launch_object(launch: Launch, probed: Probed | None, attempts: list[Attempt]) -> dict[str, Any]:
    """A run: its plan and memory as predicted, what the probe measured, and how it ended; null what did not happen."""
    from advisor.launch.command import training_command

    job = launch.job
    reserved = probed.reserved_bytes if probed is not None else job.probed_reserved_bytes
    result = asdict(attempts[-1].ended.result) if attempts else {}
    host_peak_bytes = result.pop("host_peak_bytes", None)
    return {
        "schema": SCHEMA,
        "tier": "launch",
        "plan": plan_to_fields(job.plan),
        "memory": memory_object(launch.memory) if launch.memory is not None else None,
        "gpu": gpu_object(launch.gpu),
        "fits": launch.fit.fits if launch.fit is not None else None,
        "probed": {"reserved_bytes": reserved, "holds": probed.holds} if probed is not None else None,
        "run": job.out,
        "command": list(training_command(job, launch.gpu).words),
        "attempts": len(attempts),
        "result": result or None,
        "host_peak_bytes": host_peak_bytes,
    }


def merge_object(merged: Merged) -> dict[str, Any]:
    """A merge that is done: where it is, what it took."""
    merge = merged.merge
    return {
        "schema": SCHEMA,
        "run": merge.run,
        "base": merge.base_name,
        "out": merge.out,
        "dtype": merge.dtype,
        "modules": len(merge.modules),
        "files": list(merged.files),
        "needed_ram_bytes": merge.ram_bytes,
        "peak_ram_bytes": merged.peak_ram_bytes,
        "disk_bytes": merge.disk_bytes,
        "seconds": round(merged.seconds, 3),
    }
