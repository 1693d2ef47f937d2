"""What an answer is about, in a few lines each: the GPU, the model, the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from advisor.report.language import localise_label
from advisor.report.terminal.text import joined, print_paragraph
from advisor.report.words import METHOD_NAMES, clean, compute_facts, memory_facts, origin_of, precision
from advisor.units import short_count

if TYPE_CHECKING:  # a screen loads no more of the rest than its own values did
    from advisor.hardware import Gpu
    from advisor.plan import Plan
    from advisor.profiles import ModelProfile

_UNCOUNTED = "torch.compile, whose memory is in no estimate and no trace: only a probe sees it"


def print_gpu(gpu: Gpu, console: Console) -> None:
    """What the GPU is, how much of it can be had, what it computes in."""
    text = joined(*map(localise_label, (f"({origin_of(gpu)})", *memory_facts(gpu))))
    name = clean(localise_label(gpu.name))
    print_paragraph(console, text, label=f"{name} " if text.startswith("(") else name, indent="  ")
    print_paragraph(console, joined(*compute_facts(gpu)), label="  ", indent="  ")


def print_model(model: ModelProfile, console: Console, *facts: str) -> None:
    """The model, and what is asked of it."""
    text = joined(f"{short_count(model.architecture.parameters)} parameters", *facts)
    print_paragraph(console, text, label=f"{clean(model.label)} · ", indent="  ")


def print_plan(plan: Plan, console: Console) -> None:
    """All settings of one plan."""
    said = [
        f"micro-batch {plan.micro_batch:,} × accumulation {plan.gradient_accumulation:,}",
        f"sequences of {plan.seq_len:,} tokens",
        "padded" if plan.padding == "longest" else "every one full",
        "checkpointing" if plan.gradient_checkpointing else "no checkpointing",
        plan.optimizer,
        f"{plan.loss} loss",
        precision(plan),
        f"attention {plan.attention}",
    ]
    if plan.lora:
        targets = plan.lora.target_modules
        names = targets if isinstance(targets, str) else ", ".join(targets)
        said.append(f"rank {plan.lora.rank} on {names}")
        said += [f"dropout {plan.lora.dropout:g}"] if plan.lora.dropout else []
    more = {
        "packed rows": plan.packing,
        "optimizer in backward": plan.optimizer_in_backward,
        "frozen tensors upcast to fp32": plan.upcast_frozen,
        "outputs held through backward": plan.hold_outputs,
        _UNCOUNTED: plan.training.compile,
    }
    said += [phrase for phrase, on in more.items() if on]
    name = localise_label(METHOD_NAMES[plan.method])
    print_paragraph(console, joined(*map(localise_label, said)), label=f"{name} · ", indent="  ")
