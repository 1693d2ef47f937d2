"""What torch.profiler sees of a run on CPU tensors, and what the trace says of the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from advisor.memory.kernels import Cpu
from advisor.memory.trace.result import OUTSIDE_STEPS
from advisor.memory.trace.run import record
from advisor.plan import Plan
from advisor.probe.scratch import PRODUCTS, find_scratch

RANDOM_STATE_BYTES = 5056
"""Checkpointing keeps torch's CPU random state for each layer, made where no dispatch mode sees it."""


def profiled(run: Callable[[], object]) -> int:
    """Bytes above the start, at the highest point of a run on CPU tensors, without the scratch of matrix products."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    found = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    products = sorted((e.start_ns(), e.end_ns()) for e in found if e.name() in PRODUCTS)
    scratch = find_scratch(changes, products)
    return highest(change for index, (_, change) in enumerate(changes) if index not in scratch)


def traced_peak(plan: Plan, architecture: dict[str, Any]) -> int:
    events, _ = record(plan, architecture, Cpu(), steps=2)
    return highest(
        -event.allocation.nbytes if event.freed else event.allocation.nbytes
        for event in events
        if event.moment not in OUTSIDE_STEPS and not (event.freed and event.allocation.moment == "loading")
    )


def highest(changes: Iterable[int]) -> int:
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak
