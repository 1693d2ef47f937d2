"""Whether a plan's memory fits a GPU, and what breaks it where it does not."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.hardware import Gpu
from advisor.units import MIB, gib, size

MARGIN_SHARE = 0.03
"""Kept free for what the estimate does not see: 1 % is the most that it may say too little of the trace; 2 % for pages
that are used in part and libraries' scratch buffers, assumed."""

SMALLEST_MARGIN_BYTES = 256 * MIB
"""Covers pages of expandable segments that are used in part: 90 to 230 MiB for most QLoRA plans, where 3 % is less
(replayed block addresses of 36 plans of Phi-3-mini)."""

EDGE_SHARE = 0.05
"""Less than this share of the GPU left over is called near the edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A plan's memory against a GPU's: four claims on one total."""

    reserved_bytes: int
    context_bytes: int
    others_bytes: int
    margin_bytes: int
    total_bytes: int

    @property
    def needed_bytes(self) -> int:
        """What has to be there."""
        return self.reserved_bytes + self.context_bytes + self.others_bytes + self.margin_bytes

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.needed_bytes <= self.total_bytes

    @property
    def missing_bytes(self) -> int:
        """How much is missing; 0 where it fits."""
        return max(0, self.needed_bytes - self.total_bytes)

    @property
    def near_edge(self) -> bool:
        """Fits with so little to spare that the probe should decide."""
        return self.fits and self.total_bytes - self.needed_bytes < EDGE_SHARE * self.total_bytes

    @property
    def broken_by(self) -> str | None:
        """The first of the four claims that no longer has room; None where it fits."""
        claims = {
            "peak reserved": self.reserved_bytes,
            "the CUDA context": self.context_bytes,
            "other processes' memory": self.others_bytes,
            "the safety margin": self.margin_bytes,
        }
        claimed = 0
        for name, claim in claims.items():
            claimed += claim
            if claimed > self.total_bytes:
                return name
        return None


def check_fit(reserved_bytes: int, gpu: Gpu) -> Fit:
    """The four claims of a plan that reserves so much on a GPU."""
    return Fit(
        reserved_bytes=reserved_bytes,
        context_bytes=gpu.context_bytes,
        others_bytes=gpu.others_bytes,
        margin_bytes=max(SMALLEST_MARGIN_BYTES, int(MARGIN_SHARE * reserved_bytes)),
        total_bytes=gpu.total_bytes,
    )


def explain_fit(fit: Fit, moment: str) -> str:
    """One sentence: fits with how much to spare, or by how much not, at which moment, and what broke it."""
    need = gib(fit.needed_bytes)
    if fit.fits:
        spare = size(fit.total_bytes - fit.needed_bytes)
        edge = ": near the edge, let the probe decide" if fit.near_edge else ""
        return f"needs {need} of {gib(fit.total_bytes)}, {spare} to spare{edge}"
    return (
        f"out of memory by {gib(fit.missing_bytes)} at {moment}: needs {need} of {gib(fit.total_bytes)}, "
        f"and {fit.broken_by} is what no longer has room"
    )
