"""Asking drivers, which fail in more ways than anyone lists.

NVML alone has thirty kinds of error, an unloadable library raises OSError, and a name that is not UTF-8 raises its own.
A device that cannot answer one question can still answer the others, so a failed query is a value here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


def attempt(query: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> tuple[_T, None] | tuple[None, Exception]:
    """The query's answer, or the error that came instead."""
    try:
        return query(*args, **kwargs), None
    except Exception as error:  # noqa: BLE001 - the top of this file says why
        return None, error


def ask(source: Any, question: str, *args: Any) -> Any:
    """The answer of `source.question(*args)`, or None; an older library may not know the question at all."""
    return attempt(lambda: getattr(source, question)(*args))[0]


def first_line(error: Exception) -> str:
    """What an error says, short enough for a sentence."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(". ")


def text(value: object) -> str | None:
    """A driver's string; old releases of nvidia-ml-py answer in bytes."""
    decoded = value.decode(errors="replace") if isinstance(value, bytes) else value
    return decoded.strip() or None if isinstance(decoded, str) else None
