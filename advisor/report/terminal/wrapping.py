"""Lines that fit a screen, counted in cells: a Japanese character takes two, and a line may break beside most of them.

Latin words, paths and options are broken at blanks only. Between Japanese characters a line may break, except where
that would put a closing mark or a small kana at its beginning, or an opening mark at its end (JIS X 4051's kinsoku); a
run of katakana is one word and stays whole where it has room, and so does a number with its unit.
"""

from __future__ import annotations

import re
import textwrap

from rich.cells import cell_len

SHORT_FACT = 32
"""Cells of a fact that is not broken."""

JOINT = "\N{NO-BREAK SPACE}· "
"""Between facts side by side; the dot stays at the end of its line."""

_NO_LINE_BEGINS_WITH = frozenset(
    "、。，．・：；！？）」』】〉》〕］｝…‥ー々ゝゞぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ)]},.:;!?%»"
)
_NO_LINE_ENDS_WITH = frozenset("（「『【〈《〔［｛([{«")
_KATAKANA = r"[ァ-ヺー・]"
_WIDE = r"[⺀-鿿가-힯豈-﫿︰-﹏＀-｠￠-￦]"
_PIECE = re.compile(
    # A number and its unit; katakana; one wide character; anything else up to a blank or a wide character; blanks.
    rf"[\d.,]+\ (?:[KMGT]i?B|B|TFLOP/s|tokens/s|GB/s|bit|min|h|s)(?![A-Za-z])|{_KATAKANA}{{2,10}}|{_WIDE}"
    rf"|(?:(?!{_WIDE})[^ ])+|\ +"
)


def wrap_lines(text: str, width: int, *, first: str = "", rest: str = "") -> list[str]:
    """Text in lines of at most that many cells, except where one word is longer.

    Args:
        text: one paragraph.
        width: cells.
        first: what comes before it on its first line.
        rest: what comes before it on every other line.
    """
    if cell_len(first + rest + text) == len(first + rest + text):
        lines = textwrap.wrap(
            text,
            width,
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return lines or [first.rstrip()]
    lines, line, is_empty = [], first, True
    for piece in _unbreakable(text):
        if is_empty or cell_len(line + piece.rstrip(" ")) <= width:
            line, is_empty = line + (piece if not is_empty or line == first else piece.lstrip(" ")), False
        else:
            lines.append(line.rstrip(" "))
            line, is_empty = rest + piece.lstrip(" "), not piece.strip(" ")
    return [*lines, line.rstrip(" ")]


def _unbreakable(text: str) -> list[str]:
    """Pieces between which a line may break; the blanks behind a piece are its own."""
    pieces: list[str] = []
    for fact in text.replace(JOINT, f"{JOINT}\0").split("\0"):  # facts side by side: a short one stays whole
        pieces += [fact] if JOINT in text and cell_len(fact) <= SHORT_FACT else _pieces(fact)
    return pieces


def _pieces(text: str) -> list[str]:
    pieces: list[str] = []
    for piece in _PIECE.findall(text):
        if pieces and (_may_not_begin_a_line(piece, pieces[-1]) or pieces[-1][-1] in _NO_LINE_ENDS_WITH):
            pieces[-1] += piece
        else:
            pieces.append(piece)
    return pieces


def _may_not_begin_a_line(piece: str, before: str) -> bool:
    return piece.isspace() or (piece[0] in _NO_LINE_BEGINS_WITH and not before.endswith(" "))


def pad(text: str, width: int) -> str:
    """Text with blanks up to a width in cells."""
    return text + " " * max(0, width - cell_len(text))


__all__ = ["pad", "wrap_lines"]
