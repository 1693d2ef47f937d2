"""A source → tokenised rows for training and validation, with what a person should see before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from advisor.errors import InputError
from advisor.training.data.lengths import LengthSummary
from advisor.training.data.packing import pack
from advisor.training.data.rows import BadRows
from advisor.training.data.samples import Format
from advisor.training.data.survey import MarkedExample, TokenizedSource, mark_example, tokenize_source
from advisor.training.data.tokens import MASKED, TokenizedRow

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """What a training reads, and what it says about it first."""

    train: Dataset
    """Columns input_ids, labels, length; position_ids too when packed."""

    validation: Dataset | None
    format: Format
    lengths: LengthSummary
    """Of all samples, before they are cut or packed."""

    first: MarkedExample
    seq_len: int
    truncated: int
    """Samples that `seq_len` cuts."""

    unlearnable: int
    """Samples left out because nothing that carries loss is within `seq_len`."""

    bad: BadRows
    """Rows left out because they cannot be used."""

    train_samples: int
    validation_samples: int
    pad_token_id: int
    notes: tuple[str, ...]

    @property
    def fill(self) -> float:
        """Share of the training rows' room that holds samples."""
        tokens: int = sum(self.train["length"])
        return tokens / (len(self.train) * self.seq_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenRows:
    """A source's rows, cut and split."""

    found: TokenizedSource
    train: list[TokenizedRow]
    validation: list[TokenizedRow]
    first: MarkedExample
    seq_len: int
    truncated: int
    """Samples that `seq_len` cuts."""

    unlearnable: int
    """Samples left out because nothing that carries loss is within `seq_len`."""


def choose_rows(
    source: str,
    tokenizer: Any,
    *,
    seq_len: int | None,
    validation: float,
    seed: int,
    skip_bad_rows: bool,
    context: int,
    tokens: TokenizedSource | None = None,
) -> ChosenRows:
    """Reads, tokenises, cuts and splits a source.

    Args:
        source: a file, a folder or a hub id.
        tokenizer: from `load_tokenizer`.
        seq_len: tokens after which a row is cut; None takes the 95th percentile rounded up.
        validation: share of the samples that is held out.
        seed: of the split.
        skip_bad_rows: leave bad rows out instead of refusing them.
        context: tokens that the model can see at once.
        tokens: the source, where it is tokenised already.

    Raises:
        InputError: the source cannot be read, has bad rows, or nothing in it can be learned.
        EnvironmentLacksError: the hub cannot be reached.
    """
    if seq_len is not None and seq_len > context:
        raise InputError(f"A sequence length of {seq_len:,} is more than the model's context of {context:,}.")
    found = tokens or tokenize_source(source, tokenizer, context=context, skip_bad_rows=skip_bad_rows)
    chosen = found.lengths.fitting_seq_len(context) if seq_len is None else seq_len
    kept = [cut for row in found.rows if (cut := row.cut(chosen)).learned.any()]
    if not kept:
        raise InputError(
            f"Nothing that carries loss is within the first {chosen:,} tokens of any row of {source}.",
            why=f"The rows have up to {found.lengths.longest:,} tokens, and answers come last.",
            hint="Give a larger --seq-len.",
        )
    train, held_out = split(len(kept), validation, seed)
    return ChosenRows(
        found=found,
        train=[kept[i] for i in train],
        validation=[kept[i] for i in held_out],
        first=mark_example(kept[0], tokenizer),
        seq_len=chosen,
        truncated=found.lengths.truncated(chosen),
        unlearnable=len(found.rows) - len(kept),
    )


def prepare_data(source: str, tokenizer: Any, *, packing: bool, **settings: Any) -> PreparedData:
    """Reads, tokenises, splits and packs a source.

    Args:
        source: a file, a folder or a hub id.
        tokenizer: from `load_tokenizer`.
        packing: lay several samples end to end in a row.
        settings: those of `choose_rows`.

    Raises:
        InputError: the source cannot be read, has bad rows, or nothing in it can be learned.
        EnvironmentLacksError: the hub cannot be reached.
    """
    chosen = choose_rows(source, tokenizer, **settings)
    packed_to = chosen.seq_len if packing else None
    return PreparedData(
        train=_dataset(chosen.train, packed_to),
        validation=_dataset(chosen.validation, packed_to) if chosen.validation else None,
        format=chosen.found.format,
        lengths=chosen.found.lengths,
        first=chosen.first,
        seq_len=chosen.seq_len,
        truncated=chosen.truncated,
        unlearnable=chosen.unlearnable,
        bad=chosen.found.bad,
        train_samples=len(chosen.train),
        validation_samples=len(chosen.validation),
        pad_token_id=tokenizer.pad_token_id,
        notes=chosen.found.notes,
    )


def split(rows: int, validation: float, seed: int) -> tuple[list[int], list[int]]:
    """Shuffled indices to train on, and those held out: at least one of each where a share is asked for."""
    order = np.random.default_rng(seed).permutation(rows).tolist()
    held_out = min(max(round(rows * validation), 1), rows - 1) if validation > 0 else 0
    return order[held_out:], order[:held_out]


def _dataset(rows: list[TokenizedRow], packed_to: int | None) -> Dataset:
    """Arrow lists without a copy to Python objects."""
    import pyarrow
    from datasets import Dataset

    groups = [[i] for i in range(len(rows))] if packed_to is None else pack([len(row.ids) for row in rows], packed_to)
    in_order = [rows[i] for group in groups for i in group]
    lengths = np.array([sum(len(rows[i].ids) for i in group) for group in groups], dtype=np.int64)
    ids = np.concatenate([row.ids for row in in_order])
    learned = np.concatenate([row.learned for row in in_order])
    columns = {"input_ids": ids, "labels": np.where(learned, ids, np.int32(MASKED))}
    if packed_to is not None:
        columns["position_ids"] = np.concatenate([np.arange(len(row.ids), dtype=np.int32) for row in in_order])
    offsets = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]), pyarrow.int64())
    lists = {
        name: pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(values)) for name, values in columns.items()
    }
    return Dataset(pyarrow.table({**lists, "length": pyarrow.array(lengths)}))
