"""What a person asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from advisor.errors import InputError, shown
from advisor.plan import Method

Prefer = Literal["quality", "balanced", "speed", "memory"]

DEFAULT_MODEL = "phi-3-mini-4k"
"""What is fine-tuned where nobody says."""

DATA_FILE = "train.jsonl"
"""What a command calls data that nobody named yet."""

PLAN_FILE = "plan.toml"
"""What the next command writes the plan to."""

LARGEST_EFFECTIVE_BATCH = 2**16


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a person asks for, beside the model and the GPU."""

    seq_len: int = 2048
    effective_batch: int = 16
    lora_rank: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    prefer: Prefer = "balanced"
    tokens: int | None = None
    """Tokens that the run trains on, for its duration."""

    method: Method | None = None
    """The one to take; None leaves it to the recommendation."""

    packing: bool = False
    """Rows are several samples end to end; a sequence is then such a row."""

    def __post_init__(self) -> None:
        if not _is_number(self.effective_batch) or self.effective_batch > LARGEST_EFFECTIVE_BATCH:
            raise InputError(
                f"An effective batch of {shown(self.effective_batch)} is not from 1 to {LARGEST_EFFECTIVE_BATCH:,}.",
                hint="Most runs take 8 to 128.",
            )
        if self.prefer not in get_args(Prefer):
            raise InputError(
                f"{shown(self.prefer)} is nothing that an answer can prefer.",
                hint=f"Choose {', '.join(get_args(Prefer))}.",
            )
        if self.tokens is not None and not _is_number(self.tokens):
            raise InputError(f"{shown(self.tokens)} is not a number of tokens.", hint="Write a number above zero.")


__all__ = ["DATA_FILE", "DEFAULT_MODEL", "PLAN_FILE", "Prefer", "Request"]
