"""One step of training as a chart that is drawn without a script, and what is alive at each of its points."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advisor.memory.trace.result import OUTSIDE_STEPS
from advisor.report.history import COMPONENTS, Point, Span, drawn_width, points_of, replay, spans_of
from advisor.report.language import listed, localise_label
from advisor.report.page import label, shown_text
from advisor.report.tensors import TensorRow, without_wrapper
from advisor.report.words import short_operation
from advisor.units import GIB, MIB, gib, size

if TYPE_CHECKING:
    from advisor.traced import TracedPlan

PLOT_TOP, PLOT_HEIGHT = 30, 300
PLOT_BOTTOM = PLOT_TOP + PLOT_HEIGHT
LABEL_ROOM = 104
"""For slanted labels."""

_POINTS = 500
_PATH_WIDTH = 10_000
"""Units of the areas' own coordinates, which are stretched to the plot."""

_LAYER = re.compile(r"backward of layer (\d+)")


@dataclass(slots=True, kw_only=True)
class Stage:
    """Consecutive moments that share a label."""

    name: str
    number: int
    """Of the forward that it belongs to, from 0."""

    moments: list[str]
    """Of each point."""

    points: list[Point]
    events: int
    left: float = 0.0
    width: float = 0.0
    """Shares of the plot's width."""

    @property
    def title(self) -> str:
        """With the layers that it goes through, in their order."""
        layers = [match[1] for moment in dict.fromkeys(self.moments) if (match := _LAYER.fullmatch(moment))]
        if not layers:
            return self.name
        return f"{self.name}, {layers[0]}" + (f" to {layers[-1]}" if len(layers) > 1 else "")

    @property
    def peak(self) -> Point:
        """The highest of its points."""
        return max(self.points, key=lambda point: sum(point.components))


@dataclass(slots=True, kw_only=True)
class Step:
    """The last step of a trace, whose optimizer has its states."""

    stages: list[Stage]
    room_bytes: int | None
    """What the GPU has for tensors."""

    @property
    def points(self) -> list[Point]:
        """All of them, in order."""
        return [point for stage in self.stages for point in stage.points]

    @property
    def peak(self) -> Point:
        """The highest of all."""
        return max(self.points, key=lambda point: sum(point.components))

    @property
    def highest_bytes(self) -> int:
        """Allocated or reserved."""
        return max(max(sum(point.components), point.reserved_bytes or 0) for point in self.points)

    def named(self, stage: Stage, moment: str = "") -> str:
        """A stage's title, or one of its moments, with its micro-batch where there are two; in the page's language."""
        name, pass_name = localise_label(moment or stage.title), self.pass_name(stage)
        if not pass_name:
            return name
        noted = localise_label(f"({pass_name})")
        return f"{name} {noted}" if noted.startswith("(") else name + noted

    def pass_name(self, stage: Stage) -> str:
        """Which micro-batch a stage is part of; empty for the optimizer step, or where there is but one."""
        passes = 1 + max(other.number for other in self.stages)
        if passes == 1 or stage.name == "optimizer step":
            return ""
        return "first micro-batch" if stage.number == 0 else "last micro-batch"


def read_step(traced: TracedPlan) -> Step:
    """The last step of a trace, thinned to what can be drawn."""
    run = traced.trace
    room = traced.survival.room_bytes if traced.survival else None
    spans = spans_of(run.events)
    last = max(span.step for span in spans)
    shown = [span for span in spans if span.step == last and span.moment not in OUTSIDE_STEPS]
    reserved = replay(run.events, None, run.regime).reserved
    points = points_of(run.events, spans, reserved, shown=shown, number=_POINTS)
    stages = _stages(shown, points)
    whole = sum(drawn_width(stage.events) for stage in stages)
    left = 0.0
    for stage in stages:
        stage.left, stage.width = left, drawn_width(stage.events) / whole
        left += stage.width
    return Step(stages=stages, room_bytes=room)


