"""A JSON array of any size, an element at a time."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from advisor.errors import InputError, shown
from advisor.training.data.lines import open_bytes
from advisor.training.data.objects import DECODER, TwinKeyError
from advisor.training.data.rows import MAX_ROW_BYTES, Place, RawRow, RowError
from advisor.units import size

_BLOCK = 2**16
_BLANKS = " \t\r\n"


def read_array(path: Path, name: str) -> Iterator[RawRow]:
    """The elements of the array in a file, with the line on which each starts.

    Raises:
        InputError: the array is empty or ends early, is not UTF-8, or has an element that is not JSON or too long:
            there is no telling where the next one starts.
    """
    with open_bytes(path, name) as file:
        text = _Window(file, name)
        text.skip_blanks()
        text.take("[")
        if text.next() == "]":
            raise InputError(f"{name} is an empty array.")
        while True:
            place = Place(file=name, number=text.line)
            value = text.element()
            yield RawRow(place, value if isinstance(value, (Mapping, RowError)) else _not_an_object(value))
            if text.next() == "]":
                break
            text.take(",")
            text.skip_blanks()
        text.take("]")
        if text.next():
            raise text.error("there is more after the end of the array")


def _not_an_object(value: object) -> RowError:
    return RowError(f"{shown(value, 24)} is not an object")


class _Window:
    """The part of the text that is being read; what was taken is dropped."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0
        self.line = 1

    def next(self) -> str:
        """The next character that is not blank; nothing at the end."""
        self.skip_blanks()
        return self._text[self._at : self._at + 1]

    def skip_blanks(self) -> None:
        """Moves to the next character that is not blank."""
        while True:
            start = self._at
            while self._at < len(self._text) and self._text[self._at] in _BLANKS:
                self._at += 1
            self.line += self._text.count("\n", start, self._at)
            if self._at < len(self._text) or not self._read(_BLOCK):
                return

    def take(self, character: str) -> None:
        """Moves over a character that must be here."""
        if self.next() != character:
            raise self.error(f"{character!r} is missing")
        self._at += 1

    def element(self) -> Any:
        """The JSON value that starts here; a RowError for one that ends where it should, but cannot be used."""
        block = _BLOCK
        while True:
            try:
                value, end = self._decode()
            except json.JSONDecodeError as error:
                if not self._read(block):
                    raise self.error(f"{error.msg[:1].lower()}{error.msg[1:]}", error.pos) from error
                if len(self._text) - self._at > MAX_ROW_BYTES:
                    raise self.error(f"an element is not JSON, or longer than {size(MAX_ROW_BYTES)}") from error
                block *= 2
                continue
            except (RecursionError, ValueError) as error:
                raise self.error("an element is nested too deep, or has a number that is too long") from error
            if end == len(self._text) and self._read(_BLOCK):
                continue  # a number may go on
            self.line += self._text.count("\n", self._at, end)
            self._at = end
            return value

    def _decode(self) -> tuple[Any, int]:
        try:
            return DECODER.raw_decode(self._text, self._at)
        except TwinKeyError as error:
            return RowError(str(error)), json.JSONDecoder().raw_decode(self._text, self._at)[1]

    def error(self, why: str, position: int | None = None) -> InputError:
        """What is wrong, and on which line."""
        line = self.line + (self._text.count("\n", self._at, position) if position is not None else 0)
        return InputError(
            f"{self._name} cannot be read as JSON beyond line {line:,}.",
            why=f"On line {line:,}, {why}.",
            hint="Mend the file there; in JSON lines one bad row does not spoil the others.",
        )

    def _read(self, size_bytes: int) -> bool:
        """Reads on; whether there was anything."""
        block = self._file.read(size_bytes)
        try:
            more = self._utf8.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise self.error(f"or after it, byte 0x{error.object[error.start]:02x} is not UTF-8") from error
        self._text = self._text[self._at :] + more
        self._at = 0
        return bool(block)
