"""What `--explain` adds to the main screen: its words, and where the recommended plan's memory goes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console

from advisor.report.glossary import components, entries_for
from advisor.report.language import listed, localise_label
from advisor.report.terminal.text import print_paragraph, print_title
from advisor.units import size

if TYPE_CHECKING:  # this screen loads no more of the rest than its own values did
    from advisor.advise import MethodAdvice
    from advisor.memory.ledger import Ledger

LARGEST_TERMS = 3
"""Of each component."""


def render_glossary(part: MethodAdvice, ledger: Ledger | None, shown: Iterable[str], console: Console) -> None:
    """The components of one plan's peak, then the words that a screen used.

    Args:
        part: the plan that the screen is mostly about.
        ledger: its terms in closed form; None where the memory is by another tier.
        shown: every text of the screen.
        console: where to.
    """
    from advisor.advise import METHOD_LABELS

    console.print()
    print_title(console, f"Where the bytes of {METHOD_LABELS[part.method]} come from, at its peak ({part.memory.at})")
    largest = _largest_terms(ledger) if ledger is not None else {}
    told = {name: text for name, text in components().items() if part.memory.components.get(name)}
    for name, text in told.items():
        amount = size(part.memory.components[name])
        print_paragraph(console, text + _most(largest.get(name, [])), label=f"  {name} {amount}: ", indent="    ")
    console.print()
    print_title(console, "Words of this screen")
    for entry in entries_for((*shown, *told, *told.values())):
        print_paragraph(console, entry.text, label=f"  {entry.name}: ", indent="    ")
    console.print()
    print_paragraph(
        console, "Every term with its formula: phi3-advise estimate --plan plan.toml --explain", style="dim"
    )


def _most(terms: list[tuple[str, int]]) -> str:
    """The largest terms, by the names that `estimate --explain` gives them."""
    return (
        f" Most of it: {listed(f'{localise_label(name)} {size(amount)}' for name, amount in terms)}." if terms else ""
    )


def _largest_terms(ledger: Ledger) -> dict[str, list[tuple[str, int]]]:
    sums: dict[str, dict[str, int]] = {}
    for entry in ledger.alive_at_peak():
        of_component = sums.setdefault(entry.component, {})
        of_component[entry.term.name] = of_component.get(entry.term.name, 0) + entry.size_bytes
    return {
        component: sorted(terms.items(), key=lambda item: -item[1])[:LARGEST_TERMS] for component, terms in sums.items()
    }
