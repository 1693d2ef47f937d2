"""The README.md beside a trained adapter or model: what the hub reads in its front matter, then facts for a person."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from advisor.plan import Plan
from advisor.units import count, duration, size

_NAMES = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What a training knows about itself when it ends; None is not known or not measured."""

    base_model: str
    """The hub id or the folder that was trained from, as it was given."""

    data: str
    """What was trained on, as it was given; the card names it without its folder."""

    device: str
    """What trained it, as a person calls it: "NVIDIA T4", "CPU"."""

    steps: int
    """Optimizer steps."""

    first_loss: float | None = None
    final_loss: float | None = None
    evaluation_loss: float | None = None
    """On the rows that were held out."""

    predicted_allocated_bytes: int | None = None
    predicted_reserved_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    """Measured; None on the CPU, which counts nothing."""

    peak_reserved_bytes: int | None = None
    seconds: float | None = None
    tokens: int | None = None
    """Tokens that were trained on."""

    versions: Mapping[str, str]
    """Package → version."""


def render_card(plan: Plan, card: CardFacts, *, folder: str, weights: str) -> str:
    """The whole README.md.

    Args:
        plan: what was trained, and how.
        card: how it went.
        folder: the folder's own name, for the lines that load it.
        weights: one sentence about what is in the files.
    """
    title = f"{_NAMES[plan.method]} of {model_name(card.base_model)} on {data_name(card.data)}"
    return "\n".join(
        [
            *_front_matter(plan, card),
            "",
            f"# {title}",
            "",
            f"Trained with phi3-advise. {weights}",
            "",
            "## Load it",
            "",
            "```python",
            *_loading(plan, card, folder),
            "```",
            "",
            "## How it went",
            "",
            *_table(_results(card)),
            "",
            "## The plan",
            "",
            "`phi3-advise train --plan plan.toml --data DATA` runs it again as it stands.",
            "",
            "```toml",
            *_plan_lines(plan),
            "```",
            "",
            "## Versions",
            "",
            *_table([(name, version) for name, version in sorted(card.versions.items())]),
            "",
        ]
    )


def render_merged_card(base_model: str, *, folder: str) -> str:
    """The README.md of an adapter that was merged into its base model."""
    base, licence = hub_id_of(base_model), license_of(base_model)
    here = json.dumps(folder, ensure_ascii=False)
    return "\n".join(
        [
            "---",
            *([f"base_model: {json.dumps(base)}", "base_model_relation: finetune"] if base else []),
            "library_name: transformers",
            *([f"license: {licence}"] if licence else []),
            "pipeline_tag: text-generation",
            "tags:",
            "- phi3-advise",
            "- lora",
            "- merged",
            "---",
            "",
            f"# A LoRA merged into {model_name(base_model)}",
            "",
            "Merged with phi3-advise: the adapter's update is part of the weights, and PEFT is not needed.",
            "",
            "```python",
            *_IMPORTS,
            "",
            f'model = AutoModelForCausalLM.from_pretrained({here}, dtype="auto")',
            *_generating(here),
            "```",
            "",
        ]
    )


def hub_id_of(base_model: str, plan_model: str = "") -> str | None:
    """The base model's name on the hub: what was given if it is one, or else what the plan's profile says."""
    if _HUB_ID.fullmatch(base_model) and not os.path.exists(base_model):
        return base_model
    from advisor.errors import AdvisorError
    from advisor.profiles import find_model, model_names

    try:
        return find_model(plan_model).hub_id if plan_model in model_names() else None
    except AdvisorError:
        return None


def data_name(data: str) -> str:
    """A hub id as it is; of a file or a folder no more than its own name."""
    if _HUB_ID.fullmatch(data) and not os.path.exists(data):
        return data
    return os.path.splitext(os.path.basename(os.path.normpath(data)))[0]


def model_name(base_model: str) -> str:
    """The last part of a hub id or of a path."""
    return os.path.basename(os.path.normpath(base_model))


