"""Rows as they were read, and those that cannot be used: where they are, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from advisor.errors import InputError

SHOWN = 10
"""Bad rows that are listed; all are counted."""

MAX_ROW_BYTES = 8 * 2**20
"""A longer row is not read into memory: it is millions of tokens, more than any context."""

_LONGEST_REASON = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a row is."""

    file: str
    """The file's name inside the source, or the hub id."""

    number: int
    """The line on which it starts, from 1; the row where there are no lines."""

    unit: Literal["line", "row"] = "line"
    """What `number` counts."""

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """One row that cannot be used."""

    place: Place
    why: str
    """A phrase that a person can act on."""

    def __str__(self) -> str:
        return f"{self.place}: {self.why}"


class RowError(ValueError):
    """Why one row cannot be used; becomes a `BadRow` and never leaves this package."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row of a file: its columns, or why there are none."""

    place: Place
    columns: Mapping[str, Any] | RowError


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRows:
    """All bad rows of a source: the first few, and how many there are."""

    count: int
    shown: tuple[BadRow, ...]

    def refuse(self, source: str, rows: int) -> None:
        """Raises if there are any.

        Args:
            source: what was read.
            rows: how many rows there were, good or bad.

        Raises:
            InputError: lists the first of them.
        """
        if not self.count:
            return
        lines = [str(row) for row in self.shown]
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines):,} more")
        raise InputError(
            f"{self.count:,} of {rows:,} rows of {source} cannot be used.",
            why="\n".join(lines),
            hint="Mend them, or leave them out with --skip-bad-rows.",
        )


@dataclass(slots=True)
class BadRowLog:
    """Collects bad rows while a source is read."""

    count: int = 0
    shown: list[BadRow] = field(default_factory=list)

    def add(self, place: Place, why: RowError) -> None:
        """Counts a row, and keeps it if it is among the first."""
        self.count += 1
        if len(self.shown) < SHOWN:
            text = str(why)
            cut = text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
            self.shown.append(BadRow(place=place, why=cut))

    def summary(self) -> BadRows:
        """What was collected so far."""
        return BadRows(count=self.count, shown=tuple(self.shown))
