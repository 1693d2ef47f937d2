"""What the explorer shows of a view, as text: nothing here knows how it gets onto the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from advisor.explore import KNOBS, Knob, View, shown_value
from advisor.fit import check_fit, explain_fit
from advisor.report.language import localise, localise_label
from advisor.report.terminal.bars import LEGEND, fit_style, memory_bar, share_bar
from advisor.report.terminal.wrapping import pad
from advisor.report.words import clean, compute_facts, memory_facts, origin_of, sentence
from advisor.units import GIB, duration, gib, short_count, size

_LABEL_WIDTH = 17
_VALUE_WIDTH = 18
_KEY_WIDTH = 5
_NARROWEST_BAR = 4

HELP = (
    ("↑ ↓", "choose"),
    ("← →", "change"),
    ("letter", "next, capital: back"),
    ("w", "best fit"),
    ("t", "trace"),
    ("s", "save"),
    ("l", "launch"),
    ("q", "quit"),
)


def knobs_width() -> int:
    """Columns of the settings; the bars have the rest."""
    return _KEY_WIDTH + _label_width() + _VALUE_WIDTH


def _label_width() -> int:
    return max(_LABEL_WIDTH, *(cell_len(localise_label(knob.label)) + 1 for knob in KNOBS))


def heading(view: View) -> Text:
    """The GPU and the model, a line each."""
    gpu, model = view.gpu, view.model
    facts = [memory_facts(gpu)[0], *compute_facts(gpu)[1:2]]
    parameters = view.memory.parameters
    counts = f"{short_count(parameters.total)} parameters, {short_count(parameters.trainable)} trained"
    return Text.assemble(
        (clean(gpu.name), "bold"),
        f" {' · '.join(map(localise_label, (f'({origin_of(gpu)})', *facts)))}\n",
        (clean(model.label), "bold"),
        f" · {localise_label(counts)} · {localise_label(f'effective batch {view.plan.effective_batch:,}')}",
    )


def verdict(view: View) -> Text:
    """Whether it fits, in the words of every screen."""
    fit = view.fit
    said = explain_fit(fit, view.memory.at)
    if fit.fits and view.spilled_bytes:
        said += f"; {gib(view.spilled_bytes)} of paged optimizer states live in host RAM"
    label = "Fits. " if fit.fits else "Does not fit. "
    return Text.assemble((localise_label(label), f"bold {fit_style(fit)}"), localise(sentence(said)))


def claims(view: View, width: int) -> Text:
    """The four claims on the GPU's memory as a bar, and what its parts are."""
    return Text("\n").join((memory_bar(view.fit, width), Text(localise(LEGEND), style="dim")))


def knobs(view: View, selected: int, width: int) -> Text:
    """The settings, a line each, the selected one marked."""
    return Text("\n").join(_knob_line(view, knob, index == selected, width) for index, knob in enumerate(KNOBS))


def _knob_line(view: View, knob: Knob, selected: bool, width: int) -> Text:
    value = localise_label(clean(shown_value(view, knob)))
    shown = f"{'>' if selected else ' '} {knob.key}  {pad(localise_label(knob.label), _label_width())}{value}"
    line = Text(set_cell_size(shown, width - 1), style="reverse" if selected else "")
    line.stylize("bold", 2, 3)
    return line


def bars(view: View, traced: dict[str, Any] | None, width: int, height: int) -> Text:
    """What is allocated at the peak, how fast it is, what a trace said; each moment's height where there is room."""
    memory = view.memory
    components = [(name, size_bytes) for name, size_bytes in memory.components.items() if size_bytes]
    moments = [(name, size_bytes) for name, size_bytes in memory.moments.items() if size_bytes]
    tier = Text(localise_label("tier: estimate, in closed form"), style="dim")
    said = [*_totals(view), *(_traced_lines(view, traced) if traced else [tier])]
    peak = Text(localise_label(f"Peak at {memory.at}"), style="bold")
    lines = [peak, *_size_lines(components, memory.allocated_bytes, width)]
    lines += [Text(), *said] if len(lines) + len(said) < height else said
    if len(lines) + len(moments) + 2 <= height:
        lines += [Text(), Text(localise_label("Highest in each moment"), style="bold")]
        lines += _size_lines(moments, memory.allocated_bytes, width, peak=memory.at)
    return Text("\n").join(lines)


def _size_lines(sizes: Sequence[tuple[str, int]], whole_bytes: int, width: int, *, peak: str = "") -> list[Text]:
    """A name, an amount and a bar each."""
    unit = gib if whole_bytes >= GIB else size
    amounts = [unit(size_bytes) for _, size_bytes in sizes]
    names = [clean(localise_label(name)) for name, _ in sizes]
    amount_width = max(len(amount) for amount in amounts)
    name_width = min(max(map(cell_len, names)), width - amount_width - _NARROWEST_BAR - 2)
    bar_width = width - name_width - amount_width - 2
    lines = []
    for (name, size_bytes), shown, amount in zip(sizes, names, amounts, strict=True):
        label = f"{set_cell_size(shown, name_width)} {amount:>{amount_width}} "
        bar = share_bar(size_bytes, whole_bytes, bar_width)
        lines.append(Text(label, style="bold" if name == peak else "").append(bar))
    return lines


def _totals(view: View) -> list[Text]:
    memory, speed = view.memory, view.speed
    allocated = gib(memory.allocated_bytes).removesuffix(" GiB")
    if not view.fit.fits:
        said = "speed: –"
    elif speed is None:
        said = "speed: not known"
    else:
        said = f"about {duration(speed.step_seconds)} a step, {speed.tokens_per_second:,.0f} tokens/s"
    sizes = f"allocated {allocated}, reserved {gib(memory.reserved_bytes)}"
    return [Text(localise_label(sizes)), Text(localise_label(said))]


def _traced_lines(view: View, traced: dict[str, Any]) -> list[Text]:
    """The trace's peak, and how far the closed form is from it."""
    memory = traced["memory"]
    allocated, reserved = memory["allocated_bytes"], memory["reserved_bytes"]
    difference = view.memory.allocated_bytes - allocated
    sign = "−" if difference < 0 else "+"
    fit = check_fit(reserved, view.gpu)
    word = "fits" if fit.fits else f"{gib(fit.missing_bytes)} short"
    peak = f"traced: allocated {gib(allocated)} (above: {sign}{abs(difference) / allocated:.2%})"
    verdict = f"traced: reserved {gib(reserved)}, {word}"
    return [Text(localise_label(peak)), Text(localise_label(verdict), style=fit_style(fit))]


def help_line() -> Text:
    """The keys."""
    shown = ((localise_label(key), localise_label(does)) for key, does in HELP)
    return Text("  ").join(Text.assemble((key, "bold"), f" {does}") for key, does in shown)
