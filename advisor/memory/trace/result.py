"""What a trace says. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from advisor.memory.allocator import Replay

Component = Literal[
    "weights", "quantization", "adapters", "gradients", "optimizer", "activations", "logits", "workspace"
]

LOADING = "loading"
"""The first moment."""

OUTSIDE_STEPS = frozenset({LOADING, "evaluation", "saving"})
"""Moments that are no part of a training step."""


@dataclass(slots=True, eq=False)
class Allocation:
    """One storage."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    module: str
    operation: str
    moment: str
    component: Component


@dataclass(frozen=True, slots=True)
class Event:
    """An allocation is made or freed during a moment."""

    allocation: Allocation
    freed: bool
    moment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one training run allocates."""

    allocated_bytes: int
    """Peak over every moment, "loading" to "saving": the sum of what is alive, each rounded up to 512 bytes.

    Every moment is: "loading"; the steps' "forward", "loss", "loss backward", "backward of layer n", "embedding
    backward" and "optimizer step"; "evaluation" of one micro-batch, loss only; "saving" of what was trained.

    torch.cuda.max_memory_allocated says this with expandable_segments; the default allocator hands out
    blocks up to 1 MiB larger than asked and counts them whole: `default.allocated_bytes`.
    """

    at: str
    """The moment of that peak."""

    step_bytes: int
    """Peak of the training steps alone."""

    loading_bytes: int
    """Peak while the model is made, weights arriving in the checkpoint's order."""

    evaluation_bytes: int
    """Peak of the evaluation of one micro-batch between two steps."""

    saving_bytes: int
    """Peak while a checkpoint is written; its tensors go to the host one by one, so this is what is kept."""

    default: Replay
    """The default allocator."""

    expandable: Replay
    """The same with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."""

    components: Mapping[str, int]
    """Bytes alive at the peak, by what they are for."""

    largest: tuple[Allocation, ...]
    """What was alive at the peak, largest first."""

    peaks: Mapping[str, int]
    """The peak within each class of moment."""

    moments: Mapping[str, int]
    """The peak within each single moment in which something was made or freed."""

    total_parameters: int
    trainable_parameters: int

    total_bytes: int | None
    """The memory that the allocator was replayed with; None is no limit."""

    empties_cache: bool
    """Whether the replay gives cached memory back between loading and training."""

    events: tuple[Event, ...]
    """Everything that happened, in order."""

    @property
    def reserved_bytes(self) -> int:
        """torch.cuda.max_memory_reserved with the default allocator."""
        return self.default.reserved_bytes

    @property
    def reserved_expandable_bytes(self) -> int:
        """torch.cuda.max_memory_reserved with expandable_segments."""
        return self.expandable.reserved_bytes
