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
    from advisor.training.data.handover import drop_tokens, leave_tokens, source_key, take_tokens
    from advisor.training.data.lengths import LengthSummary
    from advisor.training.data.order import LengthSampler
    from advisor.training.data.packing import PackingGain, packing_gain
    from advisor.training.data.prepare import ChosenRows, PreparedData, choose_rows, prepare_data
    from advisor.training.data.survey import MarkedExample, TokenizedSource, mark_example, tokenize_source

__all__ = [
    "FORMATS",
    "ArrayRows",
    "BadRow",
    "BadRows",
    "ChosenRows",
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
    "choose_rows",
    "drop_tokens",
    "leave_tokens",
    "mark_example",
    "packing_gain",
    "prepare_data",
    "source_key",
    "take_tokens",
    "tokenize_source",
]

_LAZY = {
    "ArrayRows": "arrays",
    "ChosenRows": "prepare",
    "Collator": "collate",
    "LengthSampler": "order",
    "LengthSummary": "lengths",
    "MarkedExample": "survey",
    "PackingGain": "packing",
    "PreparedData": "prepare",
    "TokenizedSource": "survey",
    "choose_rows": "prepare",
    "drop_tokens": "handover",
    "leave_tokens": "handover",
    "mark_example": "survey",
    "packing_gain": "packing",
    "prepare_data": "prepare",
    "source_key": "handover",
    "take_tokens": "handover",
    "tokenize_source": "survey",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
