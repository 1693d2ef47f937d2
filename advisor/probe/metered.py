"""The training's own Trainer, telling when each moment of a step begins and how long the parts of a step take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from advisor.probe.meter import MemoryMeter
from advisor.training.build import BuiltModel
from advisor.training.monitor import Monitor
from advisor.training.trainer import PlanTrainer

COUNTED_STEPS = 2
"""The second finds the first one's optimizer states; on the CPU later ones are timed without the profiler."""


@dataclass(slots=True)
class Timing:
    """How long the parts of one optimizer step took."""

    micro_step_seconds: float
    optimizer_seconds: float


@dataclass(slots=True)
class StepClock:
    """Times steps at their edges, where it waits for the device.

    Args:
        device: waited for.
    """

    device: torch.device
    timings: list[Timing] = field(default_factory=list)
    _began: float = 0.0
    _forward: float = 0.0
    _updating: float = 0.0
    _micro_steps: int = 0

    def begin(self) -> None:
        """A step begins: its batches are fetched."""
        self._began, self._micro_steps = self._now(), 0

    def micro_step(self) -> None:
        """A forward begins."""
        if self._micro_steps == 0:
            self._forward = self._now()
        self._micro_steps += 1

    def update(self) -> None:
        """The last backward has ended."""
        self._updating = self._now()

    def end(self) -> None:
        """The step has ended."""
        ended, inside = self._now(), self._updating - self._forward
        rest = ended - self._began - inside
        self.timings.append(
            Timing(micro_step_seconds=inside / max(1, self._micro_steps), optimizer_seconds=max(0.0, rest))
        )

    def typical(self, counted: int) -> Timing | None:
        """The mean of the steps after so many; None where there are no more."""
        kept = self.timings[counted:]
        if not kept:
            return None
        return Timing(
            micro_step_seconds=fmean(one.micro_step_seconds for one in kept),
            optimizer_seconds=fmean(one.optimizer_seconds for one in kept),
        )

    def _now(self) -> float:
        if self.device.type in ("cuda", "xpu", "mps"):
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()


class StepEnds(Monitor):
    """The training's monitor; says when a step has been logged, which is its end, and saves only when asked."""

    ended: Callable[[], None] = staticmethod(lambda: None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No checkpoint between two steps."""
        super().on_step_end(args, state, control, **kwargs)
        control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """A step's loss has been read."""
        super().on_log(args, state, control, logs, **kwargs)
        if logs and "loss" in logs:
            self.ended()


class MeteredTrainer(PlanTrainer):
    """Trains as PlanTrainer does; a meter and a clock are told where it is.

    Args:
        meter: counts memory.
        clock: times steps.
        built: the model.
        **settings: PlanTrainer's.
    """

    def __init__(
        self, *, meter: MemoryMeter, clock: StepClock, built: BuiltModel, tell: Callable[[str], None], **settings: Any
    ) -> None:
        self._meter, self._clock, self._tell = meter, clock, tell
        super().__init__(built=built, **settings)
        self._phase = ""
        self._watch(built)
        self._wrap_backward()

    @property
    def phase(self) -> str:
        """The moment that it is in; empty before the first."""
        return self._phase

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """A step begins."""
        step = self.state.global_step + 1
        self._tell(f"step {step}")
        if step > COUNTED_STEPS:
            self._meter.pause()
        self._clock.begin()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A micro-step; after the last one of a step gradients are clipped and the optimizer steps."""
        self._clock.micro_step()
        self._enter("forward")
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._clock.update()
            self._enter("optimizer step")
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluation begins, between two steps or after the last."""
        self._tell("evaluation")
        self._phase = "evaluation"
        self._meter.enter("evaluation")
        found: dict[str, float] = super().evaluate(*args, **kwargs)
        return found

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._tell("saving")
        self._phase = "saving"
        self._meter.enter("saving")
        super()._save_checkpoint(model, trial)

    def _enter(self, moment: str) -> None:
        self._phase = moment
        if self.state.global_step < COUNTED_STEPS or self._meter.kind != "profiler":
            self._meter.enter(moment)

    def _wrap_backward(self) -> None:
        """Backward begins where accelerate is handed the loss."""
        backward = self.accelerator.backward

        def run_backward(loss: torch.Tensor, **options: Any) -> None:
            self._enter("loss backward")
            backward(loss, **options)

        self.accelerator.backward = run_backward

    def _watch(self, built: BuiltModel) -> None:
        """The loss begins where the decoder ends; a layer's backward where its output's gradient has arrived."""
        built.decoder.register_forward_hook(self._decoder_ended)
        layers = _layers(built)
        for number, layer in enumerate(layers):
            moment = {len(layers) - 1: "layer backward, first", 0: "layer backward, last"}.get(number)
            layer.register_forward_hook(self._layer_ended(moment or "layer backward"))
        if layers:
            layers[0].register_forward_pre_hook(self._layers_begin, with_kwargs=True)

    def _decoder_ended(self, *_: Any) -> None:
        if self._phase == "forward":
            self._enter("loss")

    def _layer_ended(self, moment: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if self._phase == "forward" and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: self._enter(moment))

        return hook

    def _layers_begin(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        # Where it needs a gradient that nothing but the layers needs, there is no embedding to go back to.
        if self._phase == "forward" and isinstance(hidden, torch.Tensor) and hidden.grad_fn is not None:
            hidden.register_hook(lambda _: self._enter("embedding backward"))


def _layers(built: BuiltModel) -> list[torch.nn.Module]:
    found = getattr(built.decoder, "layers", None)
    return list(found) if isinstance(found, torch.nn.ModuleList) else []


__all__ = ["COUNTED_STEPS", "MeteredTrainer", "StepClock", "StepEnds", "Timing"]
