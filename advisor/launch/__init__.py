"""From a recommendation to a trained model: resolve, look before the leap, train, and report.

    resolve_advised, resolve_plan, resolve_resumed    what is said → `Launch`, with every problem raised at once
    train                                             `Launch` → `Attempt`: `accelerate launch` under supervision
    next_plan                                         what to try after one that ran out of memory

Nothing here imports torch: what needs it runs in a process of its own.
"""

from __future__ import annotations

from advisor.launch.attempt import Attempt, next_plan, start_over, train
from advisor.launch.resolve import Launch, Settings, fetch_weights, resolve_advised, resolve_plan
from advisor.launch.resume import resolve_resumed
from advisor.launch.stepdown import StepDown, step_down

__all__ = [
    "Attempt",
    "Launch",
    "Settings",
    "StepDown",
    "fetch_weights",
    "next_plan",
    "resolve_advised",
    "resolve_plan",
    "resolve_resumed",
    "start_over",
    "step_down",
    "train",
]
