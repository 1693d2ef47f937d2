"""The dry run itself: the training's own code over random weights and the worst batch."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from advisor.plan import Plan
from advisor.probe.measurement import LARGEST_ACCUMULATION, ProbeRequest
from advisor.probe.meter import MemoryMeter, make_meter
from advisor.probe.metered import COUNTED_STEPS, MeteredTrainer, StepClock, StepEnds
from advisor.training.artefacts import CardFacts, save_artefacts
from advisor.training.build import BuiltModel, build_skeleton, fill_model
from advisor.training.data import Collator, LengthSampler
from advisor.training.interruption import Interruption
from advisor.training.log import quiet_libraries
from advisor.training.metrics import METRICS, Metrics
from advisor.training.monitor import Saving
from advisor.training.refusals import refuse_slow_arithmetic, usable_device
from advisor.training.session import compile_layers, empty_cache, say_how_it_is_quantised
from advisor.training.step import weights_to_save
from advisor.training.trainer import training_arguments
from advisor.units import GIB, size

PADDING_ID = 0
"""No tokenizer is downloaded, and no number of a random token means anything."""

_DISK_LEFT_BYTES = GIB
"""A checkpoint that would leave less than this is not written."""


def probed_plan(plan: Plan, steps: int) -> Plan:
    """The plan as it is tried: as many steps, and no more micro-batches to each than memory depends on."""
    training = replace(plan.training, max_steps=steps, epochs=1.0)
    accumulation = min(plan.gradient_accumulation, LARGEST_ACCUMULATION)
    return replace(plan, gradient_accumulation=accumulation, training=training)


@dataclass(frozen=True, slots=True)
class WorstRows:
    """Rows of which every micro-batch is the worst that the plan allows.

    Without padding every row is full. With it the first row of a micro-batch is full and the others are a token
    shorter, as in the trace: the batch is as wide as can be and has a mask. Packed rows hold as many samples as the
    plan allows.
    """

    plan: Plan
    length: int
    vocabulary: int
    number: int

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[index] for index in range(self.number))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Tokens from a generator of the row's own: torch's random state stays the training's."""
        plan = self.plan
        shorter = plan.padding == "longest" and index % plan.micro_batch > 0
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, self.vocabulary, (self.length - shorter,), generator=generator)
        row = {"input_ids": tokens, "labels": tokens}
        if plan.packing:
            # The first token of a sample carries no loss, so a sample has a second.
            sample = max(2, -(-self.length // (plan.samples // plan.micro_batch)))
            positions = torch.arange(len(tokens)) % sample
            row |= {"position_ids": positions, "labels": tokens.masked_fill(positions == 0, -100)}
        return row

    def order(self) -> LengthSampler:
        """The training's sampler, which keeps rows of one length together: here those of one micro-batch."""
        size = self.plan.micro_batch
        lengths = [self.number - index // size for index in range(self.number)]
        return LengthSampler(
            lengths, batch_size=size, accumulation=self.plan.gradient_accumulation, seed=self.plan.training.seed
        )


class DryRun:
    """One dry run; what it has found so far can be asked for at any time.

    Args:
        request: what is tried.
        folder: where the saving path writes.
        tell: called with the name of what begins.
    """

    def __init__(self, request: ProbeRequest, folder: Path, tell: Callable[[str], None]) -> None:
        self._request = request
        self._plan = probed_plan(request.plan, request.steps)
        self._folder = folder
        self._tell = tell
        self._meter: MemoryMeter | None = None
        self._clock: StepClock | None = None
        self._facts: dict[str, Any] = {}
        self._notes: list[str] = []
        if request.plan.hold_outputs:
            self._notes.append(
                "hold_outputs is another loop's: this training lets go of its outputs, and was measured so."
            )
        tokens, room = self._length, self._plan.seq_len
        if tokens < room:
            self._notes.append(f"Rows are {tokens:,} tokens, as the data's longest; the plan has room for {room:,}.")
        self._trainer: MeteredTrainer | None = None

    def facts(self) -> dict[str, Any]:
        """The fields of a Measurement that the run knows."""
        meter = self._meter
        peaks = dict(meter.peaks()) if meter is not None else {}
        reserved = dict(meter.reserved_peaks()) if meter is not None else {}
        timing = self._clock.typical(self._untimed) if self._clock is not None else None
        return {
            **self._facts,
            "meter": meter.kind if meter is not None else "none",
            "moments": peaks,
            "allocated_bytes": max(peaks.values(), default=None),
            "reserved_bytes": max((reserved or peaks).values(), default=None),
            "step_allocated_bytes": _within_steps(peaks),
            "step_reserved_bytes": _within_steps(reserved or peaks),
            "at": max(peaks, key=lambda moment: peaks[moment]) if peaks else "",
            "micro_step_seconds": timing.micro_step_seconds if timing else None,
            "optimizer_seconds": timing.optimizer_seconds if timing else None,
            "steps": len(self._clock.timings) if self._clock is not None else 0,
            "notes": self._notes,
        }

    @property
    def phase(self) -> str:
        """The moment of a step that it is in; empty outside steps."""
        return self._trainer.phase if self._trainer is not None else ""

    @property
    def _untimed(self) -> int:
        """Steps that are no measure of speed: the first warms up, and the profiler slows the counted ones down."""
        return COUNTED_STEPS if self._meter is not None and self._meter.kind == "profiler" else 1

    def run(self) -> None:
        """Builds, trains, evaluates, saves.

        Raises:
            AdvisorError: the plan or the device cannot be used.
            Exception: whatever the training's code raises.
        """
        from transformers import set_seed

        quiet_libraries()
        self._tell("the plan's check")
        plan, request = self._plan, self._request
        arguments = training_arguments(plan, self._folder, device=request.device, evaluates=True)
        device = usable_device(arguments, request.device, plan)
        self._meter, self._clock = make_meter(device), StepClock(device)
        self._facts["device_name"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        set_seed(plan.training.seed)
        self._tell("loading")
        skeleton = build_skeleton(plan, request.architecture)
        self._meter.enter("loading")
        built = fill_model(skeleton, plan, device)
        del skeleton
        say_how_it_is_quantised(built, plan)
        refuse_slow_arithmetic(plan, built)
        self._facts |= {
            "total_parameters": built.total_parameters,
            "trainable_parameters": built.trainable_parameters,
            "tokens_a_micro_step": plan.micro_batch * self._length,
        }
        if plan.training.compile:
            compile_layers(built)
        gc.collect()
        empty_cache(device)
        with Metrics(self._folder / METRICS) as metrics:
            self._trainer = trainer = self._make_trainer(built, arguments, metrics, device)
            trainer.train()
            if request.saves:
                self._save(trainer, built)

    @property
    def _length(self) -> int:
        """Tokens of the longest row."""
        longest = self._request.longest
        return self._plan.seq_len if longest is None or self._plan.packing else min(longest, self._plan.seq_len)

    def _make_trainer(
        self, built: BuiltModel, arguments: Any, metrics: Metrics, device: torch.device
    ) -> MeteredTrainer:
        plan, clock = self._plan, self._clock
        assert self._meter is not None
        assert clock is not None
        vocabulary = built.causal_lm.config.get_text_config().vocab_size
        rows = WorstRows(plan, self._length, vocabulary, plan.effective_batch * self._request.steps)
        monitor = StepEnds(
            device=device,
            metrics=metrics,
            interruption=Interruption(lambda _: None),
            saving=Saving(None),
            show=lambda _: None,
            advice="",
        )
        monitor.ended = clock.end
        trainer = MeteredTrainer(
            meter=self._meter,
            clock=clock,
            tell=self._tell,
            plan=plan,
            built=built,
            args=arguments,
            train=rows,
            validation=replace(rows, number=plan.micro_batch),
            order=rows.order(),
            collator=Collator(plan, PADDING_ID),
            pad_token_id=-1,
            monitor=monitor,
            saving=Saving(None),
        )
        _never_skip_a_step(trainer)
        return trainer

    def _save(self, trainer: MeteredTrainer, built: BuiltModel) -> None:
        """Writes what a run writes, where the disk has room for it, and deletes it."""
        needed = _checkpoint_bytes(trainer, built)
        free = shutil.disk_usage(self._folder).free
        if needed + _DISK_LEFT_BYTES > free:
            self._notes.append(
                f"The saving path was left out: a checkpoint takes {size(needed)}, and {size(free)} of disk is free "
                f"under {self._folder}."
            )
            return
        try:
            trainer.save_now()
        finally:
            shutil.rmtree(trainer.checkpoints, ignore_errors=True)
        artefacts = self._folder / "artefacts"
        card = CardFacts(
            base_model="a probe", data="random tokens", device=str(trainer.args.device), steps=0, versions={}
        )
        try:
            save_artefacts(built.model, _NoTokenizer(), str(artefacts), plan=self._plan, card=card)
        finally:
            shutil.rmtree(artefacts, ignore_errors=True)


class _NoTokenizer:
    """Nothing was downloaded, so there is none to save."""

    def save_pretrained(self, folder: Path) -> None:
        """Its few files are no part of what is measured."""


def _within_steps(peaks: Mapping[str, int]) -> int | None:
    outside = ("loading", "evaluation", "saving")
    return max((peak for moment, peak in peaks.items() if moment not in outside), default=None)


def _never_skip_a_step(trainer: MeteredTrainer) -> None:
    """Gradient scaling begins high and skips steps until it is low enough; a skipped step makes no optimizer states."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        scaler.load_state_dict({**scaler.state_dict(), "scale": 1.0})


def _checkpoint_bytes(trainer: MeteredTrainer, built: BuiltModel) -> int:
    """Weights and optimizer states."""
    optimizer = trainer.optimizer
    states = optimizer.state.values() if optimizer is not None else ()
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    tensors += weights_to_save(built.model).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


__all__ = ["DryRun", "WorstRows", "probed_plan"]
