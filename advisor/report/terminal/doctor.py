"""The checks of `doctor`, one line each, as they are made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console

from advisor.report.language import localise_label
from advisor.report.terminal.text import print_paragraph
from advisor.report.terminal.wrapping import pad
from advisor.report.words import clean

if TYPE_CHECKING:
    from advisor.doctor import Check

_WORDS = {"good": "ok", "doubtful": "hm", "bad": "bad", "absent": "none"}
_STYLES = {"good": "green", "doubtful": "yellow", "bad": "bold red", "absent": "dim"}
_NAME_WIDTH = 22
_INDENT = "       "


def render_doctor(checks: Iterable[Check], console: Console) -> list[Check]:
    """Prints each check when it is made, and returns them all."""
    made = []
    for check in checks:
        label = (
            f" {pad(localise_label(_WORDS[check.verdict]), 5)} {pad(localise_label(clean(check.name)), _NAME_WIDTH)} "
        )
        print_paragraph(
            console, localise_label(check.found), label=label, label_style=_STYLES[check.verdict], indent=_INDENT
        )
        if check.remedy:
            print_paragraph(console, check.remedy, label=_INDENT, indent=_INDENT, style="dim")
        made.append(check)
    console.print()
    print_paragraph(console, _summary(made))
    return made


def _summary(made: list[Check]) -> str:
    bad = [check.name for check in made if check.verdict == "bad"]
    if bad:
        return f"Training cannot go on here: {', '.join(bad)}."
    doubtful = [check.name for check in made if check.verdict == "doubtful"]
    if doubtful:
        return f"Training can go on here; look at {', '.join(doubtful)}."
    return "Training can go on here."
