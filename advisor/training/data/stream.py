"""The rows of a source, streamed: recognised, parsed, and the bad ones set aside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from advisor.errors import InputError
from advisor.training.data.hub import read_hub
from advisor.training.data.readers import reader_of
from advisor.training.data.rows import BadRowLog, BadRows, Place, RawRow, RowError
from advisor.training.data.samples import Format, Sample, named, parse_sample, recognise, refuse_columns
from advisor.training.data.source import Files, find_source, some

_STRANGERS = 1000
"""Rows at a source's start with columns of no format after which the others are not waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSummary:
    """What a source holds."""

    rows: int
    """Rows that can be used."""

    format: Format
    bad: BadRows
    notes: tuple[str, ...]
    """What else a person should know."""


class RowStream:
    """The rows of a file, folder or hub id; iterating reads them.

    Args:
        source: as the person wrote it.

    Raises:
        InputError: there is nothing of that name, or it is of no kind that is understood.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.format: Format | None = None
        self.bad = BadRowLog()
        self.read = 0
        """Rows read so far, good and bad."""
        self._origin = find_source(source)
        self._strangers = 0
        self._refusal: InputError | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What else a person should know about the source."""
        left_out = self._origin.left_out if isinstance(self._origin, Files) else ()
        return (f"Left out, by their names: {some(left_out)}.",) if left_out else ()

    def __iter__(self) -> Iterator[tuple[Place, Sample]]:
        """The good rows.

        Raises:
            InputError: a file cannot be read at all, or its columns mean nothing here.
            EnvironmentLacksError: the hub cannot be reached.
        """
        for row in self._raw_rows():
            self.read += 1
            try:
                yield row.place, self._parse(row)
            except RowError as error:
                self.bad.add(row.place, error)
        if not self.read:
            raise InputError(f"{self.source} holds no rows.")
        if self._refusal is not None and self._strangers == self.read:
            raise self._refusal

    def _raw_rows(self) -> Iterator[RawRow]:
        if not isinstance(self._origin, Files):
            return read_hub(self._origin)
        files = self._origin
        return chain.from_iterable(reader_of(files.kind, path, files.name(path)) for path in files.paths)

    def _parse(self, row: RawRow) -> Sample:
        if isinstance(row.columns, RowError):
            raise row.columns
        if self.format is None:
            self.format = recognise(row.columns)
            if self.format is None:
                raise self._stranger(row, row.columns)
        return parse_sample(self.format, row.columns)

    def _stranger(self, row: RawRow, columns: Iterable[str]) -> Exception:
        """What is wrong with columns of no format: where each row has its own, only the row, unless all are so."""
        self._strangers += 1
        self._refusal = self._refusal or refuse_columns(str(row.place), columns)
        each_its_own = isinstance(self._origin, Files) and self._origin.kind in ("jsonl", "json")
        if not each_its_own or self._strangers == _STRANGERS:
            return self._refusal
        return RowError(f"its columns are not understood: {named(columns, 4)}")


def check_rows(source: str, *, skip_bad_rows: bool = False) -> RowSummary:
    """Reads a source to its end, keeping nothing.

    Raises:
        InputError: it cannot be read, has bad rows that may not be skipped, or has no good ones.
        EnvironmentLacksError: the hub cannot be reached.
    """
    stream = RowStream(source)
    good = sum(1 for _ in stream)
    bad = stream.bad.summary()
    if not skip_bad_rows or not good:
        bad.refuse(source, stream.read)
    assert stream.format is not None
    return RowSummary(rows=good, format=stream.format, bad=bad, notes=stream.notes)
