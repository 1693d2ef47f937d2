"""How a training ended: result.json, which the training process leaves and nothing else says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Outcome = Literal["finished", "interrupted", "out_of_memory", "diverged", "disk_full", "failed"]

RESULT_FILE = "result.json"
LOG_FILE = "log.txt"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LOG_LINES = 12
_LOG_TAIL_BYTES = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a training says of itself when it ends. Unknown is None."""

    outcome: Outcome
    step: int = 0
    """Optimizer steps taken."""

    steps: int = 0
    """Optimizer steps in all."""

    signal: int | None = None
    """The signal that stopped it."""

    first_loss: float | None = None
    final_loss: float | None = None
    evaluation_loss: float | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    driver_bytes: int | None = None
    """What the driver says that the process took of the GPU."""

    seconds: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    checkpoint: str | None = None
    """The last complete checkpoint."""

    message: str = ""
    hint: str = ""


def read_result(run: str) -> Result | None:
    """The result in a run folder; None where the training left none, or one that is not whole."""
    try:
        with open(os.path.join(run, RESULT_FILE), encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(values, Mapping) or values.get("outcome") not in get_args(Outcome):
        return None
    return Result(**_known(values))


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(Result)}
    return {name: value for name, value in values.items() if name in names}


def last_checkpoint(run: str) -> str | None:
    """The newest checkpoint of a run folder; None where there is none. A checkpoint is complete or absent."""
    folder = os.path.join(run, CHECKPOINTS)
    try:
        found = [(int(match[1]), match[0]) for match in map(_CHECKPOINT.fullmatch, os.listdir(folder)) if match]
    except OSError:
        return None
    return os.path.join(folder, max(found)[1]) if found else None


def last_step(run: str) -> int:
    """The last optimizer step that metrics.jsonl tells of; 0 where it tells of none."""
    step = 0
    for line in _tail(os.path.join(run, METRICS_FILE)):
        try:
            step = max(step, int(json.loads(line)["step"]))
        except (ValueError, TypeError, KeyError):
            continue
    return step


def log_tail(run: str, since: int = 0) -> list[str]:
    """The log's last lines, from a byte on: what there is to say where a training left no result."""
    return [line for line in _tail(os.path.join(run, LOG_FILE), since) if line.strip()][-_LOG_LINES:]


def _tail(path: str, since: int = 0) -> list[str]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since, size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


__all__ = ["Outcome", "Result", "last_checkpoint", "last_step", "log_tail", "read_result"]
