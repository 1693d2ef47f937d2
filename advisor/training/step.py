"""One optimizer step, as transformers' Trainer runs it: the trace and the probe run this same code.

Source: transformers Trainer.training_step, Trainer.compute_loss and Trainer._run_epoch;
accelerate Accelerator.prepare_model, Accelerator.backward and Accelerator.clip_grad_norm_.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from advisor.plan import Plan

Moment = Literal["forward", "backward", "optimizer step"]
Observer = Callable[[Moment], None]
Batch = Mapping[str, "torch.Tensor"]

MAX_GRADIENT_NORM = 1.0
"""TrainingArguments' default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """What a step does beyond calling the model."""

    hold_outputs: bool
    """Keep the model's outputs until the next ones replace them."""

    accumulation: int
    """What the loss of one micro-batch is divided by."""

    counts_tokens: bool = True
    """Divide by the number of labels in the whole batch, as Trainer does, and not by their mean."""


def settings_of(plan: Plan) -> StepSettings:
    """The step of a plan; one that holds its outputs is a hand-written loop and takes the mean."""
    return StepSettings(
        hold_outputs=plan.hold_outputs,
        accumulation=plan.gradient_accumulation,
        counts_tokens=not plan.hold_outputs,
    )


def make_batch(plan: Plan, vocabulary: int, device: torch.device | str) -> Batch:
    """One micro-batch of random tokens, with a mask if the plan's worst case has one."""
    import torch

    shape = (plan.micro_batch, plan.seq_len)
    if torch.device(device).type == "meta":
        tokens = torch.empty(shape, dtype=torch.int64, device=device)
    else:
        tokens = torch.randint(0, vocabulary, shape, device=device)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if plan.padding == "longest":
        mask = torch.ones(shape, dtype=torch.int64, device=device)
        if mask.device.type != "meta" and plan.micro_batch > 1:
            mask[1:, -1] = 0
        batch["attention_mask"] = mask
    return batch


def wrap_forward(model: Any, autocast: Callable[[], AbstractContextManager[Any]] | None) -> None:
    """Run the model's forward under autocast and hand its outputs out in fp32, as accelerate does."""
    if autocast is None:
        return
    from accelerate.utils.operations import convert_outputs_to_fp32

    original = model.forward

    def forward_under_autocast(_: Any, *args: Any, **kwargs: Any) -> Any:
        with autocast():
            return original(*args, **kwargs)

    model.forward = MethodType(convert_outputs_to_fp32(forward_under_autocast), model)


class Step:
    """Forward and backward of every micro-batch, clip, step, zero_grad(set_to_none).

    Args:
        model: as `wrap_forward` left it.
        optimizer: over the model's trainable parameters.
        settings: of the plan.
        observe: called at each of the step's turns.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        settings: StepSettings,
        observe: Observer = lambda _: None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._settings = settings
        self._observe = observe
        self._held: Any = None

    def run(self, micro_batches: Sequence[Callable[[], Batch]]) -> None:
        """One optimizer step."""
        import torch

        token_count = _count_tokens(micro_batches) if self._settings.counts_tokens else None
        for make in micro_batches:
            self._micro_step(make, token_count)
        self._observe("optimizer step")
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _micro_step(self, make: Callable[[], Batch], token_count: torch.Tensor | None) -> None:
        self._observe("forward")
        batch = make()
        loss, outputs = compute_loss(self._model, batch, token_count)
        if self._settings.hold_outputs:
            # `outputs = model(...)` in a loop: the last ones live until these take their name.
            self._held = outputs
        del outputs, batch
        if token_count is None and self._settings.accumulation > 1:
            loss = loss / self._settings.accumulation
        self._observe("backward")
        loss.backward()


def _count_tokens(micro_batches: Sequence[Callable[[], Batch]]) -> torch.Tensor:
    """num_items_in_batch: one integer on the device. Source: Trainer._get_num_items_in_batch."""
    import torch

    device = micro_batches[0]()["labels"].device
    return torch.ones((), dtype=torch.int64, device=device)


def compute_loss(model: Any, batch: Batch, token_count: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """The loss and the outputs of one micro-batch."""
    extra = {} if token_count is None else {"num_items_in_batch": token_count}
    outputs = model(**batch, **extra)
    return outputs["loss"], outputs
