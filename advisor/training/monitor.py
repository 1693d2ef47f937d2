"""What watches a training: its metrics, its memory, when to save, when to stop."""

# ruff: noqa: ARG002 - a callback has the arguments that transformers passes.

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from advisor.report.terminal.training import Progress
from advisor.training.interruption import Interrupted, Interruption
from advisor.training.metrics import Metrics
from advisor.training.outcome import DivergedError

if TYPE_CHECKING:
    import torch

LARGEST_SERIES = 3
"""Steps in a row without a finite loss after which a run stops."""

SAVE_EVERY_SECONDS = 600.0
"""Work that may be lost when the job names no number of steps."""

SAVING_SHARE = 0.05
"""Part of the time that saving may take then."""

_SMOOTHING = 0.1
_FIRST_STEPS = 3


@dataclass(slots=True)
class Progressed:
    """How far the run is; what result.json is made of."""

    step: int = 0
    steps: int = 0
    first_loss: float | None = None
    final_loss: float | None = None
    evaluation_loss: float | None = None
    evaluated_at: int | None = None
    """The step after which that was."""

    seconds: float = 0.0
    tokens: int = 0


def progressed_before(lines: Sequence[Mapping[str, Any]]) -> Progressed:
    """What a run that goes on has behind it, from the lines of its metrics."""
    before = Progressed()
    for line in lines:
        if "evaluation_loss" in line:
            before.evaluation_loss, before.evaluated_at = line["evaluation_loss"], line["step"]
            continue
        before.step, before.final_loss = line["step"], line["loss"]
        before.first_loss = line["loss"] if before.first_loss is None else before.first_loss
        before.seconds += line["seconds"]
        before.tokens += round((line["tokens_per_second"] or 0) * line["seconds"])
    return before


@dataclass(slots=True)
class Saving:
    """When to write a checkpoint.

    Args:
        every_steps: optimizer steps between two; None goes by the clock.
    """

    every_steps: int | None
    clock: Callable[[], float] = time.monotonic
    last: float = field(init=False)
    cost: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.last = self.clock()

    def is_due(self, step: int) -> bool:
        """Whether this step is one after which to save."""
        if self.every_steps is not None:
            return step % self.every_steps == 0
        return self.clock() - self.last >= max(SAVE_EVERY_SECONDS, self.cost / SAVING_SHARE)

    def took(self, seconds: float) -> None:
        """A checkpoint was just written in so many seconds."""
        self.last, self.cost = self.clock(), seconds


