"""One optimizer step, as transformers' Trainer runs it: the trace and the probe run this same code.

Source: transformers Trainer.training_step, Trainer.compute_loss, Trainer._run_epoch and Trainer.prediction_step;
accelerate Accelerator.prepare_model, Accelerator.backward, Accelerator.clip_grad_norm_ and AcceleratedOptimizer.step.
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

Moment = Literal["forward", "backward", "optimizer step", "evaluation"]
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

    scales_gradients: bool = False
    """Scale the loss so that float16 gradients do not vanish, as mixed precision in float16 does."""

    clips_gradients: bool = True
    """Bound the norm of all gradients; they no longer stand where backward steps the parameters."""


def settings_of(plan: Plan) -> StepSettings:
    """The step of a plan; one that holds its outputs is a hand-written loop and takes the mean."""
    return StepSettings(
        hold_outputs=plan.hold_outputs,
        accumulation=plan.gradient_accumulation,
        counts_tokens=not plan.hold_outputs,
        scales_gradients=plan.autocast == "float16",
        clips_gradients=not plan.optimizer_in_backward,
    )


def make_batch(plan: Plan, vocabulary: int, device: torch.device | str) -> Batch:
    """One micro-batch of random tokens: with a mask if the plan's worst case has one, packed if its rows are.

    Packed rows hold as many samples as the plan allows; their positions restart, and the first label of each is
    masked, because no token of its own sample comes before it. For flash-attn 2 they lie end to end.
    """
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
    if plan.packing:
        batch["position_ids"] = _restarting_positions(plan, tokens)
        if tokens.device.type != "meta":
            batch["labels"].masked_fill_(batch["position_ids"] == 0, -100)
        if plan.attention == "flash_attention_2":
            return {name: tensor.view(1, -1) for name, tensor in batch.items()}
    return batch


def _restarting_positions(plan: Plan, tokens: torch.Tensor) -> torch.Tensor:
    """Positions within samples of one length, which fill each row."""
    import torch

    if tokens.device.type == "meta":
        return torch.empty_like(tokens)
    length = -(-plan.seq_len // (plan.samples // plan.micro_batch))
    return (torch.arange(plan.seq_len, device=tokens.device) % length).repeat(plan.micro_batch, 1)


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
        self._scaler: torch.amp.GradScaler | None = None
        if settings.scales_gradients:
            self._scaler = _gradient_scaler(model)

    def run(self, micro_batches: Sequence[Callable[[], Batch]]) -> None:
        """One optimizer step."""
        import torch

        counts = self._settings.counts_tokens
        token_count = _count_tokens(micro_batches[0]()["labels"].device) if counts else None
        for make in micro_batches:
            self._micro_step(make, token_count)
        self._observe("optimizer step")
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        if self._settings.clips_gradients:
            parameters = [p for p in self._model.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
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
        if self._scaler is None:
            loss.backward()
        else:
            self._scaler.scale(loss).backward()

    def evaluate(self, make: Callable[[], Batch]) -> None:
        """The loss of one micro-batch without gradients, as Trainer.evaluate with prediction_loss_only.

        Trainer keeps the outputs and the labels of a batch until it has gathered its loss.
        """
        import torch

        self._observe("evaluation")
        self._model.eval()
        with torch.no_grad():
            batch = make()
            labels = batch["labels"].detach()
            token_count = _count_tokens(labels.device) if self._settings.counts_tokens else None
            loss, outputs = compute_loss(self._model, batch, token_count)
            loss = loss.detach().mean().repeat(labels.size(0))
        del outputs, batch, labels, loss
        self._model.train()


def _gradient_scaler(model: Any) -> torch.amp.GradScaler:
    """accelerate's, with torch's defaults. Source: accelerate utils/modeling.py (get_grad_scaler)."""
    import torch

    return torch.amp.GradScaler(next(model.parameters()).device.type)


def weights_to_save(model: Any) -> Mapping[str, torch.Tensor]:
    """What a checkpoint holds: the adapters, or every weight; references, not copies, where they are contiguous.

    The files are written from one copy of a tensor after the other in the host's memory.
    Source: transformers Trainer._save, modeling_utils.py (save_pretrained); peft peft_model.py (save_pretrained);
    safetensors torch.py (_tobytes).
    """
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    else:
        found = model.state_dict()
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _count_tokens(device: torch.device) -> torch.Tensor:
    """num_items_in_batch: one integer on the device. Source: Trainer._get_num_items_in_batch."""
    import torch

    return torch.ones((), dtype=torch.int64, device=device)


def compute_loss(model: Any, batch: Batch, token_count: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    """The loss and the outputs of one micro-batch."""
    extra = {} if token_count is None else {"num_items_in_batch": token_count}
    outputs = model(**batch, **extra)
    return outputs["loss"], outputs
