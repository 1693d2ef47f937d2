"""A trace as a history: what is alive after each of its events, thinned to what a chart can show."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from advisor.memory.allocator import CachingAllocator
from advisor.memory.trace.replayed import walk
from advisor.report.tensors import Kind, TensorRow, kind_of, row_of

if TYPE_CHECKING:
    from advisor.memory.ledger import Component
    from advisor.memory.regime import Regime
    from advisor.memory.trace import Allocation, Event

COMPONENTS: tuple[Component, ...] = (
    *("weights", "quantization", "adapters", "optimizer"),
    *("gradients", "activations", "logits", "workspace"),
)
"""As they are stacked: what stays longest at the bottom."""

_RESIDENT = frozenset({"weights", "quantization", "adapters", "optimizer"})

POINTS = 2000
"""What all events are thinned to, about; each point is the highest of the events that it stands for."""

_FEWEST_POINTS = 24
"""For one moment, if it has as many events: the loss has few and often holds the peak."""

_SHOWN_TENSORS = 6
"""Rows for each point."""


@dataclass(slots=True)
class Span:
    """Consecutive events of one moment."""

    moment: str
    step: int
    """The optimizer step, from 1; 0 is loading."""

    first: int
    count: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """What is alive after the highest of a few consecutive events."""

    event: int
    components: tuple[int, ...]
    reserved_bytes: int | None
    largest: tuple[TensorRow, ...]


@dataclass(slots=True)
class Replayed:
    """Reserved bytes after each event, as far as the GPU's memory lasts."""

    reserved: list[int] = field(default_factory=list)
    failed: Event | None = None


def replay(events: Sequence[Event], total_bytes: int | None, regime: Regime) -> Replayed:
    """Reserved bytes, event by event, on a GPU that has `total_bytes` for tensors; None is no limit."""
    allocator = CachingAllocator(total_bytes=total_bytes, expandable=regime.expandable)
    replayed = Replayed()
    for event, block in walk(events, allocator, empties_cache=regime.empties_cache):
        if block is None:
            replayed.failed = event
            break
        replayed.reserved.append(allocator.reserved_bytes)
    return replayed


def spans_of(events: Sequence[Event]) -> list[Span]:
    """Runs of equal moments; a forward after an optimizer step, or after loading, begins a step."""
    spans: list[Span] = []
    for index, event in enumerate(events):
        if not spans or spans[-1].moment != event.moment:
            before = spans[-1] if spans else None
            step = before.step if before else 0
            if event.moment == "forward" and before is not None and before.moment in {"loading", "optimizer step"}:
                step += 1
            spans.append(Span(event.moment, step, index))
        spans[-1].count += 1
    return spans


def points_of(
    events: Sequence[Event],
    spans: Sequence[Span],
    reserved: Sequence[int],
    *,
    shown: Sequence[Span] | None = None,
    number: int = POINTS,
) -> list[list[Point]]:
    """The points of each span that is shown.

    Args:
        events: everything that happened.
        spans: all of `spans_of(events)`.
        reserved: after each event, as far as it is known.
        shown: those of `spans` that are thinned to points; all by default.
        number: of points, about.
    """
    shown = spans if shown is None else shown
    totals = _totals(events)
    share = number / sum(_width(span) for span in shown) if shown else 0.0
    chosen = []
    for span in shown:
        wanted = min(span.count, max(_FEWEST_POINTS, round(_width(span) * share)))
        edges = [span.first + span.count * part // wanted for part in range(wanted + 1)]
        pairs = pairwise(edges)
        chosen.append([(max(range(start, end), key=totals.__getitem__), start, end) for start, end in pairs])
    states = _states_after(events, spans, {event for points in chosen for event, _, _ in points})
    return [
        [
            Point(event, states[event][0], max(reserved[start:end], default=None), states[event][1])
            for event, start, end in points
        ]
        for points in chosen
    ]


def _width(span: Span) -> float:
    return drawn_width(span.count)


def drawn_width(events: int) -> float:
    """By the cube root, a loss of 15 operations can be seen beside a forward of 4,000."""
    width: float = events ** (1 / 3)
    return width


def _totals(events: Sequence[Event]) -> list[int]:
    """Allocated bytes after each event."""
    totals: list[int] = []
    alive = 0
    for event in events:
        size = event.allocation.size_bytes
        alive += -size if event.freed else size
        totals.append(alive)
    return totals


class _Alive:
    """What is alive: bytes by component, and tensors by kind.

    Weights and states that were there before the step are left out of the kinds: they are largest at all times.
    """

    def __init__(self) -> None:
        self.sizes = dict.fromkeys(COMPONENTS, 0)
        self._kinds: dict[Kind, dict[int, Allocation]] = {}

    def take(self, event: Event) -> None:
        allocation = event.allocation
        size = allocation.size_bytes
        self.sizes[allocation.component] += -size if event.freed else size
        members = self._kinds.setdefault(kind_of(allocation), {})
        if event.freed:
            members.pop(id(allocation), None)
        else:
            members[id(allocation)] = allocation

    def begin_step(self) -> None:
        self._kinds = {kind: members for kind, members in self._kinds.items() if kind.component not in _RESIDENT}

    def largest(self) -> tuple[TensorRow, ...]:
        rows = (row_of(kind, list(members.values())) for kind, members in self._kinds.items() if members)
        return tuple(heapq.nlargest(_SHOWN_TENSORS, rows, key=lambda row: row.total_bytes))


def _states_after(
    events: Sequence[Event], spans: Sequence[Span], wanted: set[int]
) -> dict[int, tuple[tuple[int, ...], tuple[TensorRow, ...]]]:
    """Bytes by component, and the largest tensors, after each wanted event."""
    alive = _Alive()
    states: dict[int, tuple[tuple[int, ...], tuple[TensorRow, ...]]] = {}
    step = 0
    for span in spans:
        if span.step > step:
            step = span.step
            alive.begin_step()
        for index in range(span.first, span.first + span.count):
            alive.take(events[index])
            if index in wanted:
                states[index] = tuple(alive.sizes.values()), alive.largest()
    return states
