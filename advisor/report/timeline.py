"""A trace as one HTML page: what is allocated, event by event, and what the peak consists of.

The page carries its data and its script, asks the network for nothing, and opens from disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from advisor import units
from advisor.report.history import COMPONENTS, Point, Replayed, Span, points_of, replay, spans_of
from advisor.report.language import language_of, listed, localise_label, speaking, spoken
from advisor.report.output import create_file
from advisor.report.page import breakable, embedded, fill, label, policy, read_part, shown_text
from advisor.report.tensors import TensorRow, group_tensors
from advisor.report.words import regime_words

if TYPE_CHECKING:
    from advisor.memory.trace import Trace

_LARGEST = 40
"""Rows of the table of what is alive at the peak."""

_LAYER = re.compile(r"backward of layer (\d+)")

_PHRASES = {
    "everything": "everything",
    "step": "step 7",
    "allocated": "7 allocated",
    "reserved_bytes": "7 reserved",
    "reserved": "reserved",
    "peak": "peak 7",
    "limit": "GPU 7",
    "limit_above": "GPU 7, above this scale",
    "failed": "out of memory: 7",
}
"""What the page's script says, with a 7 where it puts a value."""


def write_timeline(
    trace: Trace, path: str | os.PathLike[str], *, title: str, gpu_total_bytes: int | None = None
) -> None:
    """Write the page of a trace in the language that was asked for; a file that is there is never overwritten.

    Args:
        trace: what is shown.
        path: the HTML file.
        title: of the page, such as the plan in a few words.
        gpu_total_bytes: what a process may have on the GPU; None draws no limit and replays without one.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    with speaking(language_of(os.environ)):  # whatever characters the terminal has
        page = render_timeline(trace, title=title, gpu_total_bytes=gpu_total_bytes)
    create_file(path, page.encode())


def render_timeline(trace: Trace, *, title: str, gpu_total_bytes: int | None = None) -> str:
    """The page of a trace."""
    replayed = replay(trace.events, gpu_total_bytes, trace.regime)
    spans = spans_of(trace.events)
    points = points_of(trace.events, spans, replayed.reserved)
    data = _data(spans, points, replayed, gpu_total_bytes)
    style = read_part("colours.css") + read_part("timeline.css")
    script = read_part("timeline.js")
    peak = f"{units.size(trace.allocated_bytes)}, {localise_label(trace.at)}"
    values = {
        "lang": spoken(),
        "title": shown_text(title),
        "policy": policy(style, script),
        "style": style,
        "script": script,
        "summary": _summary(trace, replayed, gpu_total_bytes),
        "components": _component_rows(trace.components),
        "largest": _largest_rows(group_tensors(trace.largest)[:_LARGEST]),
        "largest-title": f"{label('Largest tensors at the peak')} ({shown_text(peak)})",
        "data": embedded(data),
    }
    return fill(read_part("timeline.html"), values)


def _data(
    spans: Sequence[Span], points: Sequence[Sequence[Point]], replayed: Replayed, total_bytes: int | None
) -> dict[str, Any]:
    """What the page's script draws from: columns, so that it stays small."""
    flat = [point for group in points for point in group]
    tensors: dict[tuple[Any, ...], int] = {}
    named = [[tensors.setdefault(_tensor(row), len(tensors)) for row in point.largest] for point in flat]
    trained = [index for span, group in zip(spans, _indices(points), strict=True) if span.step for index in group]
    totals = [sum(point.components) for point in flat]
    failed = replayed.failed
    return {
        "words": {
            "comma": listed(("", "")),
            **{name: localise_label(text).replace("7", "{0}") for name, text in _PHRASES.items()},
        },
        "components": [localise_label(name) for name in COMPONENTS],
        "spans": [
            {
                "moment": localise_label(span.moment),
                "stage": localise_label("layer backward" if _LAYER.fullmatch(span.moment) else span.moment),
                "layer": int(layer[1]) if (layer := _LAYER.fullmatch(span.moment)) else None,
                "step": span.step,
                "events": span.count,
                "points": len(group),
            }
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


def _indices(points: Sequence[Sequence[Point]]) -> list[range]:
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
    described = f"{kind.dtype} {kind.shape_text}"
    return row.number, kind.nbytes, COMPONENTS.index(kind.component), described, row.module, kind.operation


def _summary(trace: Trace, replayed: Replayed, total_bytes: int | None) -> str:
    facts = [
        ("Peak allocated", units.size(trace.allocated_bytes), trace.at),
        ("Peak reserved", units.size(max(replayed.reserved, default=0)), regime_words(trace.regime)),
        ("Parameters", units.short_count(trace.total_parameters), f"{units.count(trace.trainable_parameters)} trained"),
    ]
    if total_bytes is not None:
        facts.append(("GPU", units.size(total_bytes), "what a process may have"))
    if replayed.failed is not None:
        asked = units.size(replayed.failed.allocation.nbytes)
        facts.append(("Out of memory", asked, f"could not be had at {replayed.failed.moment}"))
    return "\n".join(
        f"<div><dt>{label(name)}</dt><dd><strong>{shown_text(value)}</strong> <span>{label(note)}</span></dd></div>"
        for name, value, note in facts
    )


def _component_rows(components: Mapping[str, int]) -> str:
    return "\n".join(
        f'<tr><th scope="row"><span class="swatch c{index}"></span>{label(name)}</th>'
        f'<td>{units.size(components.get(name, 0))}</td><td data-here="{index}"></td></tr>'
        for index, name in reversed(list(enumerate(COMPONENTS)))
    )


def _module(row: TensorRow) -> str:
    """A module's name, or a thread in the page's language."""
    return localise_label(row.module) if " " in row.module else row.module


def _largest_rows(rows: Iterable[TensorRow]) -> str:
    return "\n".join(
        f"<tr><td>{units.size(row.total_bytes)}</td><td>{row.number}</td><td>{units.size(row.kind.nbytes)}</td>"
        f"<td>{row.kind.shape_text}</td><td>{shown_text(row.kind.dtype)}</td><td>{label(row.kind.component)}</td>"
        f"<td>{breakable(_module(row))}</td><td>{breakable(row.kind.operation)}</td><td>{label(row.moment)}</td></tr>"
        for row in rows
    )
