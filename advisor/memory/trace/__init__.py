"""Run the real training step on tensors that have shapes but no storage, and add up what would be alive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from advisor.memory.kernels import hardware_of
from advisor.memory.trace.imports import collection_paused
from advisor.memory.trace.result import Allocation, Component, Event, Trace

if TYPE_CHECKING:
    from advisor.memory.kernels import Gpu
    from advisor.memory.regime import Regime
    from advisor.plan import Plan


def trace(
    plan: Plan,
    architecture: Mapping[str, Any],
    *,
    gpu: Gpu | None = None,
    capability: tuple[int, int] | None = None,
    steps: int = 2,
    regime: Regime | None = None,
    progress: Callable[[str], None] | None = None,
) -> Trace:
    """Trace the making of a model and `steps` optimizer steps.

    Args:
        plan: what is trained, and how.
        architecture: the keys of a config.json.
        gpu: whose kernels run; by default one of `capability`, by default (8, 0).
        capability: short for a Gpu of that compute capability.
        steps: optimizer steps; the second has the optimizer's states.
        regime: how the allocator is run; by default as what runs such a plan does it.
        progress: called with the name of what begins: building, loading, step 1, step 2, ..., replay.

    Raises:
        InputError: the plan or the architecture cannot be used.
        EnvironmentLacksError: an operation cannot be traced; it is named.
    """
    tell = progress or (lambda _: None)
    tell("building")
    from advisor.memory.kernels import Gpu as AnyGpu
    from advisor.memory.regime import regime_of

    with collection_paused():  # it imports torch
        from advisor.memory.trace.run import record, summarize

    gpu = gpu or AnyGpu(capability=capability or (8, 0))
    events, built = record(plan, architecture, gpu, steps, tell)
    tell("replay")
    return summarize(events, built, gpu, regime or regime_of(plan))


__all__ = ["Allocation", "Component", "Event", "Trace", "hardware_of", "trace"]
