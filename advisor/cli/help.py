"""The pages of --help in the language of the screens: click counts characters, and a Japanese one takes two cells."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import click

from advisor.report.language import is_english, listed, localise_label, speak_what

if TYPE_CHECKING:
    from collections.abc import Iterable

_ADDED = re.compile(r"\s*\[((?:required|default:|\d+<=x<=)[^\]]*)\]$")
"""The notes that click itself makes: a default that it knows, a range, what is required."""

_WIDEST_NAME = 30
_GAP = 2


class HelpContext(click.Context):
    """click's context; where the screens are not English, its pages are laid out by `HelpPage`."""

    def make_formatter(self) -> click.HelpFormatter:
        """Called by click for each page."""
        speak_what(getattr(sys.stdout, "encoding", None))
        if not is_english():
            self.formatter_class = HelpPage
        return super().make_formatter()


class HelpPage(click.HelpFormatter):
    """click's page, with its texts localised and its lines counted in cells."""

    def write_usage(self, prog: str, args: str = "", prefix: str | None = None) -> None:
        """The first line."""
        super().write_usage(prog, args, localise_label("Usage: ") if prefix is None else prefix)

    def write_heading(self, heading: str) -> None:
        """A section's name."""
        said = localise_label(f"{heading}:")
        self.write(f"{'':>{self.current_indent}}{said}\n")

    def write_text(self, text: str) -> None:
        """Paragraphs; one that begins with a backspace keeps its lines."""
        from advisor.report.terminal.wrapping import wrap_lines

        indent = " " * self.current_indent
        written = []
        for paragraph in text.split("\n\n"):
            first, _, rest = paragraph.partition("\n")
            if first.strip() == "\b":
                lines = [f"{indent}{_example(line)}" for line in rest.splitlines()]
            else:
                lines = wrap_lines(localise_label(" ".join(paragraph.split())), self.width, first=indent, rest=indent)
            written.append("\n".join(lines))
        self.write("\n\n".join(written) + "\n")

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Names and what is said of each, in two columns."""
        from advisor.report.terminal.wrapping import pad, wrap_lines

        indent, rows = " " * self.current_indent, list(rows)
        column = min(max(len(name) for name, _ in rows), _WIDEST_NAME) + _GAP
        rest = indent + " " * column
        for name, said in rows:
            lines = wrap_lines(_option_words(said), self.width, first=rest, rest=rest)
            if len(name) <= column - _GAP:
                lines[0] = f"{indent}{pad(name, column)}{lines[0][len(rest) :]}"
            else:
                lines.insert(0, f"{indent}{name}")
            self.write("\n".join(lines) + "\n")


def _option_words(text: str) -> str:
    """What is said of an option; what click puts behind it is no part of the sentence."""
    said = localise_label(text)
    added = _ADDED.search(said)
    if added is None:
        return said
    notes = listed(map(localise_label, added[1].split("; ")))
    own = localise_label(text.removesuffix(added[0]))
    return f"{own}{' ' if own.endswith(']') else ''}[{notes}]"


def _example(line: str) -> str:
    """A command with its comment behind it."""
    command, blanks, said = line.partition("   ")
    if not said:
        return line
    return f"{command}{blanks}{said[: len(said) - len(said.lstrip())]}{localise_label(said.lstrip())}"
