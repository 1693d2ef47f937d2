"""What an answer is about, in a few lines each: the GPU, the model, the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from advisor.report.terminal.text import clean, joined, print_paragraph
from advisor.units import gib, short_count, size

if TYPE_CHECKING:  # a screen loads no more of the rest than its own values did
    from advisor.hardware import Gpu, GpuProcess
    from advisor.plan import Dtype, Method, Plan
    from advisor.profiles import ModelProfile

METHOD_NAMES: dict[Method, str] = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}

_SHORT_DTYPES: dict[Dtype, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}

_SHOWN_PROCESSES = 3


def print_gpu(gpu: Gpu, console: Console) -> None:
    """What the GPU is, how much of it can be had, what it computes in."""
    if gpu.detected:
        origin = "detected" if gpu.index is None else f"detected as GPU {gpu.index}"
        origin += f", driver {gpu.driver}" if gpu.driver else ""
    else:
        origin = "what if"
    text = joined(f"({origin})", *_memory_facts(gpu))
    print_paragraph(console, text, label=f"{clean(gpu.name)} ", indent="  ")
    print_paragraph(console, joined(*_compute_facts(gpu)), label="  ", indent="  ")


def _memory_facts(gpu: Gpu) -> list[str]:
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


def _compute_facts(gpu: Gpu) -> list[str]:
    facts = ["compute capability {}.{}".format(*gpu.capability)] if gpu.capability else [f"backend {gpu.backend}"]
    facts.append({True: "bfloat16", False: "no bfloat16", None: "bfloat16 not known"}[gpu.bfloat16])
    facts.append(f"context {gib(gpu.context_bytes)} ({gpu.context_provenance})")
    if gpu.display_attached:
        facts.append("a display is attached")
    return facts


def print_model(model: ModelProfile, console: Console, *facts: str) -> None:
    """The model, and what is asked of it."""
    text = joined(f"{short_count(model.architecture.parameters)} parameters", *facts)
    print_paragraph(console, text, label=f"{clean(model.label)} · ", indent="  ")


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
    return said if plan.attention == "sdpa" else [*said, plan.attention]


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
    said += ["frozen tensors upcast to fp32"] if plan.upcast_frozen else []
    said += ["outputs held through backward"] if plan.hold_outputs else []
    print_paragraph(console, joined(*said), label=f"{METHOD_NAMES[plan.method]} · ", indent="  ")
