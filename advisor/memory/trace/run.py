"""Record a training run on storage-less tensors, and add its events up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from advisor.errors import AdvisorError, EnvironmentLacksError
from advisor.memory.allocator import EMPTY_CACHE, Replay, Request, replay, rounded
from advisor.memory.kernels import Cpu, Gpu, Hardware
from advisor.memory.trace.device import DeviceSemantics
from advisor.memory.trace.libraries import import_bitsandbytes
from advisor.memory.trace.result import LOADING, OUTSIDE_STEPS, Allocation, Event, Trace
from advisor.memory.trace.tracker import Tracker, adopt_model
from advisor.plan import Plan
from advisor.training.build import BuiltModel, build_optimizer, build_skeleton, fill_model
from advisor.training.step import Step, make_batch, settings_of, weights_to_save, wrap_forward


def record(
    plan: Plan,
    architecture: Mapping[str, Any],
    hardware: Hardware,
    steps: int,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Event], BuiltModel]:
    """Every allocation in order, and the model that made them: loading, `steps` steps, evaluation, saving."""
    # Before the tracker, which looks up the rules of its operators.
    import_bitsandbytes()
    tracker = Tracker(
        "meta",
        hardware,
        padded=plan.padding == "longest" and plan.micro_batch > 1,
        tokens=plan.seq_len,
        samples=plan.samples if plan.packing else 0,
    )
    skeleton = build_skeleton(plan, architecture)
    progress("loading")
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
    with _naming_what_stopped(tracker), semantics, tracker, tracker.following_modules(built.model, built.decoder):
        optimizer = build_optimizer(plan, built.model)
        step = Step(built.model, optimizer, settings_of(plan), tracker.enter)
        for number in range(1, steps + 1):
            progress(f"step {number}")
            step.run(batches)
            _label_states(tracker, optimizer, built.model)
        progress("evaluation")
        step.evaluate(batches[0])
        progress("saving")
        tracker.enter("saving")
        saved = weights_to_save(built.model)
        converted = _convert_to_save(plan, saved, hardware)
        # What the program lets go of at its end is no part of the run.
        tracker.stop()
        del saved, converted
    return tracker.events, built


def _convert_to_save(plan: Plan, saved: Mapping[str, torch.Tensor], hardware: Hardware) -> list[torch.Tensor]:
    """fp32 weights that are saved in 16 bits: one copy of each, in the host's memory.

    Source: advisor/training/artefacts.py (_converted).
    """
    if plan.method != "full" or plan.saved_dtype == plan.dtype or not isinstance(hardware, Cpu):
        return []
    # Tied weights are two tensors over one storage.
    once = {one.untyped_storage()._cdata: one for one in saved.values() if one.is_floating_point()}
    return [tensor.to(getattr(torch, plan.saved_dtype)) for tensor in once.values()]


@contextmanager
def _naming_what_stopped(tracker: Tracker) -> Iterator[None]:
    """An error of the model's own code becomes one that says where it happened."""
    try:
        yield
    except AdvisorError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError) as error:
        raise EnvironmentLacksError(
            f"This model cannot be traced: {type(error).__name__} after {tracker.places.operation}.",
            why=str(error)[:400],
            hint="If it trains on a GPU, probe it there; else try another attention, or name LoRA's modules.",
        ) from error


def _label_gradients(tracker: Tracker, model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:

            def label(leaf: torch.Tensor, name: str = name) -> None:
                if leaf.grad is not None:
                    tracker.adopt(leaf.grad, "gradients", "accumulate", name)

            parameter.register_post_accumulate_grad_hook(label)


def _label_states(tracker: Tracker, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Optimizer states belong to the parameter that they are for."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for kind, value in state.items():
            paged = getattr(value, "is_paged", False)
            if isinstance(value, torch.Tensor) and value.device.type == "meta" and not paged:
                tracker.adopt(value, "optimizer", str(kind), names.get(id(parameter), ""))


def moment_class(moment: str) -> str:
    """The backward of any layer is a "layer backward"; the others are their own class."""
    return "layer backward" if moment.startswith("backward of layer") else moment


def summarize(events: Sequence[Event], built: BuiltModel, gpu: Gpu, *, empties_cache: bool) -> Trace:
    """Add the events up."""
    moments: dict[str, int] = {}
    peak, peak_at, alive = 0, 0, 0
    for index, (event, alive) in enumerate(zip(events, _running_totals(events), strict=True)):
        moments[event.moment] = max(moments.get(event.moment, 0), alive)
        if alive > peak:
            peak, peak_at = alive, index
    living = _alive_after(events, peak_at)
    components: dict[str, int] = {}
    for allocation in living:
        components[allocation.component] = components.get(allocation.component, 0) + rounded(allocation.nbytes)
    return Trace(
        allocated_bytes=peak,
        at=events[peak_at].moment,
        step_bytes=max(size for moment, size in moments.items() if moment not in OUTSIDE_STEPS),
        loading_bytes=moments[LOADING],
        evaluation_bytes=moments.get("evaluation", 0),
        saving_bytes=moments.get("saving", alive),
        default=_replayed(events, gpu, expandable=False, empties_cache=empties_cache),
        expandable=_replayed(events, gpu, expandable=True, empties_cache=empties_cache),
        components=components,
        largest=tuple(sorted(living, key=lambda allocation: -allocation.nbytes)),
        peaks=_class_peaks(moments),
        moments=moments,
        total_parameters=built.total_parameters,
        trainable_parameters=built.trainable_parameters,
        total_bytes=gpu.total_bytes,
        empties_cache=empties_cache,
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
        if loading and event.moment != LOADING:
            loading = False
            if empties_cache:
                yield EMPTY_CACHE
        yield id(event.allocation), event.allocation.nbytes, event.freed


__all__ = ["moment_class", "record", "summarize"]
