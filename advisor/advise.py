"""The advice: each method's best plan on a GPU, one of them recommended, with reasons and the next command."""

from __future__ import annotations

from dataclasses import dataclass, replace
from shlex import quote
from typing import Literal

from advisor.cautions import collect_warnings
from advisor.commands import gpu_options, request_options, spell_command
from advisor.fit import Fit, explain_fit
from advisor.hardware import Gpu, Host, what_if
from advisor.in_backward import cost_of_stepping_in_backward
from advisor.memory.estimate import Memory, summarise
from advisor.plan import ITEMSIZE, METHOD_LABELS, METHODS, Attention, Method, Plan
from advisor.profiles import ModelProfile, default_plan, gpu_ladder
from advisor.request import DATA_FILE, DEFAULT_MODEL, PLAN_FILE, Prefer, Request
from advisor.search import any_fits, search, smallest_plan
from advisor.speed import Speed, estimate_speed
from advisor.units import gib

Tier = Literal["estimate", "trace", "probe"]


SHORTEST_SEQ_LEN = 256
"""No sequence shorter than this is offered as a way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodAdvice:
    """One method's best plan on a GPU, or its smallest where none fits."""

    method: Method
    plan: Plan
    memory: Memory
    fit: Fit
    reason: str
    speed: Speed | None
    spilled_bytes: int
    saved_bytes: int
    """Size of what training leaves: the model, or the adapter."""

    run_seconds: float | None
    """Time for the tokens that were asked about."""

    tier: Tier = "estimate"
    """Where the memory comes from."""

    @property
    def fits(self) -> bool:
        """Whether it fits."""
        return self.fit.fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The answer: three methods compared, one recommended."""

    model: ModelProfile
    gpu: Gpu
    request: Request
    methods: tuple[MethodAdvice, ...]
    recommended: Method | None
    reason: str
    unlock: str
    """What would make the next better method possible; empty where there is none."""

    next_command: str
    proof_command: str
    """What to run after that, for more than this tier knows; empty where nothing fits."""

    warnings: tuple[str, ...]

    def of(self, method: Method) -> MethodAdvice:
        """One method's part."""
        return next(part for part in self.methods if part.method == method)

    @property
    def choice(self) -> MethodAdvice:
        """The recommended method's part; else the one that was asked for, or the one that misses least."""
        if self.recommended is not None:
            return self.of(self.recommended)
        if self.request.method is not None:
            return self.of(self.request.method)
        return min(self.methods, key=lambda part: part.fit.missing_bytes)


def advise(model: ModelProfile, gpu: Gpu, request: Request | None = None, *, host: Host | None = None) -> Advice:
    """Which of full fine-tuning, LoRA and QLoRA fits a GPU, at what settings, and which to take.

    Args:
        model: what is fine-tuned.
        gpu: where.
        request: sequence length, effective batch, adapters, preference.
        host: this machine's RAM, for paged optimizer states; None for a GPU that is elsewhere.

    Raises:
        PlanError: a setting that no plan can have; it names the field.
    """
    request = request or Request()
    parts = tuple(_advise_method(method, model, gpu, request) for method in METHODS)
    return conclude(model, gpu, request, parts, warnings=collect_warnings(model, gpu, parts, request, host))


def conclude(
    model: ModelProfile,
    gpu: Gpu,
    request: Request,
    parts: tuple[MethodAdvice, ...],
    *,
    warnings: tuple[str, ...],
) -> Advice:
    """The answer that three methods' plans come to, whichever tier computed them."""
    recommended, reason = recommend(parts, request.prefer, request.method)
    advice = Advice(
        model=model,
        gpu=gpu,
        request=request,
        methods=parts,
        recommended=recommended,
        reason=reason,
        unlock="",
        next_command="",
        proof_command="",
        warnings=warnings,
    )
    return replace(
        advice,
        unlock=describe_unlock(advice),
        next_command=next_command(advice),
        proof_command=_proof_of(advice),
    )


def base_plan(method: Method, model: ModelProfile, gpu: Gpu, request: Request) -> Plan:
    """What all of a method's candidates have in common: the worst batch that the request can meet."""
    plan = default_plan(method, model=model.name, dtype=gpu.dtype)
    lora = plan.lora and replace(plan.lora, rank=request.lora_rank, target_modules=request.target_modules)
    return replace(
        plan,
        lora=lora,
        micro_batch=1,
        gradient_accumulation=request.effective_batch,
        seq_len=request.seq_len,
        packing=request.packing,
        padding="none" if request.packing else "longest",
        gpu=gpu.profile.name if gpu.profile else None,
    )


def usable_attentions(gpu: Gpu) -> tuple[Attention, ...]:
    """Attention implementations that can run: flash-attn 2 only where it is installed and the GPU is here."""
    if gpu.detected and gpu.backend == "cuda" and gpu.capability is not None and gpu.capability >= (8, 0):
        from importlib.util import find_spec

        if find_spec("flash_attn") is not None:
            return ("sdpa", "flash_attention_2")
    return ("sdpa",)


