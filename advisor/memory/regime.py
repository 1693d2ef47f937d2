"""How a program runs torch's caching allocator: what is reserved depends on it, and a little of what is allocated."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advisor.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """Settings of the allocator, and what a program does to it."""

    expandable: bool
    """Whether expandable_segments is on."""

    empties_cache: bool
    """Whether torch.cuda.empty_cache() is called between loading and training."""


TORCH_DEFAULTS = Regime(expandable=False, empties_cache=False)
"""A script that sets nothing, as most do."""

EXPANDABLE = Regime(expandable=True, empties_cache=True)
"""This project's training, wherever the platform has expandable segments."""


def training_regime() -> Regime:
    """This project's training on this platform; torch has no expandable segments on Windows."""
    return EXPANDABLE if sys.platform != "win32" else Regime(expandable=False, empties_cache=True)


def regime_of(plan: Plan) -> Regime:
    """Of what runs a plan: a loop that holds its outputs is not this project's training."""
    return TORCH_DEFAULTS if plan.hold_outputs else training_regime()
