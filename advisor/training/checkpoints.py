"""Checkpoints that are complete or absent: written aside, flushed to the disk, then renamed; the newest few stay.

transformers writes them in place, and resumes from the highest number without asking whether it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds them."""

MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished"
_PREFIX = "checkpoint-"
_BLOCK = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint all of whose files are there."""

    path: Path
    step: int
    """Optimizer steps that it holds."""

    facts: Mapping[str, Any]
    """What the run said about itself when it was written."""

    size_bytes: int
    """Of its files."""


def write_checkpoint(
    folder: Path, step: int, write: Callable[[Path], None], *, facts: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Let `write` fill a folder aside, then give it its name; nothing to do where this step has one.

    If anything fails, what was written is removed and the checkpoints before it stay.

    Raises:
        Exception: whatever `write` raises; OSError where the disk refuses.
    """
    target = folder / f"{_PREFIX}{step}"
    known = _read(target)
    if known is not None:
        return known
    aside = folder / _UNFINISHED
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
        files = dict(_files(aside))
        checksums = {name: _checksum(aside / name) for name in files}
        manifest = {"schema": 1, "step": step, "files": files, "checksums": checksums, "facts": dict(facts or {})}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flush_all(aside)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
        flush(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Checkpoint(path=target, step=step, facts=dict(facts or {}), size_bytes=sum(files.values()))


def complete_checkpoints(folder: Path) -> tuple[Checkpoint, ...]:
    """Those that can be resumed from, oldest first."""
    found = (_read(path) for path in folder.glob(f"{_PREFIX}*")) if folder.is_dir() else ()
    return tuple(sorted((one for one in found if one is not None), key=lambda one: one.step))


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete one, or None."""
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def last_sound_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest complete one that holds what was written into it, or None; reads it to the end."""
    return next((one for one in reversed(complete_checkpoints(folder)) if _is_sound(one)), None)


def go_back_to_sound(folder: Path) -> Checkpoint | None:
    """The same; newer ones, which are damaged, are complete no longer, so that their steps can be saved again."""
    sound = last_sound_checkpoint(folder)
    for one in complete_checkpoints(folder):
        if sound is None or one.step > sound.step:
            (one.path / MANIFEST).unlink()
    return sound


def newer_than(folder: Path, step: int) -> tuple[str, ...]:
    """Names of checkpoints after a step, in their order; if that is the last complete one's, they are not whole."""
    ends = (path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*"))
    return tuple(f"{_PREFIX}{end}" for end in sorted(int(end) for end in ends if end.isdigit()) if end > step)


def rotate(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints (one at least), and every incomplete one."""
    kept = {one.path for one in complete_checkpoints(folder)[-max(1, keep) :]}
    for path in folder.glob(f"{_PREFIX}*"):
        if path not in kept:
            # Without its manifest it is incomplete, so a removal that is cut short leaves nothing that looks whole.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint of a folder, or None if a file is missing or not as long as it was."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = manifest["files"]
        whole = all((path / name).stat().st_size == size for name, size in expected.items())
        step, facts, total = int(manifest["step"]), manifest["facts"], sum(expected.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not whole or path.name != f"{_PREFIX}{step}":
        return None
    return Checkpoint(path=path, step=step, facts=facts, size_bytes=total)


def _is_sound(checkpoint: Checkpoint) -> bool:
    """Whether its bytes are those that were written, as far as its manifest says which those are."""
    try:
        manifest = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
        expected = manifest.get("checksums", {}).items()
        return all(_checksum(checkpoint.path / name) == checksum for name, checksum in expected)
    except (OSError, ValueError, AttributeError):
        return False


def _checksum(path: Path) -> int:
    """CRC-32 of a file: what a disk or a hand changed of it shows, and a gigabyte takes about a second."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return found


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size


def _flush_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or a folder's entries, where the system can say so."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a small file aside and rename it: it is complete or absent."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        aside.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        flush(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
