"""How much disk a run takes, computed from its plan."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.architecture import Architecture
from advisor.memory import terms
from advisor.memory.resident import EIGHT_BIT_SMALLEST, trained_elements, trained_itemsize, trained_tensors
from advisor.plan import ITEMSIZE, Plan
from advisor.units import MIB

SMALL_FILES_BYTES = 64 * MIB
"""Tokenizer, logs, metrics, states of the random generators: a few MiB each on the small model, rounded up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskNeed:
    """What a run writes into its folder, at most at one time."""

    checkpoint_bytes: int
    """One checkpoint: what is trained, and the optimizer's states."""

    checkpoints: int
    """How many stand at once: those that are kept, and the one being written."""

    final_bytes: int
    """What the run leaves: the adapter, or the model."""

    @property
    def total_bytes(self) -> int:
        """All of it together."""
        return self.checkpoint_bytes * self.checkpoints + self.final_bytes + SMALL_FILES_BYTES


def disk_need(plan: Plan, arch: Architecture, *, keep: int) -> DiskNeed:
    """Checkpoints × (kept + the one being written) + what is left at the end."""
    elements = trained_elements(plan, arch)
    return DiskNeed(
        checkpoint_bytes=elements * trained_itemsize(plan) + state_bytes(plan, arch),
        checkpoints=keep + 1,
        final_bytes=elements * final_itemsize(plan),
    )


def final_itemsize(plan: Plan) -> int:
    """Bytes of a parameter in what the run leaves: adapters are fp32.

    A model of fp32 weights is saved in autocast's 16 bits, but in fp32 where a weight is too large for float16.
    """
    if plan.method == "full" and plan.autocast != "float16":
        return ITEMSIZE[plan.saved_dtype]
    return trained_itemsize(plan)


def state_bytes(plan: Plan, arch: Architecture) -> int:
    """AdamW's two moments: in the parameter's dtype by torch; in 32 bits, or 8 and their scales, by bitsandbytes."""
    if plan.optimizer in ("adamw_torch", "adamw_torch_fused"):
        return trained_elements(plan, arch) * 2 * trained_itemsize(plan)
    eight_bit = "8bit" in plan.optimizer
    total = 0
    for elements, count in trained_tensors(plan, arch):
        coded = eight_bit and elements >= EIGHT_BIT_SMALLEST
        each = terms.moments(elements, 1) + terms.moment_scales(elements) if coded else terms.moments(elements, 4)
        total += each * count
    return total


__all__ = ["DiskNeed", "disk_need"]
