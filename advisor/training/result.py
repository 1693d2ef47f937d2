"""result.json: how a training ended. The training process writes it; the one that waits for it, where it could not."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from advisor.training.checkpoints import flush, write_json

Outcome = Literal["finished", "interrupted", "out_of_memory", "diverged", "disk_full", "failed"]

RESULT = "result.json"
_ROOM = ".result.room"
_ROOM_BYTES = 2**14


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What result.json says."""

    outcome: Outcome
    signal: int | None = None
    """The signal that stopped it."""

    step: int = 0
    """Optimizer steps taken."""

    steps: int = 0
    """Optimizer steps in all."""

    first_loss: float | None = None
    final_loss: float | None = None
    """Mean of the last step."""

    evaluation_loss: float | None = None
    peak_allocated_bytes: int | None = None
    """As torch counts it; None where the device does not."""

    peak_reserved_bytes: int | None = None
    driver_bytes: int | None = None
    """What NVML says this process holds; None off CUDA and where it does not say."""

    host_peak_bytes: int | None = None
    """The most host RAM that this process had resident."""

    seconds: float = 0.0
    """Of this process's steps; loading, evaluation and saving are outside."""

    tokens: int = 0
    """Real tokens of those steps."""

    tokens_per_second: float | None = None
    checkpoint: str | None = None
    """The last complete one."""

    message: str = ""
    hint: str = ""
    exit_code: int | None = None
    """Of a failure: 2 where what was given cannot be used, 3 where something is missing, 4 otherwise."""


def keep_room(folder: Path) -> None:
    """Take the room that a result needs while there is some: a disk that is full has none for the sentence that it is.

    A disk that is full already is heard of soon enough.
    """
    with contextlib.suppress(OSError):
        (folder / _ROOM).write_bytes(b" " * _ROOM_BYTES)
        flush(folder / _ROOM)


def write_result(folder: Path, result: Result) -> None:
    """Write result.json: aside and renamed, or over the room that was kept for it where a full disk has no other.

    Raises:
        OSError: there is neither.
    """
    values = {"schema": 1, **asdict(result)}
    try:
        write_json(folder / RESULT, values)
    except OSError:
        _write_over(folder / _ROOM, json.dumps(values).encode())
        os.replace(folder / _ROOM, folder / RESULT)
    (folder / _ROOM).unlink(missing_ok=True)


def _write_over(room: Path, content: bytes) -> None:
    """Blanks after a JSON value mean nothing."""
    with open(room, "r+b") as file:
        file.write(content.ljust(_ROOM_BYTES))
    flush(room)


def read_result(folder: Path) -> Result | None:
    """The result in a run folder; None where the training left none, or one that is not whole."""
    try:
        values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, Mapping) or values.get("outcome") not in get_args(Outcome):
        return None
    known = {field.name for field in fields(Result)}
    return Result(**{name: value for name, value in values.items() if name in known})


__all__ = ["RESULT", "Outcome", "Result", "keep_room", "read_result", "write_result"]
