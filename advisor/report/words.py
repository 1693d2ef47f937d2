"""What every report says in the same words, without a word of how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from advisor.units import duration, gib, short_count, size

if TYPE_CHECKING:  # a report loads no more of the rest than its own values did
    from advisor.advise import Advice, MethodAdvice, Request
    from advisor.hardware import Gpu, GpuProcess
    from advisor.memory.regime import Regime
    from advisor.plan import Dtype, Method, Plan
    from advisor.traced import Survival, TracedPlan

METHOD_NAMES: dict[Method, str] = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
_SHORT_DTYPES: dict[Dtype, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

_SHOWN_PROCESSES = 3

TRAINED: dict[Method, str] = {"full": "every weight", "lora": "low-rank matrices", "qlora": "low-rank, 4-bit base"}
QUALITY: dict[Method, str] = {"full": "best", "lora": "nearly the same", "qlora": "may lose a little"}
EASE: dict[Method, str] = {"full": "hard: needs resources", "lora": "easy", "qlora": "very easy"}
SHIPPED: dict[Method, str] = {"full": "whole model", "lora": "adapter", "qlora": "adapter"}

_NO_BREAK = "\N{NO-BREAK SPACE}"


def clean(text: str) -> str:
    """Text from files and drivers without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == _NO_BREAK else "\N{REPLACEMENT CHARACTER}" for c in text)


def regime_words(regime: Regime) -> str:
    """How the allocator is run: `"10.96 GiB in expandable segments"`."""
    if regime.expandable:
        return "in expandable segments"
    return "with the cache emptied" if regime.empties_cache else "by default"


def ended(text: str) -> str:
    """`"it fits"` → `"it fits."`."""
    return text if text.endswith((".", "!", "?")) else text + "."


def capital(text: str) -> str:
    """`"full"` → `"Full"`; the rest stays as it is: `"LoRA"`."""
    return text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    """`"it fits"` → `"It fits."`."""
    return ended(capital(text))


def origin_of(gpu: Gpu) -> str:
    """Whether a GPU is here or imagined."""
    if not gpu.detected:
        return "what if"
    origin = "detected" if gpu.index is None else f"detected as GPU {gpu.index}"
    return f"{origin}, driver {gpu.driver}" if gpu.driver else origin


def memory_facts(gpu: Gpu) -> list[str]:
    """How much memory can be had, and who has the rest."""
    facts = [f"{gib(gpu.total_bytes)} usable"]
    if gpu.free_bytes is None:
        facts.append("how much is free is not known" if gpu.detected else "all of it free")
    else:
        facts.append(f"{gib(gpu.free_bytes)} free")
        shown = [_process(process) for process in gpu.processes[:_SHOWN_PROCESSES]]
        hidden = len(gpu.processes) - len(shown)
        shown += [f"{hidden} more"] if hidden else []
        facts.append(f"{gib(gpu.others_bytes)} held by others{': ' if shown else ''}{', '.join(shown)}")
    if gpu.unified:
        facts.append("shared with the host")
    return facts


def _process(process: GpuProcess) -> str:
    held = f" {size(process.used_bytes)}" if process.used_bytes is not None else ""
    return f"{clean(process.name or 'process')} ({process.pid}){held}"


def compute_facts(gpu: Gpu) -> list[str]:
    """What a GPU computes in, and what a process costs there."""
    facts = ["compute capability {}.{}".format(*gpu.capability)] if gpu.capability else [f"backend {gpu.backend}"]
    facts.append({True: "bfloat16", False: "no bfloat16", None: "bfloat16 not known"}[gpu.bfloat16])
    facts.append(f"context {gib(gpu.context_bytes)} ({gpu.context_provenance})")
    if gpu.display_attached:
        facts.append("a display is attached")
    return facts


