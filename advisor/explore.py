"""A plan that is changed one setting at a time, with what each change does to its memory: the explorer's core."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

from advisor.advise import METHOD_LABELS, usable_attentions
from advisor.errors import AdvisorError, PlanError
from advisor.fit import Fit, check_fit
from advisor.hardware import Gpu, what_if
from advisor.memory.estimate import Memory, estimate
from advisor.plan import METHODS, Attention, Loss, Optimizer, Plan
from advisor.profiles import ModelProfile, default_plan, gpu_names, load_gpu, load_model, model_names
from advisor.search import evaluate, search
from advisor.speed import Speed, estimate_speed

__all__ = ["KNOBS", "Knob", "View", "offers", "recommend_settings", "show", "shown_value", "turn", "warm_up"]

_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_LENGTHS = tuple(length for power in range(7, 18) for length in (2**power, 3 * 2 ** (power - 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """A setting that a key changes."""

    key: str
    """The key that takes the next value; its capital takes the one before."""

    name: str
    """The field of a plan; "gpu" for the GPU itself."""

    label: str


KNOBS = (
    Knob(key="m", name="model", label="model"),
    Knob(key="g", name="gpu", label="GPU"),
    Knob(key="f", name="method", label="fine-tuning"),
    Knob(key="n", name="seq_len", label="sequence length"),
    Knob(key="b", name="micro_batch", label="micro-batch"),
    Knob(key="a", name="gradient_accumulation", label="accumulation"),
    Knob(key="r", name="rank", label="adapter rank"),
    Knob(key="c", name="gradient_checkpointing", label="checkpointing"),
    Knob(key="o", name="optimizer", label="optimizer"),
    Knob(key="x", name="loss", label="loss"),
    Knob(key="e", name="attention", label="attention"),
    Knob(key="p", name="packing", label="packing"),
    Knob(key="i", name="optimizer_in_backward", label="step in backward"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One plan on one GPU, and everything that is shown of it."""

    model: ModelProfile
    gpu: Gpu
    home: Gpu
    """The GPU that the command line meant: one of those to choose from, also where no profile describes it."""

    plan: Plan
    memory: Memory
    fit: Fit
    speed: Speed | None
    spilled_bytes: int


def show(model: ModelProfile, gpu: Gpu, plan: Plan, *, home: Gpu | None = None) -> View:
    """A plan's memory and speed on a GPU.

    Raises:
        PlanError: what the closed form cannot honour; it names the field.
    """
    memory = estimate(plan, model.architecture, gpu)
    spilled = evaluate(plan, model.architecture, gpu).spilled_bytes if memory.host_bytes else 0
    return View(
        model=model,
        gpu=gpu,
        home=home or gpu,
        plan=plan,
        memory=memory,
        fit=check_fit(memory.reserved_bytes, gpu),
        speed=estimate_speed(plan, model.architecture, gpu, spilled_bytes=spilled),
        spilled_bytes=spilled,
    )


def warm_up(view: View) -> None:
    """Reads every profile that a key may need, so that none of them has to."""
    for knob in KNOBS:
        offers(view, knob)


def recommend_settings(view: View) -> View:
    """The method's fastest settings that fit, at the same sequence length, effective batch and adapters."""
    plan = replace(view.plan, optimizer_in_backward=False)
    knobs = search(plan, view.model.architecture, view.gpu, attentions=usable_attentions(view.gpu))
    return show(view.model, view.gpu, knobs.plan, home=view.home)


def turn(view: View, knob: Knob, by: int) -> View:
    """The view with one setting's next value, or the one before; round at either end.

    Raises:
        PlanError: the combination is refused; it names the field.
    """
    values = offers(view, knob)
    if len(values) < 2:
        raise PlanError(_field(knob), _ONLY.get(knob.name, "there is nothing else to choose"))
    position = (values.index(_current(view, knob)) + by) % len(values)
    value = values[position]
    if knob.name in _CHANGES:
        return _CHANGES[knob.name](view, value)
    return _shown_with(view, replace(view.plan, **{knob.name: value}))


_ONLY = {"rank": "full fine-tuning has no adapters"}


def offers(view: View, knob: Knob) -> tuple[Any, ...]:
    """A setting's values in their order; none where the plan has no such setting."""
    plan = view.plan
    if knob.name == "model":
        return _models(view.model.name)
    if knob.name == "gpu":
        return _gpus(_profile_name(view.home))
    if knob.name == "seq_len":
        return _around(_LENGTHS, plan.seq_len, view.model.architecture.max_positions)
    if knob.name == "rank":
        return _around(_RANKS, plan.lora.rank) if plan.lora else ()
    return _fixed(plan, knob.name)


