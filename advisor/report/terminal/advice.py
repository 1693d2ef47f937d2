"""The main screen: the GPU, the three methods compared with this user's numbers, the recommendation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from advisor.report.language import is_english, localise, localise_label
from advisor.report.terminal.bars import LEGEND, fit_style, memory_bar
from advisor.report.terminal.subject import print_gpu, print_model
from advisor.report.terminal.text import (
    line_width,
    plain_table,
    print_command,
    print_paragraph,
    print_title,
    print_warnings,
)
from advisor.report.words import (
    EASE,
    METHOD_NAMES,
    QUALITY,
    SHIPPED,
    TRAINED,
    basis_of,
    ended,
    request_facts,
    sentence,
    settings,
    speed_words,
)
from advisor.units import gib, short_count, size

if TYPE_CHECKING:  # this screen loads no more of the rest than its own values did
    from advisor.advise import Advice, MethodAdvice
    from advisor.fit import Fit

WIDE = 100
"""Columns from which the table shows more."""

_LABEL_WIDTH = 11
_LOCALISED_LABEL_WIDTH = 13
_GAP = 2


def render_advice(advice: Advice, console: Console) -> None:
    """The GPU's lines, the comparison, the recommendation, what else to know, and what all this rests on."""
    print_gpu(advice.gpu, console)
    print_model(advice.model, console, *request_facts(advice.request))
    console.print()
    console.print(_comparison(advice, line_width(console)))
    print_paragraph(console, LEGEND, style="dim")
    console.print()
    _print_recommendation(advice, console)
    if advice.warnings:
        console.print()
        print_warnings(advice.warnings, console)
    console.print()
    print_paragraph(console, basis_of(advice), style="dim")


def _comparison(advice: Advice, width: int) -> Table:
    """The three methods side by side; the recommended column's rule carries the word."""
    parts = advice.methods
    label_width = _LABEL_WIDTH if is_english() else _LOCALISED_LABEL_WIDTH
    cell = (width - label_width) // len(parts) - _GAP
    table = plain_table(label_width, *(cell for _ in parts))

    def add(label: str, cells: Iterable[str | Text]) -> None:
        shown = (localise_label(cell) if isinstance(cell, str) else cell for cell in cells)
        table.add_row(Text(localise_label(label), style="bold"), *shown)

    add("", (Text(localise_label(METHOD_NAMES[part.method]), style="bold") for part in parts))
    add("─" * label_width, (_rule(cell, recommended=part.method == advice.recommended) for part in parts))
    add("trained", (TRAINED[part.method] for part in parts))
    add("", (f"{short_count(part.memory.parameters.trainable)} parameters" for part in parts))
    add("fits?", (_verdict(part.fit) for part in parts))
    if any(part.tier == "trace" for part in parts):
        add(" tier", (part.tier for part in parts))
    add("memory", (_needed(part.fit) for part in parts))
    add("", (memory_bar(part.fit, cell) for part in parts))
    for label, cells in _memory_rows(parts, wide=width >= WIDE):
        add(label, cells)
    add("settings", ("\n".join(settings(part.plan)) for part in parts))
    add("compute\n(estimate)", map(speed_words, parts))
    add("quality", (QUALITY[part.method] for part in parts))
    add("ease", (EASE[part.method] for part in parts))
    add("you ship", (f"{size(part.saved_bytes)} {SHIPPED[part.method]}" for part in parts))
    return table


def _rule(width: int, *, recommended: bool) -> Text:
    if not recommended:
        return Text("─" * width)
    begun = f"━━ {localise_label('recommended')} "
    return Text(begun + "━" * (width - cell_len(begun)), style="green")


def _verdict(fit: Fit) -> Text:
    if fit.fits:
        said = localise_label("yes, near the edge" if fit.near_edge else "yes")
        return Text(said, style=f"bold {fit_style(fit)}")
    verdict = Text(localise(f"no: {gib(fit.missing_bytes)} short"), style="bold red")
    return verdict if fit.broken_by == "peak reserved" else verdict.append("\n" + localise(f"for {fit.broken_by}"))


def _needed(fit: Fit) -> str:
    return f"{gib(fit.needed_bytes).removesuffix(' GiB')} / {gib(fit.total_bytes)}"


def _memory_rows(parts: Sequence[MethodAdvice], *, wide: bool) -> list[tuple[str, list[str]]]:
    """The four claims behind what is needed, each where it says something, and the moment of the peak."""
    rows = [(" reserved", [gib(part.fit.reserved_bytes) for part in parts])]
    if wide:
        rows.append((" context", [gib(part.fit.context_bytes) for part in parts]))
    if any(part.fit.others_bytes for part in parts):
        rows.append((" others", [gib(part.fit.others_bytes) for part in parts]))
    if wide:
        rows.append((" margin", [gib(part.fit.margin_bytes) for part in parts]))
    if any(part.spilled_bytes for part in parts if part.fits):
        spilled = [gib(part.spilled_bytes) if part.fits and part.spilled_bytes else "–" for part in parts]
        rows.append((" host RAM", spilled))
    rows.append((" peak at", [part.memory.at for part in parts]))
    return rows


def _print_recommendation(advice: Advice, console: Console) -> None:
    if advice.recommended is None:
        print_title(console, "Nothing fits", "bold red")
        for part in advice.methods:
            print_paragraph(console, ended(part.reason), label=f"  {METHOD_NAMES[part.method]}: ", indent="    ")
    else:
        from advisor.advise import METHOD_LABELS

        label = f"Recommended: {METHOD_LABELS[advice.recommended]}. "
        print_paragraph(console, sentence(advice.reason), label=label, label_style="bold green", indent="  ")
        print_paragraph(console, f"It {ended(advice.choice.reason)}", label="  ", indent="  ")
    if advice.unlock:
        label = "To go further: " if advice.recommended else "To make it fit: "
        print_paragraph(console, ended(advice.unlock), label=label, indent="  ")
    print_title(console, "Next:")
    print_command(console, advice.next_command)
    if advice.proof_command:
        print_command(console, advice.proof_command)
