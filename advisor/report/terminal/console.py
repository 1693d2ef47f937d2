"""The console that everything is printed on: its width, whether it has colour, and which characters it can take."""

from __future__ import annotations

import codecs
import os
import sys
from typing import TextIO

from rich.console import Console

from advisor.report.language import speak_what

PIPE_WIDTH = 80
"""Columns where nobody looks, or where they cannot be counted."""

NARROWEST = 40
"""Columns below which a table is no longer one; a narrower terminal wraps the lines itself."""

_LOOKALIKES = {
    "█": "#",
    "▓": "=",
    "▒": "+",
    "░": ".",
    "▶": ">",
    "━": "=",
    "─": "-",
    "–": "-",
    "−": "-",
    "·": "-",
    "×": "x",
    "÷": "/",
    "⌈": "(",
    "⌉": ")",
    "²": "2",
    "…": "~",
    "→": ">",
    "←": "<",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}
"""One character for one, so that columns stay where they are."""


def make_console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr.

    Colour only where rich finds a terminal with colours and NO_COLOR is not set; 80 columns where there is no
    terminal, unless COLUMNS says otherwise. From here on the stream writes look-alikes of what its encoding lacks.
    """
    stream = sys.stderr if stderr else sys.stdout
    _write_lookalikes(stream)
    speak_what(getattr(stream, "encoding", None))
    if _columns() is None:
        # rich would read it again, and takes "\N{SUPERSCRIPT TWO}" for a number.
        os.environ.pop("COLUMNS", None)
    return _Console(
        stderr=stderr,
        width=max(NARROWEST, _columns() or _terminal_columns(stream) or PIPE_WIDTH),
        # rich's own NO_COLOR keeps the escape codes of bold and dim.
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        highlight=False,
        markup=False,
        emoji=False,
    )


class _Console(Console):
    """Leaves a reader that has gone to the command line: rich would exit with the code of "nothing fits"."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it holds the BrokenPipeError."""
        raise


def _columns() -> int | None:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isascii() and columns.isdigit() and len(columns) < 5 else None


def _terminal_columns(stream: TextIO | None) -> int | None:
    """The stream's own terminal: rich would ask stdin's and stderr's too."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream else None
    except (OSError, ValueError):
        return None


def _write_lookalikes(stream: TextIO | None) -> None:
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        codecs.register_error("advisor_lookalike", _lookalike)
        reconfigure(errors="advisor_lookalike")


def _lookalike(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: as many characters as it could not encode."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_LOOKALIKES.get(character, "?") for character in missing), error.end