class Monitor(TrainerCallback):
    """Trainer's callback for all of it.

    Args:
        device: whose memory is read.
        metrics: where every step is written.
        interruption: asked after every step.
        saving: asked after every step.
        show: called with the progress after every step.
        advice: what to do should the loss not be a number.
        say: called with a sentence that a person should read.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        metrics: Metrics,
        interruption: Interruption,
        saving: Saving,
        show: Callable[[Progress], None],
        advice: str,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.progressed = progressed_before(metrics.kept)
        self._memory = MemoryReader(device)
        self._metrics = metrics
        self._interruption = interruption
        self._saving = saving
        self._show = show
        self._advice = advice
        self._say = say
        self._began = time.perf_counter()
        self._tokens = 0
        self._pace: float | None = None
        self._not_finite = 0

    def goes_on(self, before: float, now: float) -> None:
        """The learning rates of the next step: with the length that the run had, and with the one that it has."""
        if before != now:
            self._say(
                f"With {self.progressed.steps:,} steps in all the learning rate goes on at {now:.2e}; with as many as "
                f"the run had before, it would be {before:.2e}."
            )

    def begin_step(self, began: float, tokens: int) -> None:
        """The batches of the next step have been fetched; it began before that."""
        self._began, self._tokens = began, tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer knows how many steps there are."""
        self.progressed.step, self.progressed.steps = state.global_step, state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide whether to save, and whether to stop."""
        self.progressed.step = state.global_step
        if self._interruption.number is not None:
            control.should_training_stop = True
        control.should_save = control.should_training_stop or self._saving.is_due(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """A step's loss, or an evaluation's."""
        logs = logs or {}
        if "loss" in logs:
            self._log_step(state, logs)
            if self._not_finite:
                # These weights may be ruined, and rotation would put them in the place of good ones.
                control.should_save = False
        elif "eval_loss" in logs:
            self.progressed.evaluation_loss = _finite(logs["eval_loss"])
            self.progressed.evaluated_at = state.global_step
            self._metrics.write({"step": state.global_step, "evaluation_loss": logs["eval_loss"]})

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An evaluation that nobody waits for is broken off."""
        if self._interruption.number is not None:
            raise Interrupted(self._interruption.number)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Who was asked to stop does not evaluate first."""
        if self._interruption.number is not None:
            control.should_evaluate = False

    def _log_step(self, state: Any, logs: dict[str, Any]) -> None:
        """Called once the loss is known, so the device has done the step."""
        seconds = time.perf_counter() - self._began
        loss, gradient_norm = logs["loss"], logs.get("grad_norm")
        allocated, reserved = self._memory.peaks()
        rate = self._tokens / seconds if seconds > 0 else None
        done = self.progressed
        done.seconds += seconds
        done.tokens += self._tokens
        self._metrics.write(
            {
                "step": state.global_step,
                "epoch": state.epoch,
                "loss": loss,
                "learning_rate": logs.get("learning_rate"),
                "gradient_norm": gradient_norm,
                "tokens_per_second": rate,
                "allocated_bytes": allocated,
                "reserved_bytes": reserved,
                "seconds": seconds,
            }
        )
        self._judge(loss, state.global_step)
        done.first_loss = _finite(loss) if done.first_loss is None else done.first_loss
        done.final_loss = _finite(loss)
        # The first step warms up, and has the longest batch.
        self._pace = (
            seconds if self._pace is None or done.step <= 2 else self._pace + _SMOOTHING * (seconds - self._pace)
        )
        self._show(
            Progress(
                step=state.global_step,
                steps=state.max_steps,
                loss=loss,
                learning_rate=logs.get("learning_rate"),
                tokens_per_second=rate,
                seconds_left=self._pace * (state.max_steps - state.global_step),
                allocated_bytes=allocated,
                reserved_bytes=reserved,
            )
        )

    def _judge(self, loss: float, step: int) -> None:
        """Count the steps in a row whose loss is no finite number.

        Raises:
            DivergedError: there were too many.
        """
        self._not_finite = 0 if math.isfinite(loss) else self._not_finite + 1
        if self._not_finite >= LARGEST_SERIES:
            raise DivergedError(
                f"The loss of {self._not_finite} steps in a row, up to step {step}, is not a finite number.",
                hint=self._advice,
            )


class MemoryReader:
    """Peaks since the process began, as torch counts them on CUDA, ROCm and XPU; None elsewhere."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._module = getattr(torch, device.type) if device.type in ("cuda", "xpu") else None

    def peaks(self) -> tuple[int | None, int | None]:
        """Allocated and reserved bytes."""
        if self._module is None:
            return None, None
        stats = self._module.memory_stats(self._device)
        return stats.get("allocated_bytes.all.peak", 0), stats.get("reserved_bytes.all.peak", 0)

    def driver_bytes(self) -> int | None:
        """What NVML says that this process holds; None where it does not say, or knows processes by other numbers."""
        if self._device.type != "cuda":
            return None
        import pynvml  # type: ignore[import-untyped]

        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{_uuid(self._device)}")
            found = {one.pid: one.usedGpuMemory for one in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        except (AttributeError, pynvml.NVMLError):
            return None
        return found.get(os.getpid())


def _uuid(device: torch.device) -> str:
    """The card's, without its prefix."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