def _advise_method(method: Method, model: ModelProfile, gpu: Gpu, request: Request) -> MethodAdvice:
    base = base_plan(method, model, gpu, request)
    arch, attentions = model.architecture, usable_attentions(gpu)
    if request.prefer == "memory":
        found = smallest_plan(base, arch, gpu, attentions=attentions)
    else:
        found = search(base, arch, gpu, attentions=attentions)
    memory = summarise(found.ledger, found.plan, arch, gpu)
    return describe_method(found.plan, memory, found.fit, model, gpu, request, spilled_bytes=found.spilled_bytes)


def describe_method(
    plan: Plan,
    memory: Memory,
    fit: Fit,
    model: ModelProfile,
    gpu: Gpu,
    request: Request,
    *,
    spilled_bytes: int,
    tier: Tier = "estimate",
) -> MethodAdvice:
    """A plan whose memory is known, with its speed, and what it leaves behind."""
    speed = estimate_speed(plan, model.architecture, gpu, spilled_bytes=spilled_bytes)
    trained = memory.parameters.trainable
    return MethodAdvice(
        method=plan.method,
        plan=plan,
        memory=memory,
        fit=fit,
        reason=_method_reason(plan, fit, memory.at, request, spilled_bytes),
        speed=speed,
        spilled_bytes=spilled_bytes,
        saved_bytes=trained * (ITEMSIZE[plan.saved_dtype] if plan.method == "full" else 4),
        run_seconds=request.tokens / speed.tokens_per_second if request.tokens and speed else None,
        tier=tier,
    )


def _method_reason(plan: Plan, fit: Fit, moment: str, request: Request, spilled_bytes: int) -> str:
    reason = explain_fit(fit, moment)
    if plan.optimizer_in_backward:
        reason += f"; only by stepping in backward: {cost_of_stepping_in_backward(plan, request.effective_batch)}"
    if fit.fits and spilled_bytes:
        reason += f"; {gib(spilled_bytes)} of paged optimizer states live in host RAM"
    return reason


def recommend(
    parts: tuple[MethodAdvice, ...], prefer: Prefer, asked: Method | None = None
) -> tuple[Method | None, str]:
    """The method to take, and why in one sentence.

    Memory to spare: full fine-tuning. Limited memory: LoRA. Very limited: QLoRA. One that was asked for is taken if it
    fits, and no other.
    """
    fitting = {part.method: part for part in parts if part.fits}
    if asked is not None:
        if asked in fitting:
            return asked, f"{METHOD_LABELS[asked]} was asked for, and it fits"
        missing = next(part.fit.missing_bytes for part in parts if part.method == asked)
        return None, f"{METHOD_LABELS[asked]} was asked for, and it is {gib(missing)} short"
    if not fitting:
        least = min(parts, key=lambda part: part.fit.missing_bytes)
        return None, f"nothing fits: even {METHOD_LABELS[least.method]} is {gib(least.fit.missing_bytes)} short"
    if prefer == "memory":
        method = min(fitting, key=lambda name: fitting[name].fit.needed_bytes)
        return method, f"{METHOD_LABELS[method]} needs the least memory of what fits"
    if prefer == "speed" and all(part.speed for part in fitting.values()):
        method = max(fitting, key=lambda name: _tokens_per_second(fitting[name]))
        return method, f"{METHOD_LABELS[method]} is the fastest of what fits"
    full = fitting.get("full")
    if full and (prefer == "quality" or to_spare(full)):
        why = "there is memory to spare" if to_spare(full) else "quality comes first and it fits"
        return "full", f"{why}, and training every weight gives the best quality"
    if "lora" in fitting:
        short = "does not fit" if full is None else _why_not_spare(full)
        return "lora", f"full fine-tuning {short}; LoRA fits, and keeps nearly its quality"
    if "qlora" in fitting:
        return "qlora", "memory is very limited: only 4-bit weights leave room for training"
    return "full", "it is the only method that fits"


def to_spare(part: MethodAdvice) -> bool:
    """Whether a full fine-tune fits with room left, without states in host RAM and with its gradients kept."""
    frugal = part.plan.optimizer.startswith("paged") or part.plan.optimizer_in_backward
    return part.fits and not part.fit.near_edge and not frugal


def _why_not_spare(full: MethodAdvice) -> str:
    if full.plan.optimizer_in_backward:
        return "fits only by stepping in backward"
    if full.plan.optimizer.startswith("paged"):
        return "fits only with paged optimizer states, which fill the rest"
    return "fits but leaves no memory to spare"


def _tokens_per_second(part: MethodAdvice) -> float:
    return part.speed.tokens_per_second if part.speed else 0.0