def _stages(spans: Sequence[Span], points: Sequence[list[Point]]) -> list[Stage]:
    stages: list[Stage] = []
    number = -1
    for span, group in zip(spans, points, strict=True):
        number += span.moment == "forward"
        name = "layer backward" if _LAYER.fullmatch(span.moment) else span.moment
        if stages and (stages[-1].name, stages[-1].number) == (name, number):
            stages[-1].moments += [span.moment] * len(group)
            stages[-1].points += group
            stages[-1].events += span.count
        else:
            stages.append(
                Stage(name=name, number=number, moments=[span.moment] * len(group), points=group, events=span.count)
            )
    return stages


def top_of(step: Step) -> int:
    """The top of the scale: the room for tensors where it is near enough to be seen beside what is used."""
    highest = step.highest_bytes
    if step.room_bytes is not None and step.room_bytes <= 2 * highest:
        highest = max(highest, step.room_bytes)
    return max(1, int(1.06 * highest))


def edges_of(step: Step) -> list[float]:
    """Where each point begins, as a share of the plot's width, and where the last one ends."""
    edges = [
        stage.left + stage.width * index / len(stage.points)
        for stage in step.stages
        for index in range(len(stage.points))
    ]
    return [*edges, 1.0]


def draw_plot(step: Step) -> str:
    """The plot: areas by component, the reserved line, the room, the moments, the peak."""
    top = top_of(step)
    stretched = f'viewBox="0 0 {_PATH_WIDTH} {PLOT_HEIGHT}" preserveAspectRatio="none"'
    parts = [
        *_bands(step),
        *_grid(top),
        f'<svg y="{PLOT_TOP}" width="100%" height="{PLOT_HEIGHT}" {stretched}>',
        *_areas(step, top),
        _reserved_line(step, top),
        "</svg>",
        *_labels(step),
        *_room(step, top),
        *_peak_mark(step, top),
        f'<rect id="cursor" visibility="hidden" width="2" y="{PLOT_TOP}" height="{PLOT_HEIGHT}"/>',
        *_targets(step),
    ]
    return "\n".join(parts)


def draw_scale(step: Step) -> str:
    """The numbers beside the plot."""
    return "\n".join(
        f'<text class="quiet" x="100%" y="{height + 4:.1f}" text-anchor="end">{label}</text>'
        for height, label in _ticks(top_of(step))
    )


def _height(size_bytes: float, top: int) -> float:
    return PLOT_TOP + PLOT_HEIGHT * (1 - size_bytes / top)


def _ticks(top: int) -> list[tuple[float, str]]:
    unit, name = (GIB, "GiB") if top >= GIB else (MIB, "MiB")
    rough = top / unit / 6
    power = 10.0 ** (len(f"{int(rough)}") - 1) if rough >= 1 else 10.0 ** -len(f"{int(1 / rough)}")
    apart = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= rough)
    number = int(top / unit / apart)
    return [
        (_height(index * apart * unit, top), f"{index * apart:g}" + (f" {name}" if index == number else ""))
        for index in range(number + 1)
    ]


def _bands(step: Step) -> Iterable[str]:
    for index, stage in enumerate(step.stages):
        if index % 2:
            yield f'<rect class="band" {_across(stage)}/>'


def _across(stage: Stage) -> str:
    return f'x="{_percent(stage.left)}" width="{_percent(stage.width)}" y="{PLOT_TOP}" height="{PLOT_HEIGHT}"'


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"


def _grid(top: int) -> Iterable[str]:
    for height, _ in _ticks(top):
        yield f'<line class="grid" x1="0" x2="100%" y1="{height:.1f}" y2="{height:.1f}"/>'


