"""The trace against GPUs that somebody else measured. Nothing is fitted to these rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.loss import loss_utils

from advisor.architecture import architecture_from_config
from advisor.hardware import what_if
from advisor.memory.estimate import estimate
from advisor.memory.kernels import Gpu
from advisor.memory.regime import TORCH_DEFAULTS
from advisor.memory.trace import Trace, trace
from advisor.plan import plan_from_fields
from advisor.profiles import load_gpu
from advisor.training import build
from advisor.units import GIB, MIB

_SETS = json.loads((Path(__file__).parents[2] / "profiles/measurements/external.json").read_text())["sets"]
_RTX_4080: list[dict[str, Any]] = _SETS[0]["rows"]
_A100: list[dict[str, Any]] = _SETS[1]["rows"]

ATTENTION_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
A100_CONTEXT_BYTES = 500 * MIB
"""Roughly what nvidia-smi shows beyond torch's own; the row's tolerance is 3.8 GiB."""


def fields_rtx_4080(row: dict[str, Any]) -> dict[str, Any]:
    fields = {
        "model": row["name"],
        "lora": {"rank": 16, "target_modules": ATTENTION_PROJECTIONS},
        "optimizer": "paged_adamw_8bit",
        "hold_outputs": True,
        **{name: row[name] for name in ("method", "seq_len", "micro_batch", "gradient_checkpointing")},
    }
    if row["method"] == "qlora":
        fields |= {"quantization": {}, "upcast_frozen": True}
    return fields


def traced_rtx_4080(row: dict[str, Any]) -> Trace:
    gpu = Gpu(capability=(8, 9), multiprocessors=76, has_flash=False, total_bytes=16 * GIB)
    return trace(plan_from_fields(fields_rtx_4080(row)), row["config"], gpu=gpu)


@pytest.mark.parametrize("row", _RTX_4080, ids=lambda row: row["name"])
def test_rtx_4080(row: dict[str, Any]) -> None:
    found = traced_rtx_4080(row)
    # Published to 0.0001 GiB; what is left is half a MiB, and one segment of 2 MiB.
    assert found.allocated_bytes == pytest.approx(row["allocated_gib"] * GIB, rel=0.0003)
    assert found.reserved_bytes == pytest.approx(row["reserved_gib"] * GIB, rel=0.0003)
    assert found.replayed.failed_request_bytes is None


@pytest.mark.parametrize("row", _RTX_4080, ids=lambda row: row["name"])
def test_the_closed_form_of_an_rtx_4080(row: dict[str, Any]) -> None:
    arch = architecture_from_config(row["config"], origin=row["name"])
    found = estimate(plan_from_fields(fields_rtx_4080(row)), arch, what_if(load_gpu("rtx-4080")))
    # What blocks below 10 MiB are larger than their tensors depends on the order of all requests.
    assert found.allocated_bytes == pytest.approx(row["allocated_gib"] * GIB, rel=0.003)


def traced_a100(row: dict[str, Any]) -> Trace:
    fields = {
        "model": row["name"],
        "method": row["method"],
        "seq_len": row["seq_len"],
        "micro_batch": row["micro_batch"],
        "attention": "flash_attention_2",
        "optimizer": "adamw_torch",
    }
    if row["method"] == "qlora":
        lora = {"rank": 16, "dropout": row["lora"]["dropout"], "target_modules": row["lora"]["target_modules"]}
        fields |= {"autocast": "bfloat16", "quantization": {}, "lora": lora}
    gpu = Gpu(capability=(8, 0), multiprocessors=108, total_bytes=79 * GIB)
    return trace(plan_from_fields(fields), row["config"], gpu=gpu, regime=TORCH_DEFAULTS)


def loss_of_transformers_4_48(
    logits: Any, labels: Any, vocab_size: int, num_items_in_batch: Any = None, ignore_index: int = -100, **_: Any
) -> Any:
    """All logits in fp32, then a shifted copy. Source: transformers 4.48.1 loss/loss_utils.py (ForCausalLMLoss)."""
    shifted = logits.float()[..., :-1, :].contiguous().view(-1, vocab_size)
    targets = labels[..., 1:].contiguous().view(-1)
    if num_items_in_batch is None:
        return torch.nn.functional.cross_entropy(shifted, targets, ignore_index=ignore_index)
    total = torch.nn.functional.cross_entropy(shifted, targets, ignore_index=ignore_index, reduction="sum")
    return total / num_items_in_batch


def reentrant(model: Any) -> None:
    """Trainer's default of that version."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})


@pytest.fixture
def as_ibm_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the row says of its run and the installed versions do otherwise: the loss, and reentrant checkpointing."""
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", loss_of_transformers_4_48)
    monkeypatch.setattr(build, "enable_checkpointing", reentrant)


@pytest.mark.usefixtures("as_ibm_ran")
@pytest.mark.parametrize(
    ("row", "at", "rel"),
    [(_A100[0], "optimizer step", 0.001), (_A100[1], "backward of layer", 0.005)],
    ids=["full", "qlora of 70 billion"],
)
def test_a100(row: dict[str, Any], at: str, rel: float) -> None:
    result = traced_a100(row)
    assert result.at.startswith(at)
    assert result.default.allocated_bytes == pytest.approx(row["allocated_bytes"], rel=rel)
    whole = result.default.reserved_bytes + A100_CONTEXT_BYTES
    assert whole == pytest.approx(row["nvidia_smi_mib"] * MIB, rel=0.05)
