"""A source, tokenised: how long its rows are, and what carries loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from advisor.training.data.lengths import LengthSummary
from advisor.training.data.rows import BadRows
from advisor.training.data.samples import Format
from advisor.training.data.stream import RowStream
from advisor.training.data.tokens import TokenizedRow, tokenize_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedExample:
    """One row as the model sees it."""

    pieces: tuple[tuple[str, bool], ...]
    """Its text in order, each piece with whether it carries loss."""

    tokens: int
    learned: int
    """Tokens that carry loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedSource:
    """The rows of a source that can be trained on, uncut."""

    rows: tuple[TokenizedRow, ...]
    format: Format
    lengths: LengthSummary
    bad: BadRows
    """Rows left out because they cannot be used."""

    notes: tuple[str, ...]
    """What else a person should know."""


def tokenize_source(source: str, tokenizer: Any, *, context: int, skip_bad_rows: bool) -> TokenizedSource:
    """Reads and tokenises a source.

    Args:
        source: a file, a folder, the name of a data set that comes with the package, or a hub id.
        tokenizer: from `load_tokenizer`.
        context: tokens that the model can see at once.
        skip_bad_rows: leave bad rows out instead of refusing them.

    Raises:
        InputError: the source cannot be read, or has bad rows or no good ones.
        EnvironmentLacksError: the hub cannot be reached.
    """
    stream = RowStream(source)
    rows = tuple(tokenize_rows(stream, tokenizer, context=context, bad=stream.bad))
    bad = stream.bad.summary()
    if not skip_bad_rows or not rows:
        bad.refuse(source, stream.read)
    assert stream.format is not None
    lengths = LengthSummary(np.sort(np.array([len(row.ids) for row in rows], dtype=np.int64)))
    return TokenizedSource(rows=rows, format=stream.format, lengths=lengths, bad=bad, notes=stream.notes)


def mark_example(row: TokenizedRow, tokenizer: Any) -> MarkedExample:
    """The row as text again, in pieces that carry loss and pieces that do not."""
    edges = [0, *(np.flatnonzero(np.diff(row.learned)) + 1).tolist(), len(row.ids)]
    pieces: list[tuple[str, bool]] = []
    written = ""
    for start, stop in pairwise(edges):
        text = tokenizer.decode(row.ids[:stop].tolist(), clean_up_tokenization_spaces=False)
        # A decoder may treat a text's first and last characters specially; then the piece is decoded alone.
        piece = text[len(written) :] if text.startswith(written) else tokenizer.decode(row.ids[start:stop].tolist())
        pieces.append((piece, bool(row.learned[start])))
        written = text
    return MarkedExample(pieces=tuple(pieces), tokens=len(row.ids), learned=int(row.learned.sum()))
