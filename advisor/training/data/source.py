"""What a source is: files of one kind, or a data set on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

from advisor.errors import InputError, shown
from advisor.shipped_data import shipped_dataset, shipped_datasets

Kind = Literal["jsonl", "json", "csv", "parquet"]

KINDS: Mapping[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
"""File name endings and what they hold."""

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")

SOME = 6
"""Files of a folder that a message names."""

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
_HELD_OUT = re.compile(r"(^|[-_.])(test|valid|validation|val|dev|eval)([-_.]|$)", re.IGNORECASE)
_UNDERSTOOD = "JSONL (.jsonl), JSON (.json), CSV (.csv) and Parquet (.parquet) are understood."


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Files of one kind, in the order of their names."""

    kind: Kind
    paths: tuple[Path, ...]
    folder: Path
    """What the files' names are shown relative to."""

    left_out: tuple[PurePath, ...] = ()
    """Files of a folder that hold another split."""

    def name(self, path: Path) -> str:
        """How a file is called in messages."""
        return path.relative_to(self.folder).as_posix()


@dataclass(frozen=True, slots=True, kw_only=True)
class HubDataset:
    """A data set on the Hugging Face hub."""

    id: str
    config: str | None
    """Its configuration, written after a colon."""


def find_source(source: str) -> Files | HubDataset:
    """A path if it exists or looks like one; a data set that comes with the package; a hub id otherwise.

    Raises:
        InputError: there is no such file, it is of no known kind, or a folder holds several kinds or none.
    """
    path = Path(source).expanduser()
    if not source.strip() or "\0" in source:
        raise InputError(f"{shown(source)} names no data.", hint="Give a file, a folder or a hub id.")
    try:
        if path.is_dir():
            return _files_of(path)
        if path.exists():
            return _one_file(path)
    except OSError as error:
        raise InputError(f"{shown(source)} cannot be opened.", why=str(error)) from error
    if path.is_symlink():
        raise _dangling(path)
    if (shipped := shipped_dataset(source)) is not None:
        return _one_file(Path(shipped))
    if _HUB_ID.fullmatch(source) and _kind_of(Path(source.partition(":")[0])) is None:
        name, _, config = source.partition(":")
        return HubDataset(id=name, config=config or None)
    raise InputError(
        f"There is no file or folder {shown(source)}.",
        hint=f"Check the path. {', '.join(shipped_datasets())} comes with this tool; on the hub: owner/name.",
    )


def _kind_of(path: Path) -> Kind | None:
    return KINDS.get(path.suffix.lower())


def _one_file(path: Path) -> Files:
    kind = _kind_of(path)
    if _is_compressed(path):
        raise InputError(f"{shown(path.name)} is compressed.", why=_UNDERSTOOD, hint="Unpack it.")
    if kind is None:
        raise InputError(
            f"{shown(path.name)} is of no kind that is understood.", why=_UNDERSTOOD, hint="Convert or rename it."
        )
    return Files(kind=kind, paths=(path,), folder=path.parent)


def _files_of(folder: Path) -> Files:
    """The data files in a folder and below; those named after a held-out split are left out if others remain.

    Raises:
        InputError: there are none, or of several kinds, or some are compressed or links to nothing.
    """
    inside = sorted(_inside(folder))
    data = [path for path in inside if _kind_of(path)]
    packed = [path.relative_to(folder) for path in inside if _is_compressed(path)]
    if packed := [path for path in packed if not _is_held_out(path)]:
        raise InputError(
            f"The folder {shown(str(folder))} holds compressed data files: {some(packed)}.",
            why=_UNDERSTOOD,
            hint="Unpack them, or move them elsewhere.",
        )
    if not data:
        raise InputError(f"The folder {shown(str(folder))} holds no data files.", why=_UNDERSTOOD)
    if dangling := next((path for path in data if not path.exists()), None):
        raise _dangling(dangling)
    kept = [path for path in data if not _is_held_out(path.relative_to(folder))] or data
    kinds = {kind for path in kept if (kind := _kind_of(path))}
    if len(kinds) > 1:
        first = {_kind_of(path): path for path in reversed(kept)}
        examples = ", ".join(sorted(f"{kind} ({path.name})" for kind, path in first.items()))
        raise InputError(
            f"The folder {shown(str(folder))} holds several kinds of files: {examples}.",
            why="It cannot be told whether they hold the same rows twice.",
            hint="Give one file, or a folder with one kind.",
        )
    others = set(data) - set(kept)
    left_out = tuple(path.relative_to(folder) for path in data if path in others)
    return Files(kind=kinds.pop(), paths=tuple(kept), folder=folder, left_out=left_out)


def _inside(folder: Path) -> Iterator[Path]:
    """What is in a folder and below that is not hidden; linked folders too, each once."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        paths = (Path(parent, name) for name in names if not _is_hidden(name))
        yield from (path for path in paths if path.is_file() or path.is_symlink())


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_held_out(path: Path) -> bool:
    """Whether a file's name, or that of a folder around it, is that of a held-out split."""
    return any(_HELD_OUT.search(part) for part in (*path.parent.parts, path.stem))


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in _COMPRESSED and _kind_of(path.with_suffix("")) is not None


def _dangling(path: Path) -> InputError:
    return InputError(
        f"{path} is a link to a file that is not there.",
        why=f"It points to {shown(os.readlink(path))}.",
        hint="Fetch that file, or mend the link.",
    )


def some(names: Sequence[PurePath]) -> str:
    """The first few of many names."""
    shown_first = ", ".join(name.as_posix() for name in names[:SOME])
    return f"{shown_first}, and {len(names) - SOME:,} more" if len(names) > SOME else shown_first
