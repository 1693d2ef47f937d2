"""How a training ended: result.json, which the training process leaves and nothing else says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from advisor.training import checkpoints
from advisor.training.log import LOG
from advisor.training.metrics import METRICS
from advisor.training.outcome import RESULT, Outcome, Result

_LOG_LINES = 12
_LOG_TAIL_BYTES = 16_384


def read_result(run: str) -> Result | None:
    """The result in a run folder; None where the training left none, or one that is not whole."""
    try:
        with open(os.path.join(run, RESULT), encoding="utf-8") as file:
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
    """The newest complete checkpoint of a run folder; None where there is none."""
    found = checkpoints.last_checkpoint(Path(run, "checkpoints"))
    return str(found.path) if found is not None else None


def last_step(run: str) -> int:
    """The last optimizer step that metrics.jsonl tells of; 0 where it tells of none."""
    step = 0
    for line in _tail(os.path.join(run, METRICS)):
        try:
            step = max(step, int(json.loads(line)["step"]))
        except (ValueError, TypeError, KeyError):
            continue
    return step


def log_tail(run: str, since: int = 0) -> list[str]:
    """The log's last lines, from a byte on: what there is to say where a training left no result."""
    return [line for line in _tail(os.path.join(run, LOG), since) if line.strip()][-_LOG_LINES:]


def _tail(path: str, since: int = 0) -> list[str]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since, size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


__all__ = ["Outcome", "Result", "last_checkpoint", "last_step", "log_tail", "read_result"]
