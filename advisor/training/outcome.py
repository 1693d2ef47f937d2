"""How a training ended: result.json, and what an error was."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from advisor.errors import AdvisorError, RunFailedError
from advisor.training.checkpoints import write_json

Outcome = Literal["finished", "interrupted", "out_of_memory", "diverged", "disk_full", "failed"]

RESULT = "result.json"
_NO_SPACE = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_DISK_WORDS = re.compile(
    r"os error (?:28|27|122)\b|no space left|file too large|PytorchStreamWriter|unexpected pos", re.IGNORECASE
)
_MEMORY_WORDS = re.compile(
    r"out of memory|DefaultCPUAllocator: (?:can't|not enough)|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
    r"|std::bad_alloc|cannot allocate memory",
    re.IGNORECASE,
)
_ASKED = re.compile(r"tried to allocate ([\d.]+ ?\w+|\d+ bytes)", re.IGNORECASE)


class DivergedError(RunFailedError):
    """The loss was not a number again and again."""


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

    seconds: float = 0.0
    """Of this process's steps; loading, evaluation and saving are outside."""

    tokens: int = 0
    """Real tokens of those steps."""

    tokens_per_second: float | None = None
    checkpoint: str | None = None
    """The last complete one."""

    message: str = ""
    hint: str = ""


def write_result(folder: Path, result: Result) -> None:
    """Write result.json: aside and renamed, or in place where a full disk leaves no room for a second one."""
    values = {"schema": 1, **asdict(result)}
    try:
        write_json(folder / RESULT, values)
    except OSError:
        import json

        (folder / RESULT).write_text(json.dumps(values), encoding="utf-8")


def outcome_of(error: BaseException) -> Outcome:
    """What kind of end an error is; the errors that caused it count."""
    for one in _chain(error):
        if isinstance(one, DivergedError):
            return "diverged"
        if isinstance(one, AdvisorError):
            return "failed"
        if isinstance(one, OSError) and one.errno in _NO_SPACE:
            return "disk_full"
        if isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError":
            return "out_of_memory"
        if isinstance(one, OSError) and one.errno == errno.ENOMEM:
            return "out_of_memory"
        if _DISK_WORDS.search(str(one)):
            return "disk_full"
        if isinstance(one, RuntimeError) and _MEMORY_WORDS.search(str(one)):
            return "out_of_memory"
    return "failed"


def asked_for(error: BaseException) -> str:
    """The amount that could not be allocated, as torch wrote it, or nothing."""
    for one in _chain(error):
        found = _ASKED.search(str(one))
        if found:
            return found[1]
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)
