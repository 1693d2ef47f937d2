"""Data sets that come with the package, by name."""

from __future__ import annotations

import os

from advisor.profiles import profile_folder

_SUFFIX = ".jsonl"


def shipped_datasets() -> tuple[str, ...]:
    """The names that `shipped_dataset` knows."""
    files = os.listdir(profile_folder("datasets"))
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in files if name.endswith(_SUFFIX)))


def shipped_dataset(name: str) -> str | None:
    """The file of the data set of that name; None where none is shipped under it.

    A name is the whole of it: whatever has a folder in it, or a suffix, is somebody's own file.
    """
    return os.path.join(profile_folder("datasets"), name + _SUFFIX) if name in shipped_datasets() else None
