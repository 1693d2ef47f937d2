"""Every term that is allocated at the peak: its formula, its inputs, its result."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from advisor.report.language import is_english, localise, localise_label
from advisor.report.terminal.text import line_width, plain_table, print_paragraph
from advisor.units import count, gib, size

if TYPE_CHECKING:  # this screen loads no more of the rest than its own values did
    from advisor.memory.estimate import Memory
    from advisor.memory.ledger import Component, Entry, Ledger, Term

_INDENT = 2
_GAPS = 6


class _Told(NamedTuple):
    """A term's docstring in its parts."""

    summary: str
    formula: str
    source: str


def render_explain(ledger: Ledger, memory: Memory, console: Console) -> None:
    """The terms with their formulas, the largest first; their sum is the peak allocated."""
    entries = ledger.alive_at_peak()
    console.print()
    print_paragraph(console, f"Terms allocated at the peak ({memory.at})", style="bold")
    print_paragraph(console, "Formulas are in bytes; every tensor is then rounded up to the allocator's block.")
    for (term, component), group in _by_term(entries):
        _print_term(term, component, group, console)
    total = sum(entry.size_bytes for entry in entries)
    console.print()
    said = f"{count(total)} B of {count(memory.allocated_bytes)} B peak allocated ({gib(memory.allocated_bytes)})"
    print_paragraph(console, said, label="Sum: ")


def _by_term(entries: tuple[Entry, ...]) -> list[tuple[tuple[Term, Component], list[Entry]]]:
    groups: dict[tuple[Term, Component], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.term, entry.component), []).append(entry)
    return sorted(groups.items(), key=lambda item: -sum(entry.size_bytes for entry in item[1]))


def _print_term(term: Term, component: Component, entries: list[Entry], console: Console) -> None:
    told = _read(term)
    total = size(sum(entry.size_bytes for entry in entries))
    console.print()
    name = f"{term.name} " if is_english() else localise_label(term.name)
    print_paragraph(console, f"({component}): {total}", label=name, indent="  ")
    print_paragraph(console, told.summary, label="  ", indent="  ")
    print_paragraph(console, told.formula.removesuffix("."), label="  = ", indent="    ", label_style="")
    if told.source:
        print_paragraph(console, told.source, label="  Source: ", indent="    ", label_style="", style="dim")
    rows = [(_inputs(entry), f"× {count(entry.count)}", f"{count(entry.size_bytes)} B") for entry in entries]
    counts, sizes = (max(len(row[column]) for row in rows) for column in (1, 2))
    table = plain_table(_INDENT, line_width(console) - _INDENT - counts - sizes - _GAPS, counts, sizes)
    table.columns[2].justify = table.columns[3].justify = "right"
    for row in rows:
        table.add_row("", *row)
    console.print(table)


def _inputs(entry: Entry) -> str:
    names = inspect.signature(entry.term.function).parameters
    return ", ".join(f"{name} = {count(value)}" for name, value in zip(names, entry.sizes, strict=False)) or localise(
        "no inputs"
    )


def _read(term: Term) -> _Told:
    """Summary, formula and source from a term's docstring, each on one line."""
    summary, _, rest = (inspect.getdoc(term.function) or "").partition("\n\n")
    formula, _, source = rest.partition("Source:")
    return _Told(*(" ".join(part.split()) for part in (summary, formula, source)))
