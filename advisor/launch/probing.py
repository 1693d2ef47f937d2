"""Where the dry run on the device hooks in: after the preflight, before the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from advisor.launch.resolve import Launch, Progress
from advisor.launch.stepdown import StepDown


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


Probe = Callable[[Launch, Progress], Probed]

probe: Probe | None = None
"""The dry run; None where there is none: the run then starts unmeasured, and says so."""


__all__ = ["Probe", "Probed", "probe"]
