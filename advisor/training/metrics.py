"""metrics.jsonl: a line for each optimizer step and each evaluation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

METRICS = "metrics.jsonl"


class Metrics:
    """The metrics file of a run, open for appending; used as a context manager.

    Args:
        path: the file.
        after: the step that the run goes on from; lines of later steps, which are taken again, go.
    """

    def __init__(self, path: Path, *, after: int = 0) -> None:
        kept = [line for line in read_metrics(path) if line.get("step", 0) <= after] if after else []
        self.kept = tuple(kept)
        """The lines of the steps before."""

        aside = path.with_name(f"{path.name}.part")
        aside.write_text("".join(_line(values) for values in kept), encoding="utf-8")
        os.replace(aside, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as this object

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line, and hand it to the system at once."""
        self._file.write(_line(values))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that was cut off, or that a crash filled with anything, is left out."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [values for values in found if isinstance(values, dict)]


def last_step(path: Path) -> int:
    """The last optimizer step that a metrics file tells of; 0 where it tells of none."""
    steps = (line.get("step") for line in read_metrics(path))
    return max((step for step in steps if isinstance(step, int)), default=0)


def _line(values: Mapping[str, Any]) -> str:
    """JSON has no NaN: what is not a finite number is null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    return json.dumps(finite) + "\n"
