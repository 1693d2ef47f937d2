"""An error on one screen: what, why, what to do."""

from __future__ import annotations

from rich.console import Console

from advisor.errors import AdvisorError
from advisor.report.terminal.text import print_paragraph

LONGEST_PART = 1200
"""Characters of each part that are shown, so that all of them stay on one screen."""


def render_error(error: AdvisorError, console: Console) -> None:
    """What happened, why, and what to do next."""
    for label, text, style in (
        ("Error: ", error.what, "bold red"),
        ("Why: ", error.why, "bold"),
        ("What to do: ", error.hint, "bold"),
    ):
        if text:
            shown = text if len(text) <= LONGEST_PART else text[: LONGEST_PART - 1] + "…"
            print_paragraph(console, shown, label=label, label_style=style, indent="  ")
