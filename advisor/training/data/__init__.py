"""Files or hub ids → tokenised examples with loss masks, split, packed, ordered and batched.

`check_rows` needs neither a tokenizer nor torch, so that a preflight can afford it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from advisor.training.data.rows import BadRow, BadRows, Place
from advisor.training.data.samples import FORMATS, Format
from advisor.training.data.stream import RowStream, RowSummary, check_rows

if TYPE_CHECKING:
    from advisor.training.data.arrays import ArrayRows
    from advisor.training.data.collate import Collator
    from advisor.training.data.lengths import LengthSummary
    from advisor.training.data.order import LengthSampler
    from advisor.training.data.packing import PackingGain, packing_gain
    from advisor.training.data.prepare import PreparedData, prepare_data
    from advisor.training.data.survey import MarkedExample, TokenizedSource, mark_example, tokenize_source

__all__ = [
    "FORMATS",
    "ArrayRows",
    "BadRow",
    "BadRows",
    "Collator",
    "Format",
    "LengthSampler",
    "LengthSummary",
    "MarkedExample",
    "PackingGain",
    "Place",
    "PreparedData",
    "RowStream",
    "RowSummary",
    "TokenizedSource",
    "check_rows",
    "mark_example",
    "packing_gain",
    "prepare_data",
    "tokenize_source",
]

_LAZY = {
    "ArrayRows": "arrays",
    "Collator": "collate",
    "LengthSampler": "order",
    "LengthSummary": "lengths",
    "MarkedExample": "survey",
    "PackingGain": "packing",
    "PreparedData": "prepare",
    "TokenizedSource": "survey",
    "mark_example": "survey",
    "packing_gain": "packing",
    "prepare_data": "prepare",
    "tokenize_source": "survey",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
