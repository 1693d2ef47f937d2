"""Text on a screen: paragraphs that keep paths whole, facts side by side, tables without lines."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from advisor.report.language import localise, localise_label
from advisor.report.terminal.wrapping import JOINT, SHORT_FACT, wrap_lines
from advisor.report.words import clean

WIDEST = 120
"""Columns beyond which lines are no easier to read."""

_NO_BREAK = "\N{NO-BREAK SPACE}"


def line_width(console: Console) -> int:
    """Columns that a screen uses."""
    return min(console.width, WIDEST)


def joined(*facts: str) -> str:
    """Facts side by side; a short one is not broken, and the dot stays at the end of its line."""
    return JOINT.join(fact.replace(" ", _NO_BREAK) if len(fact) <= SHORT_FACT else fact for fact in facts)


def print_paragraph(
    console: Console, text: str, *, label: str = "", label_style: str = "bold", indent: str = "", style: str = ""
) -> None:
    """Prints text in the language of the screens, and in lines: a path or an option stays whole, however long.

    Args:
        console: where to.
        text: the paragraph; its own line breaks are kept.
        label: what comes before it on its first line.
        label_style: the label's style.
        indent: what comes before every other line.
        style: the text's style.
    """
    label = localise_label(label)
    lines: list[str] = []
    for part in localise(text).splitlines() or [""]:
        first = indent if lines else label
        lines += wrap_lines(clean(part.expandtabs()), line_width(console), first=first, rest=indent)
    for number, line in enumerate(lines):
        shown = Text(line.replace(_NO_BREAK, " "), style=style)
        if number == 0:
            shown.stylize(label_style, 0, len(label))
        console.print(shown, soft_wrap=True)


def print_title(console: Console, title: str, style: str = "bold") -> None:
    """Prints a line of its own over what follows."""
    console.print(Text(localise_label(title), style=style))


def print_command(console: Console, command: str) -> None:
    """Prints a command on a line of its own, never broken, to be copied."""
    console.print(Text(f"  {clean(command)}", style="bold"), soft_wrap=True)


def print_warnings(warnings: tuple[str, ...], console: Console) -> None:
    """A paragraph each, marked."""
    for warning in warnings:
        print_paragraph(console, warning, label="! ", label_style="bold yellow", indent="  ")


def plain_table(*widths: int) -> Table:
    """A table without lines, two blanks between columns of fixed widths."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for width in widths:
        table.add_column(width=width, overflow="fold")
    return table