def license_of(base_model: str) -> str | None:
    """The licence in the base model's own card, where that is in its folder or in the hub's local cache."""
    path: object = os.path.join(base_model, "README.md")
    if not os.path.isdir(base_model) and _HUB_ID.fullmatch(base_model):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(base_model, "README.md")
    try:
        with open(str(path), encoding="utf-8") as file:
            head = file.read(64 * 1024)
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", head, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.-]+)[\"']?\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _front_matter(plan: Plan, card: CardFacts) -> list[str]:
    """YAML; JSON's strings are YAML's too. Source: huggingface.co/docs/hub/model-cards (metadata)."""
    base = hub_id_of(card.base_model, plan.model)
    licence = license_of(card.base_model)
    adapter = plan.method != "full"
    lines = ["---"]
    if base is not None:
        relation = "adapter" if adapter else "finetune"
        lines += [f"base_model: {json.dumps(base)}", f"base_model_relation: {relation}"]
    lines.append(f"library_name: {'peft' if adapter else 'transformers'}")
    if licence is not None:
        lines.append(f"license: {licence}")
    lines += ["pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in ("phi3-advise", "sft", "full" if plan.method == "full" else "lora")]
    lines += ["- qlora"] if plan.method == "qlora" else []
    lines += ["datasets:", f"- {json.dumps(data_name(card.data), ensure_ascii=False)}", "---"]
    return lines


def _loading(plan: Plan, card: CardFacts, folder: str) -> list[str]:
    """The base is loaded from where it was given; a trained model from its own folder."""
    here = json.dumps(folder, ensure_ascii=False)
    lines = [*_IMPORTS, ""]
    if plan.method == "full":
        lines.append(f'model = AutoModelForCausalLM.from_pretrained({here}, dtype="auto")')
    else:
        base = json.dumps(card.base_model, ensure_ascii=False)
        lines = ["from peft import PeftModel", *lines]
        lines.append(f'base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")')
        lines.append(f"model = PeftModel.from_pretrained(base, {here})")
    return [*lines, *_generating(here)]


_IMPORTS = ("from transformers import AutoModelForCausalLM, AutoTokenizer",)


def _generating(here: str) -> list[str]:
    return [
        f"tokenizer = AutoTokenizer.from_pretrained({here})",
        'messages = [{"role": "user", "content": "Hello"}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))",
    ]


def _results(card: CardFacts) -> list[tuple[str, str]]:
    """What was predicted and measured, row by row; what is not known is left out, and a peak is never invented."""
    on_cpu = card.device.lower() == "cpu"
    unmeasured = "not measured on CPU" if on_cpu else "not measured"
    rows = [("device", card.device), ("optimizer steps", count(card.steps))]
    losses = (("first", card.first_loss), ("final", card.final_loss), ("evaluation", card.evaluation_loss))
    rows += [(f"{name} loss", f"{loss:.4f}") for name, loss in losses if loss is not None]
    for name, predicted, peak in (
        ("allocated", card.predicted_allocated_bytes, card.peak_allocated_bytes),
        ("reserved", card.predicted_reserved_bytes, card.peak_reserved_bytes),
    ):
        if predicted is not None:
            rows.append((f"peak {name}, predicted", size(predicted)))
        rows.append((f"peak {name}, measured", size(peak) if peak is not None else unmeasured))
    if card.seconds is not None:
        rows.append(("time", duration(card.seconds)))
    if card.tokens is not None:
        rows.append(("tokens", count(card.tokens)))
    return rows


def _table(rows: list[tuple[str, str]]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]


def _plan_lines(plan: Plan) -> list[str]:
    from advisor.profiles import plan_to_toml

    return plan_to_toml(plan).splitlines()


__all__ = ["CardFacts", "data_name", "hub_id_of", "license_of", "model_name", "render_card", "render_merged_card"]
