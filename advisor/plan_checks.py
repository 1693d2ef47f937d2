"""Checks that the fields of a plan share: each raises a `PlanError` that names the field."""

from __future__ import annotations

from advisor.errors import PlanError, shown

_LARGEST = {
    "micro_batch": 2**16,
    "gradient_accumulation": 2**20,
    "seq_len": 2**22,
    "rank": 2**14,
    "alpha": 2**20,
    "max_steps": 2**31 - 1,
    "seed": 2**32 - 1,
}
_LONGEST_NAME = 4096


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """One of a closed set."""
    if not isinstance(value, str) or value not in choices:
        raise PlanError(field, f"{shown(value)} is not one of {', '.join(choices)}", hint=f"Write {choices[0]}, say.")


def check_int(field: str, value: object) -> None:
    """A whole number from 1 up to the field's limit."""
    largest = _LARGEST[field.rpartition(".")[2]]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise PlanError(
            field, f"{shown(value)} is not a whole number from 1 to {largest:,}", hint="Write a number in that range."
        )


def check_bool(field: str, value: object) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise PlanError(field, f"{shown(value)} is neither true nor false", hint="Write true or false, without quotes.")


def check_text(field: str, value: object) -> None:
    """A short text."""
    if not isinstance(value, str) or not value.strip() or len(value) > _LONGEST_NAME or "\0" in value:
        raise PlanError(field, f"{shown(value)} is not a name", hint="Write a short text in quotes.")


def check_number(field: str, value: object, *, above: float, up_to: float) -> None:
    """A number above one bound and up to another."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value <= up_to:
        raise PlanError(
            field, f"{shown(value)} is not a number above {above:g} and up to {up_to:g}", hint="Write such a number."
        )
