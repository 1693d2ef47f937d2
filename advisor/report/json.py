"""The JSON output: one object, sizes in bytes; docs/schema.json describes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from advisor.plan import Plan, plan_to_fields

if TYPE_CHECKING:  # the fast answer imports no more than it uses
    from advisor.advise import Advice, MethodAdvice, Tier
    from advisor.doctor import Check
    from advisor.fit import Fit
    from advisor.hardware import Gpu
    from advisor.memory.estimate import Memory
    from advisor.memory.ledger import Entry
    from advisor.profiles import ModelProfile
    from advisor.recipes import RecipeAnswer
    from advisor.speed import Speed
    from advisor.survey import SurveyRow
    from advisor.traced import Survival, TracedPlan

SCHEMA = 1

_LARGEST = 40
"""Kinds of tensors that are listed."""


def plan_object(tier: Tier, plan: Plan, memory: Memory) -> dict[str, Any]:
    """One plan at one tier: what every answer has."""
    return {
        "schema": SCHEMA,
        "tier": tier,
        "plan": plan_to_fields(plan),
        "parameters": _parameters_object(memory),
        "memory": memory_object(memory),
    }


def _parameters_object(memory: Memory) -> dict[str, int]:
    return {"total": memory.parameters.total, "trainable": memory.parameters.trainable}


def _fit_object(fit: Fit) -> dict[str, Any]:
    return {
        "fits": fit.fits,
        "needed_bytes": fit.needed_bytes,
        "missing_bytes": fit.missing_bytes,
        "margin_bytes": fit.margin_bytes,
        "near_edge": fit.near_edge,
    }


def estimate_object(plan: Plan, memory: Memory, gpu: Gpu, fit: Fit | None, warnings: tuple[str, ...]) -> dict[str, Any]:
    """One plan in closed form, judged where a GPU is known."""
    answer = plan_object("estimate", plan, memory) | {"warnings": list(warnings)}
    return answer if fit is None else answer | {"gpu": gpu_object(gpu), **_fit_object(fit)}


def memory_object(memory: Memory) -> dict[str, Any]:
    """A plan's memory."""
    return {
        "allocated_bytes": memory.allocated_bytes,
        "reserved_bytes": memory.reserved_bytes,
        "context_bytes": memory.context_bytes,
        "total_bytes": memory.total_bytes,
        "host_bytes": memory.host_bytes,
        "at": memory.at,
        "components": dict(memory.components),
        "moments": dict(memory.moments),
    }


def speed_object(speed: Speed | None, run_seconds: float | None = None) -> dict[str, Any] | None:
    """A plan's estimated speed; null where it is unknown."""
    if speed is None:
        return None
    return {
        "step_seconds": speed.step_seconds,
        "tokens_per_second": speed.tokens_per_second,
        "run_seconds": run_seconds,
        "parts": dict(speed.parts),
        "basis": speed.basis,
        "measured": speed.measured,
    }


def gpu_object(gpu: Gpu) -> dict[str, Any]:
    """The GPU that an answer is for."""
    return {
        "name": gpu.name,
        "profile": gpu.profile.name if gpu.profile else None,
        "backend": gpu.backend,
        "detected": gpu.detected,
        "index": gpu.index,
        "uuid": gpu.uuid,
        "driver": gpu.driver,
        "capability": ".".join(map(str, gpu.capability)) if gpu.capability else None,
        "bfloat16": gpu.bfloat16,
        "total_bytes": gpu.total_bytes,
        "driver_bytes": gpu.driver_bytes,
        "free_bytes": gpu.free_bytes,
        "others_bytes": gpu.others_bytes,
        "context_bytes": gpu.context_bytes,
        "context_provenance": gpu.context_provenance,
        "mig": gpu.mig,
        "unified": gpu.unified,
        "display_attached": gpu.display_attached,
        "processes": [
            {"pid": process.pid, "name": process.name, "used_bytes": process.used_bytes} for process in gpu.processes
        ],
        "notes": list(gpu.notes),
    }


def advice_object(advice: Advice) -> dict[str, Any]:
    """The main command's answer; plan and memory are the recommended method's."""
    choice = advice.choice
    return plan_object(choice.tier, choice.plan, choice.memory) | {
        "gpu": gpu_object(advice.gpu),
        "methods": [_method_object(part) for part in advice.methods],
        "recommended": advice.recommended,
        "reason": advice.reason,
        "unlock": advice.unlock,
        "next_command": advice.next_command,
        "warnings": list(advice.warnings),
    }


def _method_object(part: MethodAdvice) -> dict[str, Any]:
    return {
        "method": part.method,
        "tier": part.tier,
        **_fit_object(part.fit),
        "reason": part.reason,
        "plan": plan_to_fields(part.plan),
        "memory": memory_object(part.memory),
        "speed": speed_object(part.speed, part.run_seconds),
        "spilled_bytes": part.spilled_bytes,
        "saved_bytes": part.saved_bytes,
        "parameters": _parameters_object(part.memory),
    }