def _areas(step: Step, top: int) -> Iterable[str]:
    points = step.points
    xs = [round(_PATH_WIDTH * edge) for edge in edges_of(step)]
    below = [0] * len(points)
    for index in range(len(COMPONENTS)):
        above = [base + point.components[index] for base, point in zip(below, points, strict=True)]
        if above != below:
            over = _stairs(xs, [_level(level, top) for level in above])
            back = _stairs(xs[::-1], [_level(level, top) for level in below[::-1]])
            yield f'<path class="c{index}" d="M{over}L{back}Z"/>'
        below = above


def _level(size_bytes: int, top: int) -> str:
    return f"{PLOT_HEIGHT * (1 - size_bytes / top):.1f}".removesuffix(".0")


def _stairs(xs: Sequence[int], levels: Sequence[str]) -> str:
    """A path through levels, each from its edge to the next."""
    changes = (index for index in range(1, len(levels)) if levels[index] != levels[index - 1])
    drawn = "".join(f"H{xs[index]}V{levels[index]}" for index in changes)
    return f"{xs[0]},{levels[0]}{drawn}H{xs[-1]}"


def _reserved_line(step: Step, top: int) -> str:
    levels = [_level(point.reserved_bytes or 0, top) for point in step.points]
    xs = [round(_PATH_WIDTH * edge) for edge in edges_of(step)]
    return f'<path class="reserved" vector-effect="non-scaling-stroke" d="M{_stairs(xs, levels)}"/>'


def _labels(step: Step) -> Iterable[str]:
    """The moments' names, slanted, and above the plot which micro-batch they are of."""
    for stage in step.stages:
        yield (
            f'<line class="tick" x1="{_percent(stage.left)}" x2="{_percent(stage.left)}" y1="{PLOT_BOTTOM}" '
            f'y2="{PLOT_BOTTOM + 6}"/>'
        )
        yield (
            f'<svg x="{_percent(stage.left + stage.width / 2)}" y="{PLOT_BOTTOM + 14}" overflow="visible">'
            f'<text transform="rotate(-40)" text-anchor="end">{label(stage.name)}</text></svg>'
        )
    named = ""
    for stage in step.stages:
        name = step.pass_name(stage)
        if name and name != named:
            x = _percent(stage.left)
            yield f'<line class="tick" x1="{x}" x2="{x}" y1="{PLOT_TOP - 22}" y2="{PLOT_BOTTOM}"/>'
            yield _text(stage.left, PLOT_TOP - 10, name, "quiet", shift=5, anchor="start")
        named = name


def _text(share: float, y: float, text: str, look: str, *, shift: int, anchor: str) -> str:
    """A text so many pixels beside a share of the width."""
    return (
        f'<svg x="{_percent(share)}" y="{y:.1f}" overflow="visible">'
        f'<text class="{look}" x="{shift}" text-anchor="{anchor}">{label(text)}</text></svg>'
    )


def _room(step: Step, top: int) -> Iterable[str]:
    if step.room_bytes is None:
        return
    if step.room_bytes > top:
        yield _text(
            1,
            PLOT_BOTTOM - 8,
            f"room for {gib(step.room_bytes)}, above this scale",
            "halo limit-text",
            shift=-6,
            anchor="end",
        )
        return
    height = _height(step.room_bytes, top)
    yield f'<rect class="limit" x="0" width="100%" y="{height - 1:.1f}" height="2"/>'
    yield _text(1, height + 15, f"room for tensors {gib(step.room_bytes)}", "halo limit-text", shift=-4, anchor="end")


def _peak_mark(step: Step, top: int) -> Iterable[str]:
    points = step.points
    at = points.index(step.peak)
    edges = edges_of(step)
    middle, peak = (edges[at] + edges[at + 1]) / 2, sum(step.peak.components)
    height = _height(peak, top)
    before = middle > 0.5
    yield f'<circle class="peak" cx="{_percent(middle)}" cy="{height:.1f}" r="4"/>'
    anchor, shift = ("end", -9) if before else ("start", 9)
    yield _text(middle, height + 16, f"peak {size(peak)}", "halo", shift=shift, anchor=anchor)


