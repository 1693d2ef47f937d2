"""Memory as bars, and what their colours mean: green fits, yellow is near the edge, red does not fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:  # a screen loads no more of the rest than its own values did
    from advisor.fit import Fit

LEGEND = "█ reserved  ▓ context, other processes  ▒ margin  ░ free  ▶ more than there is"


def fit_style(fit: Fit) -> str:
    """Green fits, yellow is near the edge, red does not fit."""
    return "yellow" if fit.near_edge else "green" if fit.fits else "red"


def memory_bar(fit: Fit, width: int) -> Text:
    """The four claims on a GPU's memory, drawn to its total; `LEGEND` says what is what."""
    room = width if fit.fits else width - 1
    claims = (
        ("█", fit.reserved_bytes),
        ("▓", fit.context_bytes + fit.others_bytes),
        ("▒", fit.margin_bytes),
    )
    drawn, claimed = "", 0
    for glyph, claim in claims:
        claimed += claim
        end = min(room, round(width * claimed / fit.total_bytes)) if fit.total_bytes else room
        drawn += glyph * (end - len(drawn))
    bar = Text(drawn, style=fit_style(fit))
    bar.append("░" * (room - len(drawn)), style="dim")
    return bar if fit.fits else bar.append("▶", style="bold red")


def share_bar(part_bytes: int, whole_bytes: int, width: int) -> Text:
    """A part of a whole; something is never drawn as nothing."""
    filled = min(width, max(1, round(width * part_bytes / whole_bytes))) if part_bytes and whole_bytes else 0
    return Text("█" * filled).append("░" * (width - filled), style="dim")