def recipe_object(answer: RecipeAnswer) -> dict[str, Any]:
    """A recipe on a GPU."""
    return plan_object("estimate", answer.plan, answer.memory) | {
        "gpu": gpu_object(answer.gpu),
        "recipe": answer.recipe.name,
        "fits": answer.fit.fits,
        "reason": answer.verdict,
        "speed": speed_object(answer.speed),
        "needed_bytes": answer.fit.needed_bytes,
        "missing_bytes": answer.fit.missing_bytes,
        "state_bytes": answer.state_bytes,
        "spilled_bytes": answer.spilled_bytes,
        "story": list(answer.story),
        "warnings": list(answer.gpu.notes),
    }


def trace_object(traced: TracedPlan) -> dict[str, Any]:
    """One plan by trace: what every answer has, and what was alive at the peak."""
    from advisor.report.tensors import group_modules, group_tensors

    run = traced.trace
    answer = plan_object("trace", traced.plan, traced.memory)
    answer["memory"] |= {
        "allocated_default_bytes": run.default.allocated_bytes,
        "reserved_default_bytes": run.default.reserved_bytes,
        "reserved_expandable_bytes": run.expandable.reserved_bytes,
        "loading_bytes": run.loading_bytes,
    }
    answer |= {
        "allocator": {"expandable_segments": run.regime.expandable, "empties_cache": run.regime.empties_cache},
        "modules": [
            {"module": row.module, "count": row.number, "bytes": row.total_bytes} for row in group_modules(run.largest)
        ],
        "largest": [
            {
                "bytes": row.kind.nbytes,
                "count": row.number,
                "total_bytes": row.total_bytes,
                "shape": list(row.kind.shape),
                "dtype": row.kind.dtype,
                "component": row.kind.component,
                "module": row.module,
                "operation": row.kind.operation,
                "moment": row.moment,
            }
            for row in group_tensors(run.largest)[:_LARGEST]
        ],
        "closed_form": _closed_form_object(traced),
        "warnings": [*traced.gpu.notes, *traced.warnings],
    }
    if traced.fit is None or traced.survival is None:
        return answer
    return answer | {
        "gpu": gpu_object(traced.gpu),
        **_fit_object(traced.fit),
        "survives": _survival_object(traced.survival),
    }


def _closed_form_object(traced: TracedPlan) -> dict[str, Any] | None:
    if traced.closed_form is None:
        return None
    return {
        "allocated_bytes": traced.closed_form.allocated_bytes,
        "reserved_bytes": traced.closed_form.reserved_bytes,
        "error_bytes": traced.closed_form_error_bytes,
    }


def _survival_object(survival: Survival) -> dict[str, Any]:
    failed = None
    if survival.failed_at is not None:
        failed = {
            "at": survival.failed_at,
            "requested_bytes": survival.requested_bytes,
            "left_bytes": survival.left_bytes,
        }
    return {"room_bytes": survival.room_bytes, "released_bytes": survival.released_bytes, "out_of_memory": failed}


def terms_object(entries: tuple[Entry, ...]) -> list[dict[str, Any]]:
    """What is allocated at the peak, term by term, with each formula and its inputs."""
    return [
        {
            "name": entry.term.name,
            "component": entry.component,
            "formula": entry.term.formula,
            "inputs": dict(zip(entry.term.inputs, entry.sizes, strict=True)),
            "count": entry.count,
            "bytes": entry.size_bytes,
        }
        for entry in entries
    ]


def survey_object(rows: tuple[SurveyRow, ...]) -> dict[str, Any]:
    """Methods against GPUs."""
    return {
        "schema": SCHEMA,
        "tier": "estimate",
        "gpus": [
            {
                "gpu": row.gpu.profile.name if row.gpu.profile else row.gpu.name,
                "total_bytes": row.gpu.total_bytes,
                "methods": {
                    method: {
                        "micro_batch": reach.micro_batch,
                        "seq_len": reach.seq_len,
                        "optimizer_in_backward": reach.in_backward,
                    }
                    for method, reach in row.reach.items()
                },
            }
            for row in rows
        ],
    }


def doctor_object(checks: Sequence[Check]) -> dict[str, Any]:
    """What was looked at on this machine."""
    return {"schema": SCHEMA, "checks": [asdict(check) for check in checks]}


def models_object(profiles: tuple[ModelProfile, ...]) -> dict[str, Any]:
    """The models that are known by name."""
    return {
        "schema": SCHEMA,
        "models": [
            {
                "name": profile.name,
                "label": profile.label,
                "hub_id": profile.hub_id,
                "parameters": profile.architecture.parameters,
                "launchable": profile.launchable,
                "launch_note": profile.launch_note,
                "source": profile.source,
            }
            for profile in profiles
        ],
    }