def _targets(step: Step) -> Iterable[str]:
    """What can be focused and hovered: a moment each, with its largest tensors."""
    first = 0
    for stage in step.stages:
        peak = stage.peak
        index = first + stage.points.index(peak)
        highest = localise_label(f"highest {size(sum(peak.components))} allocated")
        largest = "; ".join(_component_words(row) for row in peak.largest[:3])
        said = f"{step.named(stage)}: {highest}; {localise_label('largest tensors')} {largest}"
        yield (
            f'<g class="moment" tabindex="0" role="img" aria-label="{shown_text(said)}" data-point="{index}">'
            f"<title>{shown_text(said)}</title><rect {_across(stage)}/></g>"
        )
        first += len(stage.points)


def _component_words(row: TensorRow) -> str:
    return f"{size(row.total_bytes)} {localise_label(row.kind.component)}"


def step_data(step: Step) -> dict[str, Any]:
    """What the page's script shows at each point: texts, so that it formats nothing."""
    points = step.points
    tensors: dict[tuple[Any, ...], int] = {}
    moments: dict[str, int] = {}
    return {
        "edges": [round(100 * edge, 2) for edge in edges_of(step)],
        "moment": [moments.setdefault(moment, len(moments)) for moment in _moments(step)],
        "moments": list(moments),
        "sizes": [_point_sizes(point) for point in points],
        "largest": [[tensors.setdefault(tensor_texts(row), len(tensors)) for row in point.largest] for point in points],
        "tensors": list(tensors),
        "peak": points.index(step.peak),
    }


def _moments(step: Step) -> list[str]:
    return [step.named(stage, moment) for stage in step.stages for moment in stage.moments]


def _point_sizes(point: Point) -> str:
    sizes = [f"{size(sum(point.components))} allocated"]
    sizes += [] if point.reserved_bytes is None else [f"{size(point.reserved_bytes)} reserved"]
    return listed(map(localise_label, sizes))


def tensor_texts(row: TensorRow) -> tuple[str, int, str, str]:
    """How much, the component's place, what, and whose."""
    kind = row.kind
    each = [localise_label(f"{row.number} of {size(kind.nbytes)}")] if row.number > 1 else []
    return (
        size(row.total_bytes),
        COMPONENTS.index(kind.component),
        listed([*each, f"{kind.dtype} {kind.shape_text}"]),
        f"{_module_words(row)}, {short_operation(kind.operation)}",
    )


def _module_words(row: TensorRow) -> str:
    """A module's name, or a thread in the page's language."""
    name = without_wrapper(row.module) or "no module"
    return localise_label(name) if " " in name else name


def point_words(step: Step, point: Point) -> str:
    """The heading of what is shown at a point."""
    return f"{_moments(step)[step.points.index(point)]}: {_point_sizes(point)}"


def tensor_items(rows: Iterable[TensorRow]) -> str:
    """The largest tensors of a point, as the script writes them too."""
    return "\n".join(
        f'<li><span class="much">{much}</span> <span class="key c{component}"></span>{label(COMPONENTS[component])}'
        f'<br><span class="quiet">{shown_text(what)}<br>{shown_text(whose)}</span></li>'
        for much, component, what, whose in map(tensor_texts, rows)
    )


def moment_rows(step: Step) -> str:
    """Every moment with its peak and what is largest there."""
    return "\n".join(
        f'<tr><th scope="row">{shown_text(step.named(stage))}</th>'
        f'<td><data value="{sum(stage.peak.components)}">{size(sum(stage.peak.components))}</data></td>'
        f"<td>{_largest_words(stage.peak)}</td></tr>"
        for stage in step.stages
    )


def _largest_words(point: Point) -> str:
    return "<br>".join(
        shown_text(f"{_component_words(row)} · {_module_words(row)}").replace(".", ".<wbr>")
        for row in point.largest[:2]
    )
