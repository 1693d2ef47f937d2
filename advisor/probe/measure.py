"""A plan on a device of this machine → what a probe measured, kept for later answers."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from advisor.errors import EnvironmentLacksError
from advisor.hardware import Gpu
from advisor.launch.command import torch_device, training_environment
from advisor.plan import Plan
from advisor.probe.imitate import Imitation, refuse_what_it_lacks
from advisor.probe.measurement import Measurement, ProbeRequest, model_fingerprint
from advisor.probe.process import TIMEOUT_SECONDS, probe
from advisor.probe.results import KEPT, STATE_VARIABLE, keep, state_folder
from advisor.profiles import ModelSource
from advisor.units import gib

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is probed, and how; plans come and go."""

    model: ModelSource
    gpu: Gpu
    """What really runs."""

    imitation: Imitation | None = None
    steps: int = 3
    longest: int | None = None
    """Tokens of the data's longest row."""

    saves: bool = True
    cap_bytes: int | None = None
    """The most that tensors may take; None is whatever there is."""

    timeout_seconds: float = TIMEOUT_SECONDS

    @property
    def target(self) -> Gpu:
        """The GPU that the answer is about."""
        return self.gpu if self.imitation is None else self.imitation.gpu


def measure(plan: Plan, subject: Subject, progress: Progress = lambda _: None) -> Measurement:
    """Probes one plan in a process of its own.

    Raises:
        PlanError: the imitated GPU could not run it.
        EnvironmentLacksError: no process can be started, or nothing can be written.
    """
    if subject.imitation is not None:
        refuse_what_it_lacks(plan, subject.imitation)
    request = request_of(plan, subject)
    environment = training_environment(subject.gpu)
    try:
        found = probe(request, environment, timeout_seconds=subject.timeout_seconds, progress=progress)
    except OSError as error:
        raise EnvironmentLacksError(
            "No probe can be started.",
            why=str(error),
            hint=f"Free some disk under {state_folder()}, or name another folder: {STATE_VARIABLE}.",
        ) from error
    found = without_spill(found, subject.gpu, spills=spills_to_host())
    driver = {"driver": subject.gpu.driver} if subject.gpu.driver else {}
    found = replace(
        found,
        model=model_fingerprint(subject.model.config),
        device_name=subject.gpu.name,
        as_gpu=subject.imitation.name if subject.imitation is not None else None,
        versions={**found.versions, **driver},
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    if subject.cap_bytes is None and keep(found) is None and found.outcome in KEPT:
        said = f"The result could not be kept in {state_folder()}: later advice here will not know of it."
        found = replace(found, notes=(*found.notes, said))
    return found


def request_of(plan: Plan, subject: Subject) -> ProbeRequest:
    """What the process is asked."""
    imitation = subject.imitation
    return ProbeRequest(
        plan=plan,
        architecture=subject.model.config,
        device=torch_device(subject.gpu),
        uuid=subject.gpu.uuid if subject.gpu.backend == "cuda" else None,
        steps=subject.steps,
        longest=subject.longest,
        cap_bytes=subject.cap_bytes if subject.cap_bytes is not None else _cap(subject.gpu, imitation),
        without_flash=imitation is not None and imitation.without_flash,
        saves=subject.saves,
    )


def _cap(gpu: Gpu, imitation: Imitation | None) -> int | None:
    """What tensors may take, where nothing else stops them in time.

    A GPU on Linux refuses by itself. The driver on Windows fills the host's RAM instead, and Linux fills its own RAM
    until it kills somebody.
    """
    if imitation is not None:
        return imitation.cap_bytes
    if gpu.backend == "cpu" or (gpu.backend == "cuda" and spills_to_host()):
        return max(1, gpu.total_bytes - gpu.others_bytes - gpu.context_bytes)
    return None


def spills_to_host() -> bool:
    """Whether the driver moves what does not fit to the host's RAM: on Windows it does, and so under WSL."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()


def without_spill(found: Measurement, gpu: Gpu, *, spills: bool) -> Measurement:
    """A peak above the card's dedicated memory is out of memory, even if the driver let it run in the host's RAM."""
    if not spills or gpu.backend != "cuda" or found.outcome != "ran" or found.reserved_bytes is None:
        return found
    context = found.context_bytes if found.context_bytes is not None else gpu.context_bytes
    needed = found.reserved_bytes + context
    if needed <= gpu.total_bytes - gpu.others_bytes:
        return found
    there = gpu.total_bytes - gpu.others_bytes
    message = (
        f"It ran, but {gib(needed)} is more than the {gib(there)} of dedicated memory that is free: "
        "the driver moved the rest to the host's RAM, which is many times slower."
    )
    return replace(found, outcome="out_of_memory", message=message, failed_at=found.at)


__all__ = ["Progress", "Subject", "measure", "request_of", "spills_to_host", "without_spill"]
