"""What kind of end an error is: memory, the disk, a loss that is no number, or something else."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from advisor.errors import AdvisorError, RunFailedError
from advisor.training.result import Outcome
from advisor.units import size

_NO_SPACE = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_DISK_WORDS = re.compile(
    r"os error (?:28|27|122)\b|no space left|file too large|PytorchStreamWriter|unexpected pos", re.IGNORECASE
)
_MEMORY_WORDS = re.compile(
    r"out of memory|DefaultCPUAllocator: (?:can't|not enough)|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation"
    r"|std::bad_alloc|cannot allocate memory",
    re.IGNORECASE,
)
_ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ?(bytes|[KMGT]i?B)", re.IGNORECASE)


class DivergedError(RunFailedError):
    """The loss was not a number again and again."""


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
    """The amount that could not be allocated, or nothing; the CPU's allocator counts it in bytes."""
    for one in _chain(error):
        found = _ASKED.search(str(one))
        if found:
            amount, unit = found.groups()
            return size(int(amount)) if unit.lower() == "bytes" and amount.isdecimal() else f"{amount} {unit}"
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)


__all__ = ["DivergedError", "asked_for", "outcome_of"]
