"""One reader a kind of file: each streams its rows with where they are."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError, first_line, shown
from advisor.training.data.json_array import read_array
from advisor.training.data.lines import open_bytes, read_lines
from advisor.training.data.objects import DECODER, TwinKeyError
from advisor.training.data.rows import MAX_ROW_BYTES, Place, RawRow, RowError
from advisor.training.data.samples import FORMATS, columns_of, recognise
from advisor.training.data.source import Kind

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

Reader = Callable[[Path, str], Iterator[RawRow]]


def read_jsonl(path: Path, name: str) -> Iterator[RawRow]:
    """An object a line; empty lines are nothing.

    Raises:
        InputError: it is a JSON array.
    """
    rows = 0
    for number, line in read_lines(path, name):
        if isinstance(line, str) and not line.strip():
            continue
        if not rows and isinstance(line, str) and line.lstrip().startswith("["):
            raise InputError(
                f"{name} is a JSON array, not JSON lines.",
                why="Each line of a .jsonl file is one object.",
                hint="Rename it to .json.",
            )
        rows += 1
        place = Place(file=name, number=number)
        yield RawRow(place, line if isinstance(line, RowError) else parse_object(line))


def parse_object(text: str) -> Mapping[str, Any] | RowError:
    """A JSON object, or why it is none."""
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        return RowError(f"not JSON: {error.msg} at column {error.colno:,}")
    except TwinKeyError as error:
        return RowError(str(error))
    except (RecursionError, ValueError):
        return RowError("not JSON that can be read: nested too deep, or a number too long")
    return value if isinstance(value, dict) else RowError(f"{shown(value, 24)} is not an object")


def read_json(path: Path, name: str) -> Iterator[RawRow]:
    """An array of objects, or what is really JSON lines.

    Raises:
        InputError: it is neither.
    """
    with open_bytes(path, name) as file:
        first = b""
        while not first and (block := file.read(2**16)):
            first = block.lstrip()[:1]
    if first == b"[":
        yield from read_array(path, name)
    elif first == b"{":
        _refuse_single_object(path, name)
        yield from read_jsonl(path, name)
    else:
        raise InputError(f"{name} holds neither a JSON array nor JSON objects.", hint="Write an array of objects.")


def _refuse_single_object(path: Path, name: str) -> None:
    """One object in the file is a row only if it looks like one.

    Raises:
        InputError: a dict of lists, or an object around the rows.
    """
    lines = (line for _, line in read_lines(path, name) if isinstance(line, RowError) or line.strip())
    first, second = next(lines, ""), next(lines, "")
    value = parse_object(first) if isinstance(first, str) else first
    if isinstance(value, Mapping) and (second or _is_row(value)):
        return
    if isinstance(value, RowError) and (not second or isinstance(second, RowError) or second.startswith("{")):
        return  # lines, of which the first says itself what is wrong with it
    if isinstance(value, RowError) and path.stat().st_size <= MAX_ROW_BYTES:
        value = parse_object(path.read_text("utf-8-sig", errors="replace"))
    columns = value if isinstance(value, Mapping) else {}
    lists = [shown(key, 24) for key, column in columns.items() if isinstance(column, list)]
    raise InputError(
        f"{name} is one object{', a dict of lists: ' + ', '.join(lists[:6]) if lists else ''}.",
        why="Rows are read from an array of objects, or from one object a line.",
        hint='Write [{"prompt": …, "completion": …}, …]; pandas does with to_json(orient="records").',
    )


def _is_row(value: Mapping[str, Any]) -> bool:
    """Whether a lone object is a row and not a table of columns."""
    layout = recognise(value)
    if layout is None:
        return False
    cells = [value[name] for name in FORMATS[layout]]
    return all(
        isinstance(cell, str) or (isinstance(cell, list) and all(isinstance(turn, dict) for turn in cell))
        for cell in cells
    )


def read_csv(path: Path, name: str) -> Iterator[RawRow]:
    """A header and rows, separated by commas, semicolons or tabs, whichever gives columns that are understood.

    Raises:
        InputError: the file is empty, its header cannot be read, or a quote is not closed.
    """
    csv.field_size_limit(MAX_ROW_BYTES)  # the module's own limit is 128 KiB, for the whole process
    lines = _CsvLines(path, name)
    header, delimiter = _csv_header(lines, name)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.bad = None
        place = Place(file=name, number=lines.number + 1)
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RawRow(place, lines.bad or _csv_reason(error, place))
            continue
        if fields:
            yield RawRow(place, _csv_row(header, fields))


def _csv_header(lines: _CsvLines, name: str) -> tuple[list[str], str]:
    """The columns' names, and what separates them."""
    try:
        first = next(lines)
        delimiter = _delimiter(first)
        header = [column.strip() for column in next(csv.reader([first], delimiter=delimiter, strict=True))]
    except (csv.Error, StopIteration) as error:
        raise InputError(
            f"The header of {name} cannot be read.", why=str(error), hint="The first line has the columns' names."
        ) from error
    _refuse_twins(name, header)
    return header, delimiter


