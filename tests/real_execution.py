"""What torch.profiler sees of a run on CPU tensors, and what the trace says of the same one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

from advisor.memory.kernels import Cpu
from advisor.memory.trace.result import OUTSIDE_STEPS
from advisor.memory.trace.run import record
from advisor.plan import Plan

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")

RANDOM_STATE_BYTES = 5056
"""Checkpointing keeps torch's CPU random state for each layer, made where no dispatch mode sees it."""


def profiled(run: Callable[[], object]) -> int:
    """Bytes above the start, at the highest point of a run on CPU tensors.

    Without what a matrix product takes and gives back before it ends: oneDNN's scratch, whose size depends on the
    processor's instructions and on its cores, and which some processors' kernels do without.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    found = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    products = sorted((e.start_ns(), e.end_ns()) for e in found if e.name() in PRODUCTS)
    return highest(without_scratch(changes, products))


def without_scratch(changes: list[tuple[int, int]], products: list[tuple[int, int]]) -> Iterator[int]:
    """The bytes of each change, but for those taken and given back inside one product; both are in order of time."""
    starts = [start for start, _ in products]
    inside: dict[int, list[int]] = {}
    for index, (time, _) in enumerate(changes):
        product = bisect_right(starts, time) - 1
        if product >= 0 and time <= products[product][1]:
            inside.setdefault(product, []).append(index)
    scratch: set[int] = set()
    for indices in inside.values():
        for index in indices:
            freed = changes[index][1]
            taken = [i for i in indices if i < index and changes[i][1] == -freed and i not in scratch]
            if freed < 0 and taken:
                scratch |= {taken[-1], index}
    return (change for index, (_, change) in enumerate(changes) if index not in scratch)


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
