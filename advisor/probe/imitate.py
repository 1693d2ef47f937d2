"""A smaller GPU's plan, rehearsed on a larger one: what is held back, and what cannot be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from advisor.errors import InputError, PlanError
from advisor.hardware import Gpu, what_if
from advisor.plan import Plan
from advisor.profiles import GpuProfile, load_gpu
from advisor.units import gib, parse_size

FIRST_WITH_FLASH = (8, 0)
"""torch's flash attention and cuDNN's need Ampere. Source: transformers/cuda/sdp_utils.cpp (check_sm_version)."""

_OF_A_KIND = 0.97
"""A card may have that much less than its profile says, for another driver keeps more for itself; assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imitation:
    """How one GPU stands in for another."""

    name: str
    gpu: Gpu
    """The GPU that is imitated, for predictions and for what fits."""

    cap_bytes: int
    """What its tensors may take."""

    without_flash: bool
    not_imitated: tuple[str, ...]
    """A sentence each."""


def imitate(text: str, host: Gpu) -> Imitation:
    """How a GPU of this machine, or its processor, stands in for one that is named.

    Args:
        text: a profile's name, or an amount of memory such as 12GiB.
        host: what really runs.

    Raises:
        UnknownNameError: no such GPU.
        InputError: it is larger than the one that is here, or of another vendor.
    """
    profile = None if text.strip()[:1].isdigit() else load_gpu(text)
    imitated = what_if(profile) if profile is not None else _of_size(host, parse_size(text))
    cap = imitated.total_bytes - imitated.context_bytes
    room = host.total_bytes - host.others_bytes - host.context_bytes
    if _is_itself(profile, host) and room >= cap * _OF_A_KIND:
        cap = min(cap, room)
    if profile is not None and profile.backend != "cuda":
        raise InputError(f"A {imitated.name} cannot be imitated.", why="Its kernels are not CUDA's.")
    if cap <= 0:
        raise InputError(f"{gib(imitated.total_bytes)} is no more than the context takes.", hint="Name a larger GPU.")
    if cap > room:
        raise InputError(
            f"{host.name} cannot stand in for {imitated.name}.",
            why=f"That would take {gib(cap)} for tensors, and {gib(room)} is free here.",
            hint="Free the GPU, or trace the plan instead: phi3-advise trace --plan FILE --gpu NAME",
        )
    capability = imitated.capability
    return Imitation(
        name=profile.name if profile is not None else text.strip(),
        gpu=imitated,
        cap_bytes=cap,
        without_flash=capability is not None and capability < FIRST_WITH_FLASH,
        not_imitated=_not_imitated(profile, host),
    )


def _is_itself(profile: GpuProfile | None, host: Gpu) -> bool:
    return profile is not None and host.profile is not None and host.profile.name == profile.name


def _of_size(host: Gpu, total_bytes: int) -> Gpu:
    """The same device with less memory."""
    smaller = what_if(None, vram_bytes=total_bytes, base=replace(host, notes=()))
    return replace(smaller, notes=())


def _not_imitated(profile: GpuProfile | None, host: Gpu) -> tuple[str, ...]:
    if profile is None or _is_itself(profile, host):
        return ()
    said = [
        f"Speed is {host.name}'s, not {profile.product}'s.",
        f"The context is taken from the profile: {gib(profile.context_bytes)} ({profile.context_provenance}).",
    ]
    if host.backend != "cuda":
        said.append(f"Kernels are {host.name}'s: what they allocate inside is not what {profile.product}'s do.")
    elif host.capability != profile.capability:
        said.append(
            "cuBLAS workspaces, bitsandbytes' choice of kernels and every kernel's own scratch memory follow the "
            "compute capability that is really here."
        )
    return tuple(said)


def refuse_what_it_lacks(plan: Plan, imitation: Imitation) -> None:
    """A plan that the imitated GPU could not run is no rehearsal.

    Raises:
        PlanError: the field, and what to write instead.
    """
    if imitation.gpu.bfloat16 is False and "bfloat16" in (plan.dtype, plan.autocast):
        field = "dtype" if plan.dtype == "bfloat16" else "autocast"
        raise PlanError(
            field,
            f"{imitation.gpu.name} has no bfloat16",
            why="torch only emulates it there, slowly.",
            hint='Leave dtype and autocast out of the plan, or write autocast = "float16" and a dtype to suit.',
        )
    if imitation.without_flash and plan.attention == "flash_attention_2":
        raise PlanError(
            "attention", f"flash_attention_2 does not run on {imitation.gpu.name}", hint='Write attention = "sdpa".'
        )


__all__ = ["Imitation", "imitate", "refuse_what_it_lacks"]
