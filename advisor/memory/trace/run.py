"""`trace`: a plan and an architecture → what a training run allocates, and when."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from advisor.memory.allocator import EMPTY_CACHE, Replay, Request, replay, rounded
from advisor.memory.kernels import Gpu, Hardware
from advisor.memory.trace.device import DeviceSemantics
from advisor.memory.trace.tracker import Allocation, Event, Tracker, adopt_model
from advisor.plan import Plan
from advisor.training.build import BuiltModel, build_optimizer, build_skeleton, fill_model
from advisor.training.step import Step, make_batch, settings_of, wrap_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one training run allocates."""

    allocated_bytes: int
    """Peak of the steps: the sum of what is alive, each rounded up to 512 bytes.

    torch.cuda.max_memory_allocated says this with expandable_segments; the default allocator hands out
    blocks up to 1 MiB larger than asked and counts them whole: `default.allocated_bytes`.
    """

    at: str
    """The moment of that peak."""

    loading_bytes: int
    """Peak while the model is made, weights arriving in the checkpoint's order."""

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
    """The peak within each single moment."""

    total_parameters: int
    trainable_parameters: int

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


def trace(
    plan: Plan,
    architecture: Mapping[str, Any],
    *,
    gpu: Gpu | None = None,
    capability: tuple[int, int] | None = None,
    steps: int = 2,
    empties_cache: bool = True,
) -> Trace:
    """Trace the making of a model and `steps` optimizer steps.

    Args:
        plan: what is trained, and how.
        architecture: the keys of a config.json.
        gpu: whose kernels run; by default one of `capability`, by default (8, 0).
        capability: short for a Gpu of that compute capability.
        steps: optimizer steps; the second has the optimizer's states.
        empties_cache: whether torch.cuda.empty_cache() is called between loading and training, as
            this project's trainer does.

    Raises:
        AdvisorError: the plan, the architecture or an operation cannot be traced.
    """
    gpu = gpu or Gpu(capability=capability or (8, 0))
    events, built = record(plan, architecture, gpu, steps)
    return summarize(events, built, gpu, empties_cache=empties_cache)


def record(
    plan: Plan, architecture: Mapping[str, Any], hardware: Hardware, steps: int
) -> tuple[list[Event], BuiltModel]:
    """The allocations of loading and `steps` optimizer steps, in order, and the model that made them."""
    tracker = Tracker("meta", hardware, padded=plan.padding == "longest", tokens=plan.seq_len)
    skeleton = build_skeleton(plan, architecture)
    with tracker:
        built = fill_model(skeleton, plan, "meta")
    vocabulary = built.causal_lm.config.get_text_config().vocab_size
    tracker.vocabulary = vocabulary
    adopt_model(tracker, built.model)
    semantics = DeviceSemantics(hardware)
    autocast = None if plan.autocast == "none" else lambda: semantics.autocast(getattr(torch, plan.autocast))
    wrap_forward(built.model, autocast)
    _label_gradients(tracker, built.model)
    micro_steps = min(plan.gradient_accumulation, 2)
    batches = [lambda: make_batch(plan, vocabulary, "meta")] * micro_steps
    with semantics, tracker, tracker.following_modules(built.model, built.decoder):
        optimizer = build_optimizer(plan, built.model)
        step = Step(built.model, optimizer, settings_of(plan), tracker.enter)
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
    """ "backward of layer 7" → "layer backward"; the others are their own class."""
    return "layer backward" if moment.startswith("backward of layer") else moment


def summarize(events: Sequence[Event], built: BuiltModel, gpu: Gpu, *, empties_cache: bool) -> Trace:
    """Add the events up."""
    moments: dict[str, int] = {}
    peak, peak_at = 0, 0
    for index, (event, alive) in enumerate(zip(events, _running_totals(events), strict=True)):
        moments[event.moment] = max(moments.get(event.moment, 0), alive)
        if alive > peak and event.moment != "load":
            peak, peak_at = alive, index
    living = _alive_after(events, peak_at)
    components: dict[str, int] = {}
    for allocation in living:
        components[allocation.component] = components.get(allocation.component, 0) + rounded(allocation.nbytes)
    return Trace(
        allocated_bytes=peak,
        at=events[peak_at].moment,
        loading_bytes=moments["load"],
        default=_replayed(events, gpu, expandable=False, empties_cache=empties_cache),
        expandable=_replayed(events, gpu, expandable=True, empties_cache=empties_cache),
        components=components,
        largest=tuple(sorted(living, key=lambda allocation: -allocation.nbytes)),
        peaks=_class_peaks(moments),
        moments=moments,
        total_parameters=built.total_parameters,
        trainable_parameters=built.trainable_parameters,
        events=tuple(events),
    )


def _running_totals(events: Sequence[Event]) -> Iterator[int]:
    alive = 0
    for event in events:
        size = rounded(event.allocation.nbytes)
        alive += -size if event.freed else size
        yield alive


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


def _alive_after(events: Sequence[Event], index: int) -> list[Allocation]:
    living: dict[int, Allocation] = {}
    for event in events[: index + 1]:
        if event.freed:
            living.pop(id(event.allocation), None)
        else:
            living[id(event.allocation)] = event.allocation
    return list(living.values())


def _replayed(events: Sequence[Event], gpu: Gpu, *, expandable: bool, empties_cache: bool) -> Replay:
    requests = _requests(events, empties_cache=empties_cache)
    return replay(requests, total_bytes=gpu.total_bytes, expandable=expandable)


def _requests(events: Sequence[Event], *, empties_cache: bool) -> Iterator[Request]:
    loading = True
    for event in events:
        if loading and event.moment != "load":
            loading = False
            if empties_cache:
                yield EMPTY_CACHE
        yield id(event.allocation), event.allocation.nbytes, event.freed


__all__ = ["Trace", "moment_class", "record", "summarize", "trace"]
