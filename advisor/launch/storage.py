"""How much disk a run takes, computed from its plan."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.architecture import Architecture
from advisor.memory.step import trained_elements
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
    trained = elements * trained_itemsize(plan)
    return DiskNeed(
        checkpoint_bytes=trained + elements * state_bytes(plan),
        checkpoints=keep + 1,
        final_bytes=trained,
    )


def trained_itemsize(plan: Plan) -> int:
    """Bytes of a trained parameter: adapters are fp32."""
    return ITEMSIZE[plan.dtype] if plan.method == "full" else 4


def state_bytes(plan: Plan) -> int:
    """AdamW's two moments of a parameter: torch keeps them in its dtype, bitsandbytes in 8 or 32 bits."""
    if "8bit" in plan.optimizer:
        return 2
    return 8 if plan.optimizer == "paged_adamw_32bit" else 2 * trained_itemsize(plan)


__all__ = ["DiskNeed", "disk_need"]