def _refuse_twins(name: str, columns: Sequence[str]) -> None:
    """A dictionary would keep the last of several columns with one name, without a word.

    Raises:
        InputError: a column that is needed is there more than once.
    """
    twins = [column for column in columns_of(columns) if columns.count(column) > 1]
    if twins:
        raise InputError(
            f"{name} has more than one column called {', '.join(twins)}.",
            why="It cannot be told which of them is meant.",
            hint="Rename or remove the others.",
        )


def _csv_row(header: list[str], fields: list[str]) -> Mapping[str, Any] | RowError:
    if len(fields) != len(header):
        found = f"{len(fields)} field{'' if len(fields) == 1 else 's'}"
        return RowError(f"{found} where the header has {len(header)}: the columns are shifted")
    return dict(zip(header, fields, strict=True))


def _csv_reason(error: csv.Error, place: Place) -> RowError:
    """Why a row is not CSV.

    Raises:
        InputError: a quote stays open, so there is no telling where the next row starts.
    """
    if "unexpected end of data" in str(error) or "field larger" in str(error):
        raise InputError(f"{place}: a quote opens in this row and is not closed.", hint="Close it, or double it.")
    return RowError(f"not CSV: {error}")


def _delimiter(header: str) -> str:
    """The one that gives columns that are understood; the comma if none does."""
    for delimiter in (",", ";", "\t"):
        names = next(csv.reader([header], delimiter=delimiter))
        if recognise(name.strip() for name in names) is not None:
            return delimiter
    return ","


class _CsvLines:
    """Lines for csv.reader, with their ends; a line that cannot be read stops the row it is in."""

    def __init__(self, path: Path, name: str) -> None:
        self._lines = read_lines(path, name)
        self.number = 0
        self.bad: RowError | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, RowError):
            self.bad = line
            raise csv.Error(str(line))
        return line + "\n"


def read_parquet(path: Path, name: str) -> Iterator[RawRow]:
    """A thousand rows at a time, only the columns that are needed.

    Raises:
        InputError: it is not a Parquet file, or a part of it is damaged.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with open_bytes(path, name):
        pass
    try:
        with ParquetFile(path) as file:
            yield from _parquet_rows(file, name)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise InputError(f"{name} cannot be read as Parquet.", why=first_line(error)) from error


def _parquet_rows(file: ParquetFile, name: str) -> Iterator[RawRow]:
    found = file.schema_arrow.names
    _refuse_twins(name, found)
    number = 0
    for batch in file.iter_batches(batch_size=1000, columns=columns_of(found) or found):
        for row in _python_rows(batch):
            number += 1
            yield RawRow(Place(file=name, number=number, unit="row"), row)


def _python_rows(batch: RecordBatch) -> Iterable[Mapping[str, Any] | RowError]:
    """A batch's rows; Parquet does not make sure that its text is UTF-8."""
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return map(_python_row, (batch.slice(number, 1) for number in range(batch.num_rows)))


def _python_row(one: RecordBatch) -> Mapping[str, Any] | RowError:
    try:
        row: Mapping[str, Any] = one.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8: byte 0x{error.object[error.start]:02x}")
    return row


READERS: Mapping[Kind, Reader] = {
    "jsonl": read_jsonl,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
}


def reader_of(kind: Kind, path: Path, name: str) -> Iterator[RawRow]:
    """The rows of one file."""
    return partial(READERS[kind], path, name)()
