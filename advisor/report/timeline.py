"""A trace as one HTML page: what is allocated, event by event, and what the peak consists of.

The page carries its data and its script, asks the network for nothing, and opens from disk.
"""

from __future__ import annotations

import heapq
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from advisor import units
from advisor.memory.allocator import CachingAllocator, rounded
from advisor.memory.trace.replayed import walk
from advisor.report.output import replace_file
from advisor.report.tensors import Kind, TensorRow, group_tensors, kind_of, row_of

if TYPE_CHECKING:
    from advisor.memory.trace import Allocation, Event, Trace

COMPONENTS = ("weights", "quantization", "adapters", "optimizer", "gradients", "activations", "logits", "workspace")
"""As they are stacked: what stays longest at the bottom."""

_RESIDENT = frozenset({"weights", "quantization", "adapters", "optimizer"})

_PLACEHOLDER = re.compile(r"\{\{([a-z-]+)\}\}")

_POINTS = 2000
"""What all events are thinned to, about; each point is the highest of the events that it stands for."""

_FEWEST_POINTS = 24
"""For one moment, if it has as many events: the loss has few and often holds the peak."""

_SHOWN_TENSORS = 6
"""Rows for each point."""

_LARGEST = 40
"""Rows of the table of what is alive at the peak."""


@dataclass(slots=True)
class _Span:
    """Consecutive events of one moment."""

    moment: str
    step: int
    """The optimizer step, from 1; 0 is loading."""

    first: int
    count: int = 0


@dataclass(frozen=True, slots=True)
class _Point:
    """What is alive after the highest of a few consecutive events."""

    event: int
    components: tuple[int, ...]
    reserved_bytes: int | None
    largest: tuple[TensorRow, ...]


@dataclass(slots=True)
class _Replayed:
    """Reserved bytes after each event, as far as the GPU's memory lasts."""

    reserved: list[int] = field(default_factory=list)
    failed: Event | None = None


def write_timeline(
    trace: Trace,
    path: str | os.PathLike[str],
    *,
    title: str,
    gpu_total_bytes: int | None = None,
    empties_cache: bool = True,
) -> None:
    """Write the page of a trace.

    Args:
        trace: what is shown.
        path: the HTML file; a file that is there is replaced.
        title: of the page, such as the plan in a few words.
        gpu_total_bytes: what a process may have on the GPU; None draws no limit and replays without one.
        empties_cache: as it was for the trace.

    Raises:
        InputError: the file cannot be written.
    """
    replayed = _replay(trace.events, gpu_total_bytes, empties_cache=empties_cache)
    spans = _spans(trace.events)
    points = _points(trace.events, spans, replayed.reserved)
    data = _data(spans, points, replayed, gpu_total_bytes)
    page = _fill(
        resources.files("advisor.report").joinpath("timeline.html").read_text(encoding="utf-8"),
        {
            "title": escape(title),
            "summary": _summary(trace, replayed, gpu_total_bytes),
            "components": _component_rows(trace.components),
            "largest": _largest_rows(group_tensors(trace.largest)[:_LARGEST]),
            "peak": escape(f"{units.size(trace.allocated_bytes)}, {trace.at}"),
            "data": _embedded(data),
        },
    )
    replace_file(path, page.encode())


def _replay(events: Sequence[Event], total_bytes: int | None, *, empties_cache: bool) -> _Replayed:
    allocator = CachingAllocator(total_bytes=total_bytes)
    replayed = _Replayed()
    for event, block in walk(events, allocator, empties_cache=empties_cache):
        if block is None:
            replayed.failed = event
            break
        replayed.reserved.append(allocator.reserved_bytes)
    return replayed


def _spans(events: Sequence[Event]) -> list[_Span]:
    """Runs of equal moments; a forward after an optimizer step, or after loading, begins a step."""
    spans: list[_Span] = []
    for index, event in enumerate(events):
        if not spans or spans[-1].moment != event.moment:
            before = spans[-1] if spans else None
            step = before.step if before else 0
            if event.moment == "forward" and before is not None and before.moment in {"loading", "optimizer step"}:
                step += 1
            spans.append(_Span(event.moment, step, index))
        spans[-1].count += 1
    return spans