def describe_unlock(advice: Advice) -> str:
    """What would unlock the next better method: a shorter sequence, or a larger GPU by name."""
    asked = advice.request.method
    order: tuple[Method, ...] = ("full", "lora", "qlora")
    position = order.index(advice.recommended) if advice.recommended else len(order)
    if position == 0 or (asked and advice.recommended):
        return ""
    part = advice.of(asked or order[position - 1])
    label = METHOD_LABELS[part.method]
    if part.fits:
        best = recommend(advice.methods, "quality")[0] or part.method
        cost = cost_of_stepping_in_backward(part.plan, advice.request.effective_batch)
        price = f", but {cost}" if part.plan.optimizer_in_backward and best == part.method else ""
        return f"{METHOD_LABELS[best]} fits as well: --prefer quality takes it{price}"
    base = base_plan(part.method, advice.model, advice.gpu, advice.request)
    shorter = longest_that_fits(base, advice.model, advice.gpu)
    ways = [f"sequences of {shorter:,} tokens (--seq-len {shorter})"] if shorter else []
    larger = smallest_gpu_for(part.method, advice)
    if larger:
        ways.append(f"a GPU like the {larger.name} ({gib(larger.total_bytes)})")
    if asked:
        ways += [f"{METHOD_LABELS[other.method]} (--method {other.method})" for other in advice.methods if other.fits]
    need = f"{label} is {gib(part.fit.missing_bytes)} short"
    return f"{need}; {' or '.join(ways)} would do" if ways else f"{need}; no single GPU that is known here is enough"


def longest_that_fits(base: Plan, model: ModelProfile, gpu: Gpu) -> int | None:
    """The longest sequence, in steps of 256, at which a method's smallest plan fits; None below 256."""
    low, high, found = 1, (base.seq_len - 1) // SHORTEST_SEQ_LEN, None
    while low <= high:
        middle = (low + high) // 2
        if any_fits(replace(base, seq_len=middle * SHORTEST_SEQ_LEN), model.architecture, gpu):
            found, low = middle * SHORTEST_SEQ_LEN, middle + 1
        else:
            high = middle - 1
    return found


def smallest_gpu_for(method: Method, advice: Advice) -> Gpu | None:
    """The first GPU of the ladder that is larger and on which a method's smallest plan fits."""
    for profile in gpu_ladder():
        if profile.usable_bytes <= advice.gpu.total_bytes:
            continue
        gpu = what_if(profile)
        base = base_plan(method, advice.model, gpu, advice.request)
        if any_fits(base, advice.model.architecture, gpu):
            return gpu
    return None


def next_command(advice: Advice) -> str:
    """What to run next: train where the GPU is here, else write the plan down; or ask again with what would fit."""
    request = advice.request
    if advice.recommended is not None:
        if advice.gpu.detected and advice.model.launchable:
            return (
                f"{spell_command(advice.model.name, advice.gpu, request_options(request))} --launch --data {DATA_FILE}"
            )
        return spell_command(advice.model.name, advice.gpu, request_options(request) | {"--save-plan": PLAN_FILE})
    if request.method is not None and any(part.fits for part in advice.methods):
        return spell_command(advice.model.name, advice.gpu, request_options(replace(request, method=None)))
    method = request.method or "qlora"
    shorter = longest_that_fits(base_plan(method, advice.model, advice.gpu, request), advice.model, advice.gpu)
    if shorter:
        return spell_command(advice.model.name, advice.gpu, request_options(request) | {"--seq-len": shorter})
    model = f" --model {quote(advice.model.name)}" if advice.model.name != DEFAULT_MODEL else ""
    return f"phi3-advise gpus{model}"


def proof_command(path: str) -> str:
    """The command that proves a plan file's memory without a GPU."""
    return f"phi3-advise trace --plan {quote(path)}"


def train_command(path: str, advice: Advice) -> str:
    """The command that trains a plan file as it stands; empty for a model that cannot be launched."""
    if not advice.model.launchable:
        return ""
    device = "".join(f" {name} {value}" for name, value in gpu_options(advice.gpu).items() if name == "--device")
    return f"phi3-advise train --plan {quote(path)} --data {DATA_FILE}{device}"


def _proof_of(advice: Advice) -> str:
    """The same question with the memory proven, or the trace of the plan that the next command writes."""
    if advice.recommended is None:
        return ""
    if advice.gpu.detected and advice.model.launchable:
        return f"{spell_command(advice.model.name, advice.gpu, request_options(advice.request))} --trace"
    return proof_command(PLAN_FILE)


__all__ = [
    "DEFAULT_MODEL",
    "METHOD_LABELS",
    "Advice",
    "MethodAdvice",
    "Prefer",
    "Request",
    "Tier",
    "advise",
    "base_plan",
]
