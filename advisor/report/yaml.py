"""An export as YAML: the command that runs it, what differs from the plan, then the settings."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from advisor import __version__
from advisor.export import Export, Setting, Told
from advisor.report.words import clean

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_RESERVED = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"}
_WIDTH = 100


def config_text(export: Export) -> str:
    """The whole file."""
    plan = export.plan
    target = f" on {plan.gpu}" if plan.gpu else ""
    lines = [f"# {clean(command)}" for command in export.commands]
    about = f"Written by phi3-advise {__version__} for {plan.method} of {plan.model}{target}"
    lines += _comment(f"{about}; checked against {export.checked_against}.")
    if export.lost:
        lines += ["#", "# Not as planned, because there is no such setting:"]
        lines += [line for told in grouped(export.lost) for line in _comment(told, indent="  ")]
    if export.kept:
        lines += ["#", "# As planned, without a setting:"]
        lines += [line for told in grouped(export.kept) for line in _comment(told, indent="  ")]
    lines.append("")
    for setting in export.settings:
        lines += _setting_lines(setting)
    return "\n".join(lines) + "\n"


def grouped(told: Sequence[Told]) -> tuple[str, ...]:
    """`"field, field: what becomes of them"`, fields of one fate together."""
    fates: dict[str, list[str]] = {}
    for one in told:
        fates.setdefault(one.said, []).append(one.field)
    return tuple(f"{', '.join(fields)}: {said}" for said, fields in fates.items())


def _comment(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        clean(text), _WIDTH, initial_indent=f"# {indent}", subsequent_indent=f"# {indent}  ", break_long_words=False
    )


def _setting_lines(setting: Setting) -> Iterator[str]:
    first, *rest = _lines({setting.name: setting.value})
    if not setting.note or len(first) + len(setting.note) + 4 <= _WIDTH:
        yield f"{first}  # {setting.note}" if setting.note else first
    else:
        yield from _comment(setting.note)
        yield first
    yield from rest


def _lines(value: Any) -> Iterator[str]:
    """A table's or list's lines, nested ones indented."""
    items: Iterable[tuple[str, Any]]
    items = ((f"{name}:", inner) for name, inner in value.items()) if isinstance(value, dict) else _dashed(value)
    for start, inner in items:
        if isinstance(inner, (dict, list)):
            nested = list(_lines(inner))
            if start == "-":
                yield f"- {nested[0]}"
                yield from (f"  {line}" for line in nested[1:])
            else:
                yield start
                yield from (f"  {line}" for line in nested)
        else:
            yield f"{start} {_scalar(inner)}"


def _dashed(values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return (("-", value) for value in values)


def _scalar(value: str | float | bool) -> str:
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and value.lower() not in _RESERVED:
            return value
        return "".join(c if c.isprintable() else _escaped(c) for c in json.dumps(value, ensure_ascii=False))
    if isinstance(value, float):
        # YAML 1.1 takes 2e-05 for a text: it wants a point.
        mantissa, exponent, power = repr(value).partition("e")
        return f"{mantissa}.0e{power}" if exponent and "." not in mantissa else repr(value)
    return json.dumps(value)


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
