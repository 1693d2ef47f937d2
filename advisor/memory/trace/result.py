"""What a trace says. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from advisor.memory.allocator import Replay, rounded
from advisor.memory.regime import Regime

Component = Literal[
    "weights", "quantization", "adapters", "gradients", "optimizer", "activations", "logits", "workspace"
]

LOADING = "loading"
"""The first moment."""

WARM_UP = "caching_allocator_warmup"
"""The operation of what transformers allocates and frees before it loads."""

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
    size_bytes: int = field(init=False)
    """What it takes of the allocator: `nbytes` rounded up, or a whole block where the rest of that is not split off."""

    def __post_init__(self) -> None:
        self.size_bytes = rounded(self.nbytes)


class Event(NamedTuple):
    """An allocation is made or freed during a moment."""

    allocation: Allocation
    freed: bool
    moment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one training run allocates."""

    allocated_bytes: int
    """Peak over every moment, "loading" to "saving", as torch.cuda.max_memory_allocated says it under `regime`.

    Every moment is: "loading"; the steps' "forward", "loss", "loss backward", "backward of layer n", "embedding
    backward" and "optimizer step"; "evaluation" of one micro-batch, loss only; "saving" of what was trained.

    With expandable segments that is the sum of what is alive, each rounded up to 512 bytes; the default allocator
    hands out blocks up to 1 MiB larger than asked and counts them whole.
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

    regime: Regime
    """How the allocator is run."""

    replayed: Replay
    """The allocator under `regime`."""

    default: Replay
    """The allocator as torch sets it up, with the cache as loading left it."""

    expandable: Replay
    """With PYTORCH_ALLOC_CONF=expandable_segments:True, and the cache emptied after loading."""

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

    events: tuple[Event, ...]
    """Everything that happened, in order."""

    @property
    def reserved_bytes(self) -> int:
        """torch.cuda.max_memory_reserved under `regime`."""
        return self.replayed.reserved_bytes

    @property
    def reserved_expandable_bytes(self) -> int:
        """torch.cuda.max_memory_reserved with expandable_segments."""
        return self.expandable.reserved_bytes
