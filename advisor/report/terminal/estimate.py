"""One plan's memory: the totals, what makes up the peak, and how high each moment goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from advisor.report.language import localise, localise_label
from advisor.report.terminal.bars import LEGEND, fit_style, memory_bar, share_bar
from advisor.report.terminal.subject import print_gpu, print_model, print_plan
from advisor.report.terminal.text import (
    line_width,
    plain_table,
    print_paragraph,
    print_title,
    print_warnings,
)
from advisor.report.terminal.wrapping import wrap_lines
from advisor.report.words import clean, sentence
from advisor.units import GIB, count, gib, size

if TYPE_CHECKING:  # this screen loads no more of the rest than its own values did
    from collections.abc import Iterable

    from advisor.fit import Fit
    from advisor.hardware import Gpu
    from advisor.memory.estimate import Memory
    from advisor.plan import Plan
    from advisor.profiles import ModelProfile

_NAME_WIDTH = 20
_WIDEST_NAME = 44
_SIZE_WIDTH = 12
_GAPS = 6


def render_estimate(
    plan: Plan,
    model: ModelProfile,
    gpu: Gpu,
    memory: Memory,
    fit: Fit | None,
    console: Console,
    *,
    cautions: tuple[str, ...] = (),
) -> None:
    """One plan in closed form.

    Args:
        plan: what was estimated.
        model: its model.
        gpu: whose kernels and context were assumed.
        memory: the estimate.
        fit: memory against the GPU; None where no GPU is known.
        console: where to.
        cautions: what the plan overlooks.
    """
    if fit is not None:
        print_gpu(gpu, console)
    print_model(model, console)
    print_plan(plan, console)
    print_warnings((*gpu.notes, *cautions), console)
    console.print()
    _print_memory(memory, gpu, console)
    if fit is not None:
        from advisor.fit import explain_fit

        print_fit(fit, explain_fit(fit, memory.at), console)
    print_sizes(f"Allocated at the peak ({memory.at})", memory.components.items(), memory.allocated_bytes, console)
    print_sizes("Highest in each moment", memory.moments.items(), memory.allocated_bytes, console, peak=memory.at)
    console.print()
    print_paragraph(console, "Tier: estimate, in closed form. Nothing was measured.", style="dim")


def _print_memory(memory: Memory, gpu: Gpu, console: Console) -> None:
    print_totals(
        [
            parameters_row(memory),
            ("peak allocated", f"{gib(memory.allocated_bytes)} at {memory.at}"),
            ("peak reserved", gib(memory.reserved_bytes)),
            *process_rows(memory, gpu),
        ],
        console,
    )


def parameters_row(memory: Memory) -> tuple[str, str]:
    """How many there are, how many of them are trained."""
    parameters = memory.parameters
    return "parameters", f"{count(parameters.total)}, of which {count(parameters.trainable)} are trained"


def process_rows(memory: Memory, gpu: Gpu) -> list[tuple[str, str]]:
    """What the whole process takes."""
    rows = [
        ("context", f"{gib(memory.context_bytes)} ({gpu.context_provenance})"),
        ("total", gib(memory.total_bytes)),
    ]
    if memory.host_bytes:
        rows.append(("paged states", f"{gib(memory.host_bytes)} that may move to host RAM, not counted above"))
    return rows


def print_totals(rows: Iterable[tuple[str, str]], console: Console) -> None:
    """Names, and what is to be said of each."""
    width = line_width(console) - _NAME_WIDTH - _GAPS
    table = plain_table(_NAME_WIDTH, width)
    for name, value in rows:
        table.add_row(Text(localise_label(name), style="bold"), "\n".join(wrap_lines(localise(value), width)))
    console.print(table)


def print_fit(fit: Fit, verdict: str, console: Console) -> None:
    """The four claims as a bar over the whole line, and the verdict in a sentence."""
    console.print()
    console.print(memory_bar(fit, line_width(console)))
    print_paragraph(console, LEGEND, style="dim")
    label = "Fits. " if fit.fits else "Does not fit. "
    print_paragraph(console, sentence(verdict), label=label, label_style=f"bold {fit_style(fit)}", indent="  ")


def print_sizes(
    title: str, sizes: Iterable[tuple[str, int]], whole_bytes: int, console: Console, *, peak: str = ""
) -> None:
    """Sizes as shares of a whole, a bar each; what is nothing is left out."""
    unit = gib if whole_bytes >= GIB else size
    shown = [(clean(localise_label(name)), name, size_bytes) for name, size_bytes in sizes if size_bytes]
    name_width = min(max(_NAME_WIDTH, *(cell_len(label) for label, _, _ in shown), 0), _WIDEST_NAME)
    bar_width = line_width(console) - name_width - _SIZE_WIDTH - _GAPS
    table = plain_table(name_width, _SIZE_WIDTH, bar_width)
    table.columns[1].justify = "right"
    mark = f" {localise_label('peak')}"
    for label, name, size_bytes in shown:
        bar = share_bar(size_bytes, whole_bytes, bar_width - (cell_len(mark) if peak else 0))
        table.add_row(Text(label), unit(size_bytes), bar.append(mark, style="bold") if name == peak else bar)
    console.print()
    print_title(console, title)
    console.print(table)
