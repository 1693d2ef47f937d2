"""Everything about an answer that a person should hear."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.errors import InputError
from advisor.hardware import Gpu, Host
from advisor.in_backward import cost_of_stepping_in_backward
from advisor.memory.lora import match_targets
from advisor.memory.resident import trained_elements
from advisor.plan import METHOD_LABELS
from advisor.profiles import ModelProfile, ModelSource, profile_of
from advisor.units import gib, short_count

if TYPE_CHECKING:
    from advisor.advise import MethodAdvice
    from advisor.plan import Plan
    from advisor.request import Request


def collect_warnings(
    model: ModelProfile, gpu: Gpu, parts: tuple[MethodAdvice, ...], request: Request, host: Host | None
) -> tuple[str, ...]:
    """Everything about this answer that a person should hear."""
    said = list(gpu.notes)
    if not model.launchable:
        said.append(f"{model.label} cannot be launched from here: {model.launch_note}")
    said += _model_cautions(parts[1].plan, model)
    if gpu.bfloat16 is False:
        said.append(f"{gpu.name} has no bfloat16: fp16 with gradient scaling, and fp32 weights wherever they train.")
    stepped = [part for part in parts if part.fits and part.plan.optimizer_in_backward]
    for part in stepped:
        cost = cost_of_stepping_in_backward(part.plan, request.effective_batch)
        said.append(f"Full fine-tuning fits only with the optimizer in backward: {cost}.")
    said += _host_warnings(parts, gpu, host)
    if gpu.backend not in ("cuda", "cpu"):
        said.append(f"Attention on {gpu.backend} is taken to need what it needs on CUDA; nobody checked that.")
    if gpu.context_provenance == "assumed":
        said.append(f"The context of {gib(gpu.context_bytes)} is assumed: nobody measured it on this GPU.")
    if parts[0].speed is None:
        said.append("The speed is unknown: no profile has this GPU's rates.")
    return tuple(dict.fromkeys(said))


def plan_cautions(plan: Plan, model: ModelProfile | None, gpu: Gpu) -> tuple[str, ...]:
    """What a person should hear of one plan that may be written by hand.

    Args:
        plan: the plan.
        model: its model; None where the closed form does not know it.
        gpu: what it is for.

    Raises:
        PlanError: targets that the closed form refuses.
    """
    said = _model_cautions(plan, model) if model is not None else []
    if gpu.bfloat16 is False and "bfloat16" in (plan.dtype, plan.autocast):
        said.append(
            f"{gpu.name} has no bfloat16: what this plan computes in it is emulated there, slowly, and a launch "
            'refuses it. Write "float16" in its place, or leave dtype and autocast out: they then follow the GPU.'
        )
    return tuple(said)


def known_cautions(plan: Plan, model: ModelSource, gpu: Gpu) -> tuple[str, ...]:
    """The same, as far as the closed form knows the model and its targets; who runs the code hears the rest."""
    try:
        return plan_cautions(plan, profile_of(model), gpu)
    except InputError:
        return plan_cautions(plan, None, gpu)


def _model_cautions(plan: Plan, model: ModelProfile) -> list[str]:
    """Where a plan goes beyond what the model, or its names, were made for."""
    arch, said = model.architecture, []
    if plan.seq_len > arch.max_positions:
        said.append(f"{model.label} was made for {arch.max_positions:,} tokens; {plan.seq_len:,} is beyond that.")
    if arch.window is not None and plan.seq_len >= arch.window:
        said.append(
            f"Sequences of {arch.window:,} tokens or more reach the sliding window, and flash attention is out."
        )
    if arch.vision_parameters:
        said.append("Only text is counted: the image tower is held frozen, and images would need more.")
    unmatched = match_targets(plan, arch)[1]
    if unmatched:
        names = ", ".join(linear.name for linear in arch.linears)
        trained = short_count(trained_elements(plan, arch))
        said.append(f"{', '.join(unmatched)} match nothing in {arch.model_type} ({names}): {trained} are trained.")
    return said


def _host_warnings(parts: tuple[MethodAdvice, ...], gpu: Gpu, host: Host | None) -> list[str]:
    """What this machine's disk and RAM cannot hold."""
    said = []
    largest = max((part.saved_bytes for part in parts if part.fits), default=0)
    if host is not None and host.disk_free_bytes is not None and host.disk_free_bytes < largest:
        said.append(
            f"What training leaves can take {gib(largest)}, and {gib(host.disk_free_bytes)} of disk is free here."
        )
    return said + _ram_warnings(parts, gpu, host)


def _ram_warnings(parts: tuple[MethodAdvice, ...], gpu: Gpu, host: Host | None) -> list[str]:
    spilling = [part for part in parts if part.fits and part.spilled_bytes]
    if not spilling:
        return []
    most = max(spilling, key=lambda part: part.spilled_bytes)
    spilled, method = most.spilled_bytes, METHOD_LABELS[most.method]
    available = host.ram_available_bytes if host and gpu.detected else None
    if available is None:
        return [f"The paged states of {method} need {gib(spilled)} of host RAM; whether it is there is not known."]
    if available < spilled:
        return [f"The paged states of {method} need {gib(spilled)} of host RAM, and only {gib(available)} is free."]
    return []


__all__ = ["collect_warnings", "known_cautions", "plan_cautions"]
