"""Strings → tokens, and which of them carry loss: one tokenisation of each whole string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from advisor.training.data.chat import Rendered, Renderer
from advisor.training.data.literal import SpecialTokens
from advisor.training.data.rows import BadRowLog, Place, RowError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from advisor.training.data.samples import Sample

    Ids = NDArray[np.int32]
    Flags = NDArray[np.bool_]

MASKED = -100
"""The label of a token that carries no loss. Source: torch.nn.functional.cross_entropy (ignore_index)."""

_BATCH = 512


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedRow:
    """One sample's tokens; the first never carries loss, because nothing predicts it."""

    ids: Ids
    learned: Flags

    def cut(self, seq_len: int) -> TokenizedRow:
        """Its first tokens."""
        return self if len(self.ids) <= seq_len else TokenizedRow(self.ids[:seq_len], self.learned[:seq_len])


def tokenize_rows(
    samples: Iterable[tuple[Place, Sample]], tokenizer: Any, *, context: int, bad: BadRowLog
) -> Iterator[TokenizedRow]:
    """The rows that can be trained on, in order; the others go to `bad`.

    Args:
        samples: where each is, and what it is.
        tokenizer: a fast tokenizer of transformers.
        context: tokens that the model can see at once.
        bad: takes rows that no template renders, that have no loss, or that are longer than the context.
    """
    special = SpecialTokens(tokenizer)
    rendered = _render(samples, Renderer(tokenizer, special), bad)
    tokenize = _Tokenize(tokenizer, special)
    while some := list(islice(rendered, _BATCH)):
        rows = tokenize([row for _, row in some])
        for (place, _), row in zip(some, rows, strict=True):
            if len(row.ids) > context:
                bad.add(place, RowError(f"{len(row.ids):,} tokens; the model's context is {context:,}"))
            elif not row.learned.any():
                bad.add(place, RowError("no token of it carries loss"))
            else:
                yield row


def _render(
    samples: Iterable[tuple[Place, Sample]], renderer: Renderer, bad: BadRowLog
) -> Iterator[tuple[Place, Rendered]]:
    for place, sample in samples:
        try:
            yield place, renderer.render(sample)
        except RowError as error:
            bad.add(place, error)


class _Tokenize:
    """Strings → rows, a batch at a time."""

    def __init__(self, tokenizer: Any, special: SpecialTokens) -> None:
        self._tokenizer = tokenizer
        self._special = special
        ids = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._swallows = np.zeros(max(len(tokenizer), *ids, 0) + 1, dtype=np.bool_)
        self._swallows[ids] = True

    def __call__(self, rows: Sequence[Rendered]) -> list[TokenizedRow]:
        """All rows are of one format, so all are plain or none is."""
        texts = ["" if row.hidden else row.text for row in rows]
        encoded = self._tokenizer(texts, add_special_tokens=rows[0].plain, verbose=False).encodings
        return [self._mark(row, encoding) for row, encoding in zip(rows, encoded, strict=True)]

    def _mark(self, row: Rendered, encoding: Any) -> TokenizedRow:
        ids, characters = encoding.ids, encoding.offsets
        if row.hidden:
            ids, characters = self._special.encode_hidden(row.text)
        ids = np.asarray(ids, dtype=np.int32)
        offsets = np.array(characters, dtype=np.int64).reshape(-1, 2)
        learned = learned_tokens(offsets, row.learned, self._swallows[ids])
        if row.plain:
            ids, learned = _bounded(ids, learned, self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        learned[:1] = False
        return TokenizedRow(ids, learned)


def learned_tokens(offsets: NDArray[np.int64], spans: Iterable[tuple[int, int]], swallows: Flags) -> Flags:
    """Which tokens stand for a character of a span.

    A special token that begins before a span has only swallowed the blanks at its start (`rstrip`), and is not
    learned. A token without characters, such as the blank that Llama's tokenizer puts first, goes with its place.

    Args:
        offsets: characters that each token stands for, shape (tokens, 2).
        spans: characters that are learned.
        swallows: which tokens are special, shape (tokens,).
    """
    starts, stops = offsets[:, 0], offsets[:, 1]
    stops = np.maximum(stops, starts + 1)
    learned = np.zeros(len(offsets), dtype=np.bool_)
    for start, stop in spans:
        learned |= (stops > start) & (starts < stop) & ~(swallows & (starts < start))
    return learned


def _bounded(ids: Ids, learned: Flags, bos: int | None, eos: int | None) -> tuple[Ids, Flags]:
    """One start and one end of text."""
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        ids, learned = ids[1:], learned[1:]
    if eos is not None:
        if not len(ids) or ids[-1] != eos:
            ids, learned = np.append(ids, np.int32(eos)), np.append(learned, True)
        learned[-1] = True
    return ids, learned
