"""What the result of a training depends on and its memory does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from advisor.plan_checks import check_bool, check_choice, check_int, check_number

Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyperparameters:
    """How long, how fast and in which order a model is trained."""

    learning_rate: float | None = None
    """Peak learning rate; None takes the method's default."""

    schedule: Schedule = "cosine"
    """How the learning rate falls, spelled as transformers' SchedulerType."""

    warmup: float = 0.03
    """Share of the steps over which the learning rate rises."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""

    epochs: float = 1.0
    """Passes over the data."""

    max_steps: int | None = None
    """Optimizer steps; takes precedence over the epochs."""

    validation: float = 0.05
    """Share of the rows that are held out and evaluated."""

    seed: int = 42
    """Of the adapters, the order of the data and dropout."""

    compile: bool = False
    """Run the model through torch.compile."""

    def __post_init__(self) -> None:
        if self.learning_rate is not None:
            check_number("training.learning_rate", self.learning_rate, above=0, up_to=1)
        check_choice("training.schedule", self.schedule, get_args(Schedule))
        check_number("training.warmup", self.warmup, above=-1e-12, up_to=1)
        check_number("training.weight_decay", self.weight_decay, above=-1e-12, up_to=1)
        check_number("training.epochs", self.epochs, above=0, up_to=10_000)
        if self.max_steps is not None:
            check_int("training.max_steps", self.max_steps)
        check_number("training.validation", self.validation, above=-1e-12, up_to=0.5)
        if self.seed != 0 or isinstance(self.seed, (bool, float)):
            check_int("training.seed", self.seed)
        check_bool("training.compile", self.compile)


DEFAULT_HYPERPARAMETERS = Hyperparameters()
"""What a plan has that says nothing of them."""


__all__ = ["DEFAULT_HYPERPARAMETERS", "Hyperparameters", "Schedule"]
