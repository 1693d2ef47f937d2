"""One thing that was looked at. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["good", "doubtful", "bad", "absent"]
"""absent: not there, and training goes on without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    found: str
    """What was found, in a few words."""

    remedy: str = ""
    """What to do; empty where nothing has to be done."""


__all__ = ["Check", "Verdict"]