def request_facts(request: Request) -> tuple[str, ...]:
    """What was asked for."""
    asked = (f"sequences of {request.seq_len:,} tokens", f"effective batch {request.effective_batch:,}")
    return (*asked, f"{short_count(request.tokens)} tokens in all") if request.tokens else asked


def precision(plan: Plan) -> str:
    """What numbers are stored and computed in: `"nf4, autocast fp16"`."""
    stored = plan.quantization.type if plan.quantization else _SHORT_DTYPES[plan.dtype]
    if plan.autocast != "none":
        return f"{stored}, autocast {_SHORT_DTYPES[plan.autocast]}"
    return f"{stored}, computed in {_SHORT_DTYPES[plan.dtype]}" if plan.quantization else stored


def settings(plan: Plan) -> list[str]:
    """A plan's settings as the search varies them, a phrase each."""
    said = [
        f"{plan.micro_batch:,} × {plan.gradient_accumulation:,} sequences",
        "checkpointing" if plan.gradient_checkpointing else "no checkpointing",
        plan.optimizer,
        f"{plan.loss} loss",
        precision(plan),
    ]
    more = {
        plan.attention: plan.attention != "sdpa",
        "packed rows": plan.packing,
        "optimizer in backward": plan.optimizer_in_backward,
    }
    return [*said, *(phrase for phrase, on in more.items() if on)]


def speed_words(part: MethodAdvice) -> str:
    """How fast a plan is, a line each."""
    if not part.fits:
        return "–"
    if part.speed is None:
        return "not known"
    said = [f"{duration(part.speed.step_seconds)} a step", f"{part.speed.tokens_per_second:,.0f} tokens/s"]
    return "\n".join(said if part.run_seconds is None else [*said, f"{duration(part.run_seconds)} for the run"])


def basis_of(advice: Advice) -> str:
    """What the numbers rest on."""
    speeds = [part.speed for part in advice.methods if part.speed]
    basis = next((speed.basis for speed in speeds if not speed.measured), None)
    measured = next((speed.basis for speed in speeds if speed.measured), None)
    said = _tiers(advice.methods)
    said += f" Measured: speed, by {measured}." if measured else " Nothing was measured on this GPU."
    rest = "Other speeds assume" if measured else "Speed assumes"
    return f"{said} {rest} {basis}." if basis else said


def _tiers(parts: Sequence[MethodAdvice]) -> str:
    """Which number is of which tier."""
    traced = [METHOD_NAMES[part.method] for part in parts if part.tier == "trace"]
    if not traced:
        return "Tier: estimate, in closed form."
    said = "the installed code run on tensors without storage"
    rest = [METHOD_NAMES[part.method] for part in parts if part.tier != "trace"]
    return (
        f"Tier: trace ({said}) for {' and '.join(traced)}; estimate for {' and '.join(rest)}."
        if rest
        else f"Tier: trace ({said})."
    )


def closed_form_words(traced: TracedPlan) -> str:
    """The closed form's peak, and how far it is from the trace's."""
    if traced.closed_form is None:
        return f"nothing: {traced.unknown_to_closed_form}"
    said, difference = traced.closed_form.allocated_bytes, traced.closed_form_error_bytes
    sign = "−" if difference < 0 else "+"
    share = abs(difference) / traced.memory.allocated_bytes
    return f"{gib(said)}: {sign}{size(abs(difference))} ({sign}{share:.2%})"


def replayed_words(survival: Survival) -> str:
    """What happens where the GPU has no more than this left for tensors."""
    if survival.failed_at is not None:
        asked, left = size(survival.requested_bytes), size(survival.left_bytes)
        return f"out of memory at {survival.failed_at}: {asked} asked for, {left} left."
    if survival.released_bytes:
        return f"every request is met, after {size(survival.released_bytes)} of cached segments is released."
    return "every request is met."


def short_operation(operation: str) -> str:
    """`"aten._log_softmax.default"` → `"_log_softmax"`."""
    before, aten, after = operation.partition("aten.")
    return before + after.partition(".")[0] if aten else operation
