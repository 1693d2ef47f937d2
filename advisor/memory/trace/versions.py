"""Which versions of the libraries that a trace runs were tested. Imports none of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

TESTED: Mapping[str, tuple[str, str]] = {
    "torch": ("2.11", "2.13.0"),
    "transformers": ("5.15", "5.23.0"),
    "peft": ("0.20", "0.21.2"),
    "bitsandbytes": ("0.49", "0.50.2"),
    "accelerate": ("1.14", "1.15.0"),
}
"""From pyproject.toml's lower bounds to constraints.txt's pins; a test holds the three together.

A later patch release of the newest minor version counts as tested.
"""


def version_warnings() -> tuple[str, ...]:
    """A sentence for each library whose installed version lies outside what was tested."""
    found = []
    for package, (oldest, newest) in TESTED.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not _numbers(oldest) <= _numbers(installed)[:2] <= _numbers(newest)[:2]:
            found.append(
                f"{package} {installed} is installed; the trace was tested with {oldest} to {newest}, "
                "and may not follow what this version allocates."
            )
    return tuple(found)


def _numbers(text: str) -> tuple[int, ...]:
    """The release numbers of a version; a suffix such as +cu128 or rc1 says nothing about them."""
    release = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
