"""Record a training run on storage-less tensors, and add its events up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from advisor.errors import AdvisorError, EnvironmentLacksError
from advisor.memory.allocator import CachingAllocator, Replay
from advisor.memory.kernels import Cpu, Gpu, Hardware
from advisor.memory.regime import EXPANDABLE, TORCH_DEFAULTS, Regime
from advisor.memory.trace.compiler import compiler_postponed
from advisor.memory.trace.device import DeviceSemantics
from advisor.memory.trace.imports import collection_paused
from advisor.memory.trace.libraries import import_bitsandbytes
from advisor.memory.trace.replayed import walk
from advisor.memory.trace.result import LOADING, OUTSIDE_STEPS, Allocation, Event, Trace
from advisor.memory.trace.tracker import Tracker, adopt_model
from advisor.plan import Plan
from advisor.training.build import BuiltModel, build_optimizer, build_skeleton, fill_model, quantised_modules
from advisor.training.step import Step, make_batch, settings_of, weights_to_save, wrap_forward


@compiler_postponed()
def record(
    plan: Plan,
    architecture: Mapping[str, Any],
    hardware: Hardware,
    steps: int,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Event], BuiltModel]:
    """Every allocation in order, and the model that made them: loading, `steps` steps, evaluation, saving."""
    with collection_paused() as resume:
        # Before the tracker, which looks up the rules of its operators.
        import_bitsandbytes()
        tracker = Tracker(
            hardware,
            padded=plan.padding == "longest" and plan.micro_batch > 1,
            tokens=plan.seq_len,
            samples=plan.samples if plan.packing else 0,
        )
        built = _load(plan, architecture, tracker, hardware, progress)
        resume()
        _train(plan, built, tracker, hardware, steps, progress)
    return tracker.events, built


def _load(
    plan: Plan,
    architecture: Mapping[str, Any],
    tracker: Tracker,
    hardware: Hardware,
    progress: Callable[[str], None],
) -> BuiltModel:
    skeleton = build_skeleton(plan, architecture)
    progress("loading")
    if isinstance(hardware, Gpu) and loads_to_device(plan):
        tracker.warm_up(warm_up_bytes(skeleton, plan))
    with tracker:
        built = fill_model(skeleton, plan, "meta")
    tracker.vocabulary = built.causal_lm.config.get_text_config().vocab_size
    adopt_model(tracker, built.model)
    return built


def _train(
    plan: Plan, built: BuiltModel, tracker: Tracker, hardware: Hardware, steps: int, progress: Callable[[str], None]
) -> None:
    semantics = DeviceSemantics(hardware)
    autocast = None if plan.autocast == "none" else lambda: semantics.autocast(getattr(torch, plan.autocast))
    wrap_forward(built.model, autocast)
    _label_gradients(tracker, built.model)
    micro_steps = min(plan.gradient_accumulation, 2)
    batches = [lambda: make_batch(plan, tracker.vocabulary, "meta")] * micro_steps
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


def loads_to_device(plan: Plan) -> bool:
    """Whether from_pretrained is told the device, and so warms the allocator up.

    This project's training does, and what is quantised is; a hand-written loop moves a model that is loaded.
    Source: transformers modeling_utils.py (_load_pretrained_model), quantizers/quantizer_bnb_4bit.py
    (update_device_map).
    """
    return plan.quantization is not None or not plan.hold_outputs


def warm_up_bytes(causal_lm: Any, plan: Plan) -> int:
    """What transformers allocates and frees at once before it loads, so that the weights lie in one segment.

    Every parameter and buffer in its format, half a byte for what becomes 4-bit, as float16.
    Source: transformers modeling_utils.py (caching_allocator_warmup, get_total_byte_count).
    """
    size = 0.0
    quantised = {f"{path}.weight" for path, _ in quantised_modules(causal_lm, plan)}
    for name, parameter in causal_lm.named_parameters():
        size += parameter.numel() * (0.5 if name in quantised else parameter.element_size())
    # Buffers that are not saved are not loaded.
    saved = set(causal_lm.state_dict())
    size += sum(buffer.nbytes for name, buffer in causal_lm.named_buffers() if name in saved)
    return int(size // 2) * 2


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


def summarize(events: Sequence[Event], built: BuiltModel, gpu: Gpu, regime: Regime = EXPANDABLE) -> Trace:
    """Add the events up, as large as their blocks are under `regime`."""
    regimes = dict.fromkeys((TORCH_DEFAULTS, EXPANDABLE, regime))
    replays = {one: _replayed(events, gpu, one, keeps_sizes=one == regime) for one in regimes}
    moments: dict[str, int] = {}
    peak, peak_at, alive = 0, 0, 0
    for index, (event, alive) in enumerate(zip(events, _running_totals(events), strict=True)):
        moments[event.moment] = max(moments.get(event.moment, 0), alive)
        if alive > peak:
            peak, peak_at = alive, index
    living = _alive_after(events, peak_at)
    components: dict[str, int] = {}
    for allocation in living:
        components[allocation.component] = components.get(allocation.component, 0) + allocation.size_bytes
    return Trace(
        allocated_bytes=peak,
        at=events[peak_at].moment,
        step_bytes=max(size for moment, size in moments.items() if moment not in OUTSIDE_STEPS),
        loading_bytes=moments[LOADING],
        evaluation_bytes=moments.get("evaluation", 0),
        saving_bytes=moments.get("saving", alive),
        regime=regime,
        replayed=replays[regime],
        default=replays[TORCH_DEFAULTS],
        expandable=replays[EXPANDABLE],
        components=components,
        largest=tuple(sorted(living, key=lambda allocation: -allocation.nbytes)),
        peaks=_class_peaks(moments),
        moments=moments,
        total_parameters=built.total_parameters,
        trainable_parameters=built.trainable_parameters,
        total_bytes=gpu.total_bytes,
        events=tuple(events),
    )


def _running_totals(events: Sequence[Event]) -> Iterator[int]:
    alive = 0
    for event in events:
        size = event.allocation.size_bytes
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


def _replayed(events: Sequence[Event], gpu: Gpu, regime: Regime, *, keeps_sizes: bool) -> Replay:
    """The allocator under a regime; where `keeps_sizes`, what is in a block is said to be as large."""
    allocator = CachingAllocator(total_bytes=gpu.total_bytes, expandable=regime.expandable)
    failed = None
    for event, block in walk(events, allocator, empties_cache=regime.empties_cache):
        if block is None:
            failed = event.allocation.size_bytes
        elif keeps_sizes and not event.freed:
            event.allocation.size_bytes = block.size
    return Replay(
        allocated_bytes=allocator.peak_allocated_bytes,
        reserved_bytes=allocator.peak_reserved_bytes,
        released_bytes=allocator.released_bytes,
        failed_request_bytes=failed,
    )


__all__ = ["moment_class", "record", "summarize"]
