"""An error on one screen: what, why, what to do."""

from __future__ import annotations

from rich.console import Console

from advisor.errors import AdvisorError
from advisor.report.terminal.text import print_paragraph

LONGEST_LINE = 1200
"""Characters of each line of a part that are shown: a list is never cut short by its first entry."""

MOST_LINES = 40
"""Lines of a part that are shown: more than ten bad rows beside every other problem of a preflight."""


def render_error(error: AdvisorError, console: Console) -> None:
    """What happened, why, and what to do next."""
    for label, text, style in (
        ("Error: ", error.what, "bold red"),
        ("Why: ", error.why, "bold"),
        ("What to do: ", error.hint, "bold"),
    ):
        if text:
            print_paragraph(console, _cut(text), label=label, label_style=style, indent="  ")


def _cut(text: str) -> str:
    lines = text.splitlines()
    shown = [line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 1] + "…" for line in lines[:MOST_LINES]]
    return "\n".join([*shown, "…"] if len(lines) > MOST_LINES else shown)
