"""What this machine has for training, and whether three small computations come out right on it."""

from __future__ import annotations

from advisor.doctor.check import Check, Verdict
from advisor.doctor.examine import examine

__all__ = ["Check", "Verdict", "examine"]