def _points(events: Sequence[Event], spans: Sequence[_Span], reserved: Sequence[int]) -> list[list[_Point]]:
    """The points of each span."""
    totals = _totals(events)
    share = _POINTS / sum(_width(span) for span in spans) if spans else 0.0
    chosen = []
    for span in spans:
        wanted = min(span.count, max(_FEWEST_POINTS, round(_width(span) * share)))
        edges = [span.first + span.count * part // wanted for part in range(wanted + 1)]
        pairs = pairwise(edges)
        chosen.append([(max(range(start, end), key=totals.__getitem__), start, end) for start, end in pairs])
    states = _states(events, spans, {event for points in chosen for event, _, _ in points})
    return [
        [
            _Point(event, states[event][0], max(reserved[start:end], default=None), states[event][1])
            for event, start, end in points
        ]
        for points in chosen
    ]


def _width(span: _Span) -> float:
    """By the cube root, a loss of 15 operations can be seen beside a forward of 4,000."""
    width: float = span.count ** (1 / 3)
    return width


def _totals(events: Sequence[Event]) -> list[int]:
    """Allocated bytes after each event."""
    totals: list[int] = []
    alive = 0
    for event in events:
        size = rounded(event.allocation.nbytes)
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
        size = rounded(allocation.nbytes)
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


def _states(
    events: Sequence[Event], spans: Sequence[_Span], wanted: set[int]
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


def _data(
    spans: Sequence[_Span], points: Sequence[Sequence[_Point]], replayed: _Replayed, total_bytes: int | None
) -> dict[str, Any]:
    """What the page's script draws from: columns, so that it stays small."""
    flat = [point for group in points for point in group]
    tensors: dict[tuple[Any, ...], int] = {}
    named = [[tensors.setdefault(_tensor(row), len(tensors)) for row in point.largest] for point in flat]
    trained = [index for span, group in zip(spans, _indices(points), strict=True) if span.step for index in group]
    totals = [sum(point.components) for point in flat]
    failed = replayed.failed
    return {
        "components": COMPONENTS,
        "spans": [
            {"moment": span.moment, "step": span.step, "events": span.count, "points": len(group)}
            for span, group in zip(spans, points, strict=True)
        ],
        "event": [point.event for point in flat],
        "allocated": [[point.components[index] for point in flat] for index in range(len(COMPONENTS))],
        "reserved": [point.reserved_bytes for point in flat],
        "largest": named,
        "tensors": list(tensors),
        "peak": max(trained or range(len(flat)), key=totals.__getitem__, default=None),
        "gpu_total": total_bytes,
        "failed": None if failed is None else {"event": len(replayed.reserved), "bytes": failed.allocation.nbytes},
    }


def _indices(points: Sequence[Sequence[_Point]]) -> list[range]:
    """The place of each span's points among all."""
    ranges: list[range] = []
    start = 0
    for group in points:
        ranges.append(range(start, start + len(group)))
        start += len(group)
    return ranges


def _tensor(row: TensorRow) -> tuple[Any, ...]:
    """Number, bytes of each, component, dtype and shape, module, operation."""
    kind = row.kind
    described = f"{kind.dtype} {_shape(kind.shape)}"
    return row.number, kind.nbytes, COMPONENTS.index(kind.component), described, row.module, kind.operation


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _summary(trace: Trace, replayed: _Replayed, total_bytes: int | None) -> str:
    facts = [
        ("Peak allocated", units.size(trace.allocated_bytes), f"in {trace.at}"),
        ("Peak reserved", units.size(max(replayed.reserved, default=0)), "default allocator"),
        ("With expandable segments", units.size(trace.reserved_expandable_bytes), "peak reserved"),
        ("Parameters", units.short_count(trace.total_parameters), f"{units.count(trace.trainable_parameters)} trained"),
    ]
    if total_bytes is not None:
        facts.append(("GPU", units.size(total_bytes), "what a process may have"))
    if replayed.failed is not None:
        asked = units.size(replayed.failed.allocation.nbytes)
        facts.append(("Out of memory", asked, f"could not be had in {replayed.failed.moment}"))
    return "\n".join(
        f"<div><dt>{escape(name)}</dt><dd><strong>{escape(value)}</strong> <span>{escape(note)}</span></dd></div>"
        for name, value, note in facts
    )


def _component_rows(components: Mapping[str, int]) -> str:
    return "\n".join(
        f'<tr><th scope="row"><span class="swatch c{index}"></span>{name}</th>'
        f'<td>{units.size(components.get(name, 0))}</td><td data-here="{index}"></td></tr>'
        for index, name in reversed(list(enumerate(COMPONENTS)))
    )


def _largest_rows(rows: Iterable[TensorRow]) -> str:
    return "\n".join(
        f"<tr><td>{units.size(row.total_bytes)}</td><td>{row.number}</td><td>{units.size(row.kind.nbytes)}</td>"
        f"<td>{_shape(row.kind.shape)}</td><td>{escape(row.kind.dtype)}</td><td>{escape(row.kind.component)}</td>"
        f"<td>{_breakable(row.module)}</td><td>{_breakable(row.kind.operation)}</td><td>{escape(row.moment)}</td></tr>"
        for row in rows
    )


def _breakable(name: str) -> str:
    """Escaped, with places to break the line after each dot."""
    return escape(name).replace(".", ".<wbr>")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Each {{name}} by its value, in one pass: a value's own braces stay what they are."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)
