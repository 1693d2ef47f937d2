"""What a training needs to know of its data before it can be planned: lengths, packing, the first example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advisor.training.data import MarkedExample, TokenizedSource

PERCENTILES = (50, 90, 95, 99, 100)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenized:
    """A data set's rows, and the key that tells whether another process would read the same."""

    rows: TokenizedSource
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """A data set as one model's tokenizer sees it."""

    source: str
    format: str
    train_samples: int
    validation_samples: int
    tokens: int
    """Of all samples together, before any is cut."""

    percentiles: tuple[tuple[int, int], ...]
    """Percent of the samples, and the tokens that they do not exceed."""

    lengths: tuple[int, ...]
    """Of all samples, shortest first."""

    seq_len: int
    """Tokens after which a sample is cut."""

    truncated: int
    """Samples that it cuts."""

    left_out: int
    """Samples that are left out: rows that cannot be used, and rows whose answer lies beyond the cut."""

    first: MarkedExample
    notes: tuple[str, ...]
    tokenized: Tokenized | None = None
    """What the training process need not tokenise again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Whether several samples go into a row, and what that makes of the batch."""

    packs: bool
    reason: str
    samples_a_row: float
    effective_batch: int
    """Rows to an optimizer step, so that about as many samples as were asked for make one."""


def read_data(
    source: str,
    model_path: str,
    *,
    seq_len: int | None,
    context: int,
    validation: float,
    seed: int,
    skip_bad_rows: bool,
    trust_remote_code: bool,
    tokenizer: Any = None,
) -> DataFacts:
    """Tokenises a data set as the training will, and keeps what is worth knowing.

    Args:
        source: a file, a folder or a hub id.
        model_path: where the tokenizer is.
        seq_len: tokens in the longest sequence; None takes the 95th percentile rounded up.
        context: tokens that the model can see at once.
        validation: share of the rows that is held out.
        seed: of the split.
        skip_bad_rows: leave bad rows out instead of refusing them.
        trust_remote_code: whether the tokenizer's own code may run.
        tokenizer: the model's, where it is loaded already.

    Raises:
        InputError: rows that cannot be used, or no tokenizer.
        EnvironmentLacksError: the hub cannot be reached.
    """
    from advisor.training.data import choose_rows, source_key
    from advisor.training.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model_path, trust_remote_code) if tokenizer is None else tokenizer
    key = source_key(source, tokenizer, context=context, skip_bad_rows=skip_bad_rows)
    chosen = choose_rows(
        source,
        tokenizer,
        seq_len=seq_len,
        validation=validation,
        seed=seed,
        skip_bad_rows=skip_bad_rows,
        context=context,
    )
    found = chosen.found
    return DataFacts(
        source=source,
        format=found.format,
        train_samples=len(chosen.train),
        validation_samples=len(chosen.validation),
        tokens=found.lengths.tokens,
        percentiles=tuple((percent, found.lengths.percentile(percent)) for percent in PERCENTILES),
        lengths=tuple(found.lengths.ordered.tolist()),
        seq_len=chosen.seq_len,
        truncated=chosen.truncated,
        left_out=chosen.unlearnable + found.bad.count,
        first=chosen.first,
        notes=found.notes,
        tokenized=Tokenized(rows=found, key=key),
    )


def choose_packing(facts: DataFacts, *, asked: bool | None, micro_batch: int, effective_batch: int) -> Packing:
    """Whether rows are packed: as asked, or else where that saves tokens.

    Args:
        facts: the data.
        asked: what was said; None leaves it to what it saves.
        micro_batch: rows that would go through the model at once without packing.
        effective_batch: samples to an optimizer step.
    """
    from advisor.training.data import packing_gain

    gain = packing_gain(facts.lengths, facts.seq_len, micro_batch)
    each = gain.rows / gain.packed_rows
    packs = gain.pays if asked is None else asked
    said = {None: gain.reason, True: f"Packing was asked for. {gain.reason}", False: "Packing was turned off."}
    return Packing(
        packs=packs,
        reason=said[asked],
        samples_a_row=each if packs else 1.0,
        effective_batch=max(1, round(effective_batch / each)) if packs else effective_batch,
    )


__all__ = ["DataFacts", "Packing", "choose_packing", "read_data"]
