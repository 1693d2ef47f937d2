"""One plan by trace: the totals, whether the GPU survives, and where the memory is at the peak."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from advisor.memory.regime import EXPANDABLE, TORCH_DEFAULTS
from advisor.report.language import localise_label
from advisor.report.terminal.estimate import parameters_row, print_fit, print_sizes, print_totals, process_rows
from advisor.report.terminal.subject import print_gpu, print_plan
from advisor.report.terminal.text import joined, print_paragraph, print_title, print_warnings
from advisor.report.words import clean, closed_form_words, regime_words, replayed_words, short_operation
from advisor.units import gib, short_count, size

if TYPE_CHECKING:  # this screen loads no more of the rest than its own values did
    from advisor.report.tensors import TensorRow
    from advisor.traced import TracedPlan

SHOWN_MODULES = 10
SHOWN_TENSORS = 10


def render_trace(traced: TracedPlan, console: Console) -> None:
    """The plan, its totals beside the closed form's, the verdict, and what was alive at the peak."""
    from advisor.report.tensors import group_modules, group_tensors

    memory = traced.memory
    if traced.fit is not None:
        print_gpu(traced.gpu, console)
    label = f"{clean(traced.model.label)} · "
    print_paragraph(console, f"{short_count(memory.parameters.total)} parameters", label=label, indent="  ")
    print_plan(traced.plan, console)
    print_warnings((*traced.gpu.notes, *traced.warnings), console)
    console.print()
    print_totals([parameters_row(memory), *_peaks(traced), *process_rows(memory, traced.gpu)], console)
    _print_verdict(traced, console)
    whole = memory.allocated_bytes
    print_sizes(f"Allocated at the peak ({memory.at})", memory.components.items(), whole, console)
    print_sizes("Highest in each moment", memory.moments.items(), whole, console, peak=traced.peak_moment)
    modules = group_modules(traced.trace.largest)
    shown = [(row.module, row.total_bytes) for row in modules[:SHOWN_MODULES]]
    rest = sum(row.total_bytes for row in modules[SHOWN_MODULES:])
    print_sizes("By module at the peak", [*shown, ("(the rest)", rest)], whole, console)
    _print_tensors(group_tensors(traced.trace.largest)[:SHOWN_TENSORS], console)
    console.print()
    tier = "Tier: trace: the installed code run on tensors without storage; nothing was measured."
    print_paragraph(console, tier, style="dim")


def _peaks(traced: TracedPlan) -> list[tuple[str, str]]:
    memory, run = traced.memory, traced.trace
    shown = {run.regime: run.replayed, EXPANDABLE: run.expandable, TORCH_DEFAULTS: run.default}
    reserved = [f"{gib(one.reserved_bytes)} {regime_words(regime)}" for regime, one in shown.items()]
    return [
        ("peak allocated", f"{gib(memory.allocated_bytes)} at {memory.at}"),
        ("closed form says", closed_form_words(traced)),
        ("peak reserved", ", ".join(reserved)),
        ("while loading", f"{gib(run.loading_bytes)} allocated"),
    ]


def _print_verdict(traced: TracedPlan, console: Console) -> None:
    if traced.fit is None or traced.survival is None:
        return
    from advisor.fit import explain_fit

    print_fit(traced.fit, explain_fit(traced.fit, traced.memory.at), console)
    label, said = f"Replayed in {gib(traced.survival.room_bytes)}: ", replayed_words(traced.survival)
    print_paragraph(console, said, label=label, indent="  ")


def _print_tensors(rows: list[TensorRow], console: Console) -> None:
    """Two lines each: how much, and whose."""
    from advisor.report.tensors import without_wrapper

    console.print()
    print_title(console, "Largest tensors at the peak")
    for row in rows:
        kind = row.kind
        number = f"{row.number} of {size(kind.nbytes)}"
        print_paragraph(
            console,
            joined(
                f"{size(row.total_bytes):>12}",
                number,
                f"{kind.dtype} {kind.shape_text}",
                localise_label(kind.component),
            ),
        )
        whose = joined(clean(without_wrapper(row.module)) or "no module", clean(short_operation(kind.operation)))
        print_paragraph(console, whose, label=" " * 14, indent=" " * 14, style="dim")
