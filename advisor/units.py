"""Bytes in, words out: the only place that converts."""

from __future__ import annotations

import math
import re

from advisor.errors import InputError

KIB = 2**10
MIB = 2**20
GIB = 2**30

_UNITS = {
    "": GIB,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "m": MIB,
    "mib": MIB,
    "g": GIB,
    "gib": GIB,
    "t": 2**40,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)
LARGEST_SIZE_BYTES = 2**50


def gib(size_bytes: int) -> str:
    """`10637877248` → `"9.91 GiB"`: always GiB, for columns that are compared."""
    return f"{size_bytes / GIB:,.2f} GiB"


def size(size_bytes: int) -> str:
    """The unit that fits: `"9.91 GiB"`, `"34.0 MiB"`, `"512 B"`."""
    if abs(size_bytes) >= GIB:
        return gib(size_bytes)
    if abs(size_bytes) >= MIB:
        return f"{size_bytes / MIB:.1f} MiB"
    if abs(size_bytes) >= KIB:
        return f"{size_bytes / KIB:.1f} KiB"
    return f"{size_bytes} B"


def exact_size(size_bytes: int) -> str:
    """What `parse_size` reads back as the same number: `4294967296` → `"4GiB"`, `1000` → `"1000B"`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{name}"
    return f"{size_bytes}B"


def parse_size(text: str) -> int:
    """`"12GiB"`, `"12288MiB"`, `"12"` (GiB) or `"12GB"` (10⁹) → bytes.

    Raises:
        InputError: not a size, or not between 1 byte and 1 PiB.
    """
    match = _SIZE.fullmatch(text) if len(text) <= 40 else None
    unit = _UNITS.get(match[2].lower()) if match else None
    value = float(match[1]) * unit if match and unit else math.nan
    if not 1 <= value <= LARGEST_SIZE_BYTES:
        raise InputError(
            f"{text[:40]!r} is not an amount of memory.",
            why="It takes a number above zero and a unit: B, MiB, GiB, or the decimal MB, GB.",
            hint="Write it like 12GiB (a bare 12 means 12 GiB).",
        )
    return int(value)


def parse_count(text: str) -> int:
    """`"12M"`, `"1.5B"`, `"120k"` or `"250000"` → a number.

    Raises:
        InputError: not a number from 1 to 10¹⁵.
    """
    match = _SIZE.fullmatch(text.replace("_", "").replace(",", "")) if len(text) <= 40 else None
    scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}.get(match[2].lower()) if match else None
    value = float(match[1]) * scale if match and scale else math.nan
    if not 1 <= value <= 10**15:
        raise InputError(
            f"{text[:40]!r} is not a number of tokens.",
            why="It takes a number above zero, with k, M or B behind it if you like.",
            hint="Write it like 12M.",
        )
    return int(value)


def count(number: int) -> str:
    """`3821079552` → `"3,821,079,552"`."""
    return f"{number:,}"


def short_count(number: int) -> str:
    """`3821079552` → `"3.82 B"`, `25165824` → `"25.2 M"`."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(number)


def duration(seconds: float) -> str:
    """`7500.0` → `"2 h 5 min"`; under two minutes in seconds."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours / 24:.1f} days"