def _fixed(plan: Plan, name: str) -> tuple[Any, ...]:
    if name in ("micro_batch", "gradient_accumulation"):
        return _around(_COUNTS, getattr(plan, name))
    closed: Mapping[str, tuple[Any, ...]] = {
        "method": METHODS,
        "optimizer": get_args(Optimizer),
        "loss": get_args(Loss),
        "attention": get_args(Attention),
    }
    return closed.get(name, (False, True))


def _around(usual: tuple[int, ...], value: int, largest: int | None = None) -> tuple[int, ...]:
    """The usual values up to the largest, and the one that is there."""
    return tuple(sorted({value, *(number for number in usual if largest is None or number <= largest)}))


_model = cache(load_model)


@cache
def _gpu(name: str) -> Gpu:
    return what_if(load_gpu(name))


@cache
def _models(own: str) -> tuple[str, ...]:
    """Models that the closed form knows, in the order of their size, and the one that is there."""
    known = {own}
    sizes = {own: _model(own).architecture.parameters}
    for name in model_names():
        try:
            profile = _model(name)
        except AdvisorError:
            continue
        if profile.architecture.family.closed_form:
            known.add(name)
            sizes[name] = profile.architecture.parameters
    return tuple(sorted(known, key=lambda name: (sizes[name], name)))


@cache
def _gpus(home: str | None) -> tuple[str | None, ...]:
    """Profiles in the order of their memory; None is a GPU that no profile describes."""
    names = sorted(gpu_names(), key=lambda name: (_gpu(name).total_bytes, name))
    return tuple(names) if home is not None else (None, *names)


def _current(view: View, knob: Knob) -> Any:
    if knob.name == "model":
        return view.model.name
    if knob.name == "gpu":
        return _profile_name(view.gpu)
    if knob.name == "rank":
        return view.plan.lora and view.plan.lora.rank
    return getattr(view.plan, knob.name)


def _profile_name(gpu: Gpu) -> str | None:
    return gpu.profile.name if gpu.profile else None


def _field(knob: Knob) -> str:
    return "lora.rank" if knob.name == "rank" else knob.name


def _change_rank(view: View, value: Any) -> View:
    assert view.plan.lora is not None
    return _shown_with(view, replace(view.plan, lora=replace(view.plan.lora, rank=value)))


def _change_packing(view: View, value: Any) -> View:
    """Packed rows are full; without packing the worst batch is padded."""
    return _shown_with(view, replace(view.plan, packing=value, padding="none" if value else "longest"))


def _change_method(view: View, value: Any) -> View:
    return _shown_with(view, _settled(view.plan, value, view.plan.model, view.gpu))


def _change_model(view: View, value: Any) -> View:
    model = _model(value)
    plan = replace(view.plan, model=value, seq_len=min(view.plan.seq_len, model.architecture.max_positions))
    return show(model, view.gpu, plan, home=view.home)


def _change_gpu(view: View, value: Any) -> View:
    """Number formats and attention follow the GPU: it may have no bfloat16, and flash-attn 2 needs a newer one."""
    gpu = view.home if value == _profile_name(view.home) else _gpu(value)
    plan = replace(view.plan, gpu=_profile_name(gpu))
    if gpu.dtype != view.gpu.dtype:
        plan = _settled(plan, plan.method, plan.model, gpu)
    try:
        return show(view.model, gpu, plan, home=view.home)
    except PlanError as error:
        if error.field != "attention":
            raise
        return show(view.model, gpu, replace(plan, attention="sdpa"), home=view.home)


def _settled(plan: Plan, method: Any, model: str, gpu: Gpu) -> Plan:
    """A plan's settings over a method's own number formats and adapters on a GPU."""
    usual = default_plan(method, model=model, dtype=gpu.dtype)
    return replace(
        plan,
        method=method,
        dtype=usual.dtype,
        autocast=usual.autocast,
        quantization=plan.quantization or usual.quantization if method == "qlora" else None,
        upcast_frozen=plan.upcast_frozen and method == "qlora",
        lora=(plan.lora or usual.lora) if method != "full" else None,
        optimizer_in_backward=plan.optimizer_in_backward and method == "full" and usual.autocast != "float16",
    )


def _shown_with(view: View, plan: Plan) -> View:
    return show(view.model, view.gpu, plan, home=view.home)


_CHANGES: dict[str, Callable[[View, Any], View]] = {
    "model": _change_model,
    "gpu": _change_gpu,
    "method": _change_method,
    "rank": _change_rank,
    "packing": _change_packing,
}


def shown_value(view: View, knob: Knob) -> str:
    """A setting as the screen shows it."""
    value = _current(view, knob)
    if knob.name == "gpu":
        return value or view.gpu.name
    if knob.name == "method":
        return METHOD_LABELS[view.plan.method]
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:,}" if isinstance(value, int) else str(value)
