"""`trace`: a plan and an architecture → what a training step allocates, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from advisor.memory.allocator import Replay, replay
from advisor.memory.kernels import Gpu, Hardware
from advisor.memory.trace.device import DeviceSemantics
from advisor.memory.trace.tracker import Allocation, Event, Tracker, adopt_model
from advisor.plan import Plan
from advisor.training.build import BuiltModel, build_model, build_optimizer
from advisor.training.step import Step, make_batch, settings_of, wrap_forward


ALLOCATION_UNIT_BYTES = 512
"""What the caching allocator rounds every request to. Source: c10 CUDACachingAllocator, kMinBlockSize."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one training run allocates."""

    allocated_bytes: int
    """torch.cuda.max_memory_allocated over the steps."""

    reserved_bytes: int
    """torch.cuda.max_memory_reserved with the default allocator."""

    reserved_expandable_bytes: int
    """The same with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."""

    at: str
    """The moment of the peak."""

    components: Mapping[str, int]
    """Bytes alive at the peak, by what they are for."""

    largest: tuple[Allocation, ...]
    """What was alive at the peak, largest first."""

    peaks: Mapping[str, int]
    """The peak within each class of moment."""

    moments: Mapping[str, int]
    """The peak within each single moment."""

    total_parameters: int
    trainable_parameters: int

    events: tuple[Event, ...]
    """Everything that happened, in order."""


def trace(
    plan: Plan,
    architecture: Mapping[str, Any],
    *,
    gpu: Gpu | None = None,
    capability: tuple[int, int] | None = None,
    steps: int = 2,
) -> Trace:
    """Trace `steps` optimizer steps of a plan.

    Raises:
        AdvisorError: the plan, the architecture or an operation cannot be traced.
    """
    gpu = gpu or Gpu(capability=capability or (8, 0))
    events, built = record(plan, architecture, gpu, steps)
    return summarize(events, built, gpu)


def record(plan: Plan, architecture: Mapping[str, Any], hardware: Hardware, steps: int) -> tuple[list[Event], BuiltModel]:
    """The allocations of `steps` optimizer steps, in order, and the model that made them."""
    built = build_model(plan, architecture, "meta")
    vocabulary = built.causal_lm.config.vocab_size
    tracker = Tracker("meta", hardware, padded=plan.padding == "longest", vocabulary=vocabulary, tokens=plan.seq_len)
    adopt_model(tracker, built.model)
    semantics = DeviceSemantics(hardware)
    autocast = None if plan.autocast == "none" else lambda: semantics.autocast(getattr(torch, plan.autocast))
    wrap_forward(built.model, autocast)
    _label_gradients(tracker, built.model)
    settings = settings_of(plan)
    micro_steps = min(plan.gradient_accumulation, 2)
    batches = [lambda: make_batch(plan, vocabulary, "meta")] * micro_steps
    with semantics, tracker, tracker.following_modules(built.model, built.decoder):
        optimizer = build_optimizer(plan, built.model)
        step = Step(built.model, optimizer, settings, tracker.enter)
        for _ in range(steps):
            step.run(batches)
            _label_states(tracker, optimizer)
    return tracker.events, built


def _label_gradients(tracker: Tracker, model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:

            def label(leaf: torch.Tensor, name: str = name) -> None:
                if leaf.grad is not None:
                    tracker.adopt(leaf.grad, "gradients", "accumulate", name)

            parameter.register_post_accumulate_grad_hook(label)


def _label_states(tracker: Tracker, optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            paged = getattr(value, "is_paged", False)
            if isinstance(value, torch.Tensor) and value.device.type == "meta" and not paged:
                tracker.adopt(value, "optimizer", "optimizer state", "")


def moment_class(moment: str) -> str:
    """"backward of layer 7" → "layer backward"; the others are their own class."""
    return "layer backward" if moment.startswith("backward of layer") else moment


def summarize(events: list[Event], built: BuiltModel, gpu: Gpu) -> Trace:
    """Add the events up."""
    alive = 0
    peak, peak_at = 0, -1
    moments: dict[str, int] = {}
    for index, event in enumerate(events):
        size = rounded(event.allocation.nbytes)
        alive += -size if event.freed else size
        if alive > peak:
            peak, peak_at = alive, index
        moments[event.moment] = max(moments.get(event.moment, 0), alive)
    living = _alive_after(events, peak_at)
    components: dict[str, int] = {}
    for allocation in living:
        components[allocation.component] = components.get(allocation.component, 0) + rounded(allocation.nbytes)
    default = _replayed(events, gpu, expandable=False)
    return Trace(
        allocated_bytes=peak,
        reserved_bytes=default.reserved_bytes,
        reserved_expandable_bytes=_replayed(events, gpu, expandable=True).reserved_bytes,
        at=events[peak_at].moment,
        components=components,
        largest=tuple(sorted(living, key=lambda allocation: -allocation.nbytes)),
        peaks=_class_peaks(moments),
        moments=moments,
        total_parameters=built.total_parameters,
        trainable_parameters=built.trainable_parameters,
        events=tuple(events),
    )


def _class_peaks(moments: Mapping[str, int]) -> dict[str, int]:
    peaks: dict[str, int] = {}
    for moment, size in moments.items():
        kind = moment_class(moment)
        peaks[kind] = max(peaks.get(kind, 0), size)
    layers = [moment for moment in moments if moment.startswith("backward of layer")]
    if layers:
        layers.sort(key=lambda moment: int(moment.rpartition(" ")[2]))
        peaks["layer backward, first"] = moments[layers[-1]]
        peaks["layer backward, last"] = moments[layers[0]]
    return peaks


def _alive_after(events: list[Event], index: int) -> list[Allocation]:
    living: dict[int, Allocation] = {}
    for event in events[: index + 1]:
        if event.freed:
            living.pop(id(event.allocation), None)
        else:
            living[id(event.allocation)] = event.allocation
    return list(living.values())


def _replayed(events: list[Event], gpu: Gpu, *, expandable: bool) -> Replay:
    requests = ((id(event.allocation), event.allocation.nbytes, event.freed) for event in events)
    return replay(requests, total_bytes=gpu.total_bytes, expandable=expandable)


def rounded(size_bytes: int) -> int:
    """Bytes as the allocator counts them."""
    unit = ALLOCATION_UNIT_BYTES
    return -(-size_bytes // unit) * unit


__all__ = ["Trace", "moment_class", "record", "rounded", "summarize", "trace"]
