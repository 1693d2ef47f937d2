"""A probe's answer: what was measured, what was predicted, what was found by trying."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.hardware import Gpu
from advisor.plan import Plan
from advisor.probe.find import Found
from advisor.probe.imitate import Imitation
from advisor.probe.measurement import Measurement
from advisor.probe.prediction import Prediction
from advisor.profiles import ModelSource, load_gpu
from advisor.units import gib, size


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeAnswer:
    """One plan, probed."""

    plan: Plan
    model: ModelSource
    gpu: Gpu
    """What really ran it."""

    measurement: Measurement
    imitation: Imitation | None = None
    predictions: tuple[Prediction, ...] = ()
    """The closed form's first, where it knows the model."""

    found: Found | None = None

    @property
    def target(self) -> Gpu:
        """The GPU that the answer is about."""
        return self.gpu if self.imitation is None else self.imitation.gpu

    @property
    def fits(self) -> bool:
        """Whether it ran."""
        return self.measurement.outcome == "ran"

    @property
    def context_bytes(self) -> int:
        """As measured; an imitated GPU's, and one that does not tell, as the profile has it."""
        measured = self.measurement.context_bytes
        return measured if measured is not None and self.imitation is None else self.target.context_bytes

    @property
    def reason(self) -> str:
        """The verdict in a sentence."""
        found = self.measurement
        if self.fits:
            taken = (found.reserved_bytes or 0) + self.context_bytes
            spare = self.target.total_bytes - self.target.others_bytes - taken
            left = f", {size(spare)} to spare" if spare >= 0 else ""
            return f"it ran: {gib(taken)} of {gib(self.target.total_bytes)}{left}"
        where = f" during {found.failed_at}" if found.failed_at else ""
        return f"out of memory{where}. {found.message}".rstrip(". ")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should hear beside the numbers."""
        said = [*self.target.notes, *self.measurement.notes]
        planned = load_gpu(self.plan.gpu) if self.plan.gpu is not None else None
        if planned is not None and planned != self.target.profile:
            said.append(
                f"The plan is for {planned.product}, and this is {self.target.name}: "
                f"--as {planned.name} stands in for it, where this one has the memory."
            )
        if self.imitation is not None:
            said += [f"Not imitated: {sentence}" for sentence in self.imitation.not_imitated]
        if self.measurement.released is False:
            said.append("The driver still lists the probe's process: run nvidia-smi before you go on.")
        return tuple(dict.fromkeys(said))


__all__ = ["ProbeAnswer"]
