"""The trace against GPUs that somebody else measured. Nothing is fitted to these rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from advisor.memory.kernels import Gpu
from advisor.memory.trace import Trace, trace
from advisor.plan import plan_from_fields
from advisor.units import GIB, MIB

_SETS = json.loads((Path(__file__).parents[2] / "profiles/measurements/external.json").read_text())["sets"]
_RTX_4080: list[dict[str, Any]] = _SETS[0]["rows"]
_A100: list[dict[str, Any]] = _SETS[1]["rows"]

ATTENTION_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
A100_CONTEXT_BYTES = 500 * MIB
"""Roughly what nvidia-smi shows beyond torch's own; the row's tolerance is 3.8 GiB."""


def traced_rtx_4080(row: dict[str, Any]) -> Trace:
    fields = {
        "model": row["name"],
        "lora": {"rank": 16, "target_modules": ATTENTION_PROJECTIONS},
        "optimizer": "paged_adamw_8bit",
        "hold_outputs": True,
        **{name: row[name] for name in ("method", "seq_len", "micro_batch", "gradient_checkpointing")},
    }
    if row["method"] == "qlora":
        fields |= {"quantization": {}, "upcast_frozen": True}
    gpu = Gpu(capability=(8, 9), multiprocessors=76, has_flash=False, total_bytes=16 * GIB)
    return trace(plan_from_fields(fields), row["config"], gpu=gpu, empties_cache=False)


@pytest.mark.parametrize("row", _RTX_4080, ids=lambda row: row["name"])
def test_rtx_4080(row: dict[str, Any]) -> None:
    found = traced_rtx_4080(row).default
    # The limits; the environment is only partly known.
    assert found.allocated_bytes == pytest.approx(row["allocated_gib"] * GIB, rel=0.007)
    assert found.reserved_bytes == pytest.approx(row["reserved_gib"] * GIB, rel=0.06)
    assert found.failed_request_bytes is None


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
    return trace(plan_from_fields(fields), row["config"], gpu=gpu, empties_cache=False)


def test_a100_full_peaks_in_the_optimizer_step() -> None:
    result = traced_a100(_A100[0])
    assert result.at == "optimizer step"
    assert result.default.allocated_bytes == pytest.approx(_A100[0]["allocated_bytes"], rel=0.001)


def test_a100_qlora_of_70_billion() -> None:
    result = traced_a100(_A100[1])
    assert result.at.startswith("backward of layer")
    assert result.default.allocated_bytes == pytest.approx(_A100[1]["allocated_bytes"], rel=0.005)
    whole = result.default.reserved_bytes + A100_CONTEXT_BYTES
    assert whole == pytest.approx(_A100[1]["nvidia_smi_mib"] * MIB, rel=0.05)
