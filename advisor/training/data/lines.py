"""Lines of a file, one at a time, none of them held in memory beyond a bound."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from advisor.errors import InputError
from advisor.training.data.rows import MAX_ROW_BYTES, RowError
from advisor.units import size

_CHUNK = 2**20
_GZIP = b"\x1f\x8b\x08"
"""What such a file begins with. Source: RFC 1952, 2.3.1."""


def read_lines(path: Path, name: str) -> Iterator[tuple[int, str | RowError]]:
    """Numbered lines without their ends; a line that is not UTF-8 or too long comes as the reason why.

    A byte order mark is dropped, and carriage returns before a line's end are.

    Raises:
        InputError: the file is empty, cannot be opened, or is UTF-16.
    """
    with open_bytes(path, name) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                length = len(line) + _skip_line(file)
                yield number, RowError(f"{size(length)} long; at most {size(MAX_ROW_BYTES)} are read")
            else:
                yield number, decode(line)


def decode(line: bytes) -> str | RowError:
    """A line as text, or why it is none."""
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1:,}")


def _skip_line(file: BinaryIO) -> int:
    """Reads on to the line's end; returns its bytes."""
    skipped = 0
    while block := file.read(_CHUNK):
        end = block.find(b"\n") + 1
        if end:
            file.seek(end - len(block), os.SEEK_CUR)
            return skipped + end
        skipped += len(block)
    return skipped


def open_bytes(path: Path, name: str) -> BinaryIO:
    """The file after its byte order mark.

    Raises:
        InputError: the file is empty, cannot be opened, or is UTF-16 or compressed.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{name} cannot be opened.", why=str(error)) from error
    start = file.read(3)
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.close()
        raise InputError(f"{name} is UTF-16.", hint="Save it as UTF-8.")
    if start == _GZIP:
        file.close()
        raise InputError(f"{name} is compressed.", hint="Unpack it; its own name then says what it holds.")
    if not start.strip(codecs.BOM_UTF8) and not file.read(1):
        file.close()
        raise InputError(f"{name} is empty.")
    file.seek(len(codecs.BOM_UTF8) if start == codecs.BOM_UTF8 else 0)
    return file
