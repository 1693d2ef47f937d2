"""The closed form: against recorded traces, against published peaks, and what must grow or shrink."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.architecture import Architecture, architecture_from_config
from advisor.errors import PlanError
from advisor.hardware import Gpu, what_if
from advisor.memory import terms
from advisor.memory.estimate import WORKSPACE_BYTES, Memory, estimate, simulate
from advisor.memory.ledger import COMPONENTS, Ledger
from advisor.memory.shapes import layer_shapes
from advisor.memory.step import run_step
from advisor.plan import Method, Plan, plan_from_fields
from advisor.profiles import default_plan, load_gpu, load_model
from advisor.units import GIB, MIB

TRACED = json.loads((Path(__file__).parent / "traced.json").read_text())
A100 = what_if(load_gpu("a100-80gb"))
T4 = what_if(load_gpu("t4"))
MINI = load_model("phi-3.5-mini").architecture
"""Phi-3-mini's numbers, without a window below 4,096 tokens."""

NOTEBOOK_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MOMENTS = {
    "loading",
    "forward",
    "logits",
    "loss",
    "loss backward",
    "head backward",
    "backward of the last layer: MLP",
    "backward of the last layer: attention",
    "backward of the first layer: MLP",
    "backward of the first layer: attention",
    "embedding backward",
    "optimizer step",
}


def plan_of(method: Method, **fields: Any) -> Plan:
    fields = {
        "autocast": "none",
        "micro_batch": 2,
        "seq_len": 2048,
        "gradient_accumulation": 1,
        "padding": "none",
        "attention": "sdpa",
        "optimizer": "adamw_torch_fused",
        "gradient_checkpointing": True,
        "loss": "standard",
        **fields,
    }
    return plan_from_fields(fields, default_plan(method, model="phi-3.5-mini"))


def peak_of(method: Method, gpu: Gpu = A100, arch: Architecture = MINI, **fields: Any) -> Memory:
    return estimate(plan_of(method, **fields), arch, gpu)


def named(row: dict[str, Any]) -> str:
    plan = row["plan"]
    return (
        f"{row['architecture']}-{row['layers']}-{plan['method']}-{plan['dtype']}-{plan['autocast']}-{plan['attention']}"
    )


@pytest.mark.parametrize("row", TRACED["rows"], ids=named)
def test_the_peak_is_the_traced_one(row: dict[str, Any]) -> None:
    """Within 0.1 %, since blocks of a few KiB (reductions, mask bookkeeping) are left out."""
    config = {**TRACED["architectures"][row["architecture"]], "num_hidden_layers": row["layers"]}
    arch = architecture_from_config(config, origin="traced.json")
    plan = plan_from_fields(row["plan"])
    shapes = layer_shapes(plan, arch, capability=tuple(row["capability"]), backend="cuda")
    ledger = Ledger()
    run_step(ledger, plan, arch, shapes, workspace_bytes=WORKSPACE_BYTES)
    assert abs(ledger.peak_bytes / row["step_bytes"] - 1) <= 0.001


@pytest.mark.parametrize(
    ("method", "fields", "gib"),
    [
        ("full", {"hold_outputs": True}, 29.13),
        ("full", {"hold_outputs": False}, 28.88),
        ("lora", {"hold_outputs": True}, 9.92),
        ("lora", {"hold_outputs": False}, 9.68),
        ("qlora", {"hold_outputs": True}, 4.91),
        ("qlora", {"hold_outputs": True, "upcast_frozen": True}, 6.28),
        ("qlora", {"hold_outputs": False, "upcast_frozen": True}, 5.79),
    ],
)
def test_the_reference_peaks_hold(method: Method, fields: dict[str, Any], gib: float) -> None:
    """They are given to 0.01 GiB; the embedding's fp32 rows, 48 MiB, are not in those of full fine-tuning."""
    assert peak_of(method, **fields).allocated_bytes / GIB == pytest.approx(gib, rel=0.003)


@pytest.mark.parametrize(
    ("targets", "trainable"), [("all-linear", 25_165_824), (NOTEBOOK_TARGETS, 8_912_896)], ids=["all", "notebooks"]
)
def test_lora_on_phi_3_mini_trains_what_peft_prints(targets: str | tuple[str, ...], trainable: int) -> None:
    memory = peak_of("lora", lora={"rank": 16, "target_modules": targets})
    assert memory.parameters.trainable == trainable
    assert memory.parameters.total == 3_821_079_552


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"micro_batch": 1}, {"micro_batch": 2}),
        ({"seq_len": 1024}, {"seq_len": 1536}),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"attention": "sdpa"}, {"attention": "eager", "gradient_checkpointing": False}),
        ({"loss": "chunked"}, {"loss": "standard"}),
        ({"hold_outputs": False}, {"hold_outputs": True}),
        ({"optimizer": "paged_adamw_8bit"}, {"optimizer": "adamw_torch"}),
    ],
    ids=lambda fields: next(iter(fields)) if len(fields) == 1 else "eager",
)
def test_what_takes_more_is_estimated_to_take_more(method: Method, less: dict[str, Any], more: dict[str, Any]) -> None:
    assert peak_of(method, **less).allocated_bytes <= peak_of(method, **more).allocated_bytes


def test_grouped_heads_without_flash_attention_keep_all_scores() -> None:
    medium = load_model("phi-3-medium-4k").architecture
    fields: dict[str, Any] = {"dtype": "float16", "micro_batch": 1, "seq_len": 1024, "gradient_checkpointing": False}
    old, new = (peak_of("lora", gpu, medium, **fields).allocated_bytes for gpu in (T4, A100))
    scores = medium.heads * 1024**2 * 4
    assert old - new > medium.layers * scores


def test_tied_embeddings_hold_three_gradients_while_they_are_added_up() -> None:
    arch = load_model("phi-4-mini").architecture
    elements = arch.vocab_size * arch.hidden_size
    ledger = simulate(plan_of("full", micro_batch=1, seq_len=512, optimizer="paged_adamw_8bit"), arch, A100)
    assert ledger.moment_peaks()["embedding backward"] - ledger.moment_peaks()["loading"] > 3 * 2 * elements


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit"])
def test_stepping_in_backward_never_holds_two_gradients(optimizer: str) -> None:
    """One more tensor of the embedding's size at most, and where the step makes a temporary, that one too."""
    fields: dict[str, Any] = {"micro_batch": 1, "seq_len": 256, "loss": "chunked", "optimizer": optimizer}
    memory = peak_of("full", **fields, optimizer_in_backward=True)
    embedding = 2 * MINI.vocab_size * MINI.hidden_size
    tensors = 3 if optimizer == "adamw_torch" else 2
    assert memory.allocated_bytes - memory.moments["loading"] < tensors * embedding + 100 * MIB
    assert memory.moments["optimizer step"] == pytest.approx(memory.moments["loading"], abs=MIB)
    assert memory.components["gradients"] <= 2 * embedding


def test_nothing_before_the_first_adapter_is_kept_without_checkpointing() -> None:
    """Layer 0's whole attention keeps no more than what the adapter of its output projection takes."""
    fields: dict[str, Any] = {"gradient_checkpointing": False, "attention": "eager", "micro_batch": 1}
    late, early = (
        peak_of("lora", **fields, lora={"rank": 16, "target_modules": targets}).moments["loss"]
        for targets in (("o_proj", "down_proj"), ("qkv_proj", "o_proj", "down_proj"))
    )
    assert early - late > MINI.heads * 2048**2 * 6


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_moments_are_a_closed_set_that_a_person_understands(method: Method, gradient_checkpointing: bool) -> None:
    memory = peak_of(method, gradient_checkpointing=gradient_checkpointing, micro_batch=1)
    assert set(memory.moments) <= MOMENTS
    assert memory.at in MOMENTS
    assert memory.moments[memory.at] == memory.allocated_bytes


def test_the_components_add_up_to_the_peak() -> None:
    memory = peak_of("qlora")
    assert set(memory.components) == set(COMPONENTS)
    assert sum(memory.components.values()) == memory.allocated_bytes


def test_every_term_says_what_it_is_by_which_formula_and_where_that_was_read() -> None:
    from advisor.memory import terms
    from advisor.memory.ledger import Term

    for term in vars(terms).values():
        if isinstance(term, Term):
            assert term.formula, term.name
            assert "Source: " in (term.function.__doc__ or ""), term.name


def test_hopper_keeps_larger_workspaces() -> None:
    h100 = what_if(load_gpu("h100"))
    workspaces = [peak_of("lora", gpu, seq_len=512).components["workspace"] for gpu in (h100, A100)]
    assert workspaces[0] - workspaces[1] >= 2 * (32 * MIB - 8_519_680)


def test_a_processor_has_no_cublas_and_no_pages() -> None:
    """What is left of "workspace" are the embedding's fp32 rows."""
    here = replace(A100, name="CPU", backend="cpu", capability=None)
    plan = plan_of("lora", seq_len=512)
    on_gpu, on_cpu = simulate(plan, MINI, A100), simulate(plan, MINI, here)
    assert any(entry.term is terms.matmul_workspace for entry in on_gpu.alive_at_peak())
    assert not any(entry.term is terms.matmul_workspace for entry in on_cpu.alive_at_peak())
    memory = estimate(plan, MINI, here)
    assert memory.reserved_bytes == memory.allocated_bytes


@pytest.mark.parametrize(("tokens", "fused"), [(256, {"gate_up_proj"}), (257, set()), (8192, set())])
def test_few_tokens_multiply_from_4_bits_as_bitsandbytes_chooses(tokens: int, fused: set[str]) -> None:
    """On an RTX 4090 Phi-3-medium's gate_up_proj makes 35,840 / 64 = 560 blocks, above 3 × 128 multiprocessors: up to
    256 tokens are fused (`_gemm_4bit_use_custom_cuda`). The other modules make at most 120, below 128: up to 128."""
    pytest.importorskip("bitsandbytes")
    plan = plan_of("qlora", micro_batch=1, seq_len=tokens)
    arch = load_model("phi-3-medium-4k").architecture
    shapes = layer_shapes(plan, arch, capability=(8, 9), backend="cuda", multiprocessors=128)
    assert shapes.fused_4bit == fused
    assert not layer_shapes(plan, arch, capability=None, backend="rocm").fused_4bit


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match="phimoe"):
        peak_of("lora", arch=load_model("phi-3.5-moe").architecture)


def test_an_estimate_takes_milliseconds() -> None:
    """The search makes some tens of them within its 40 ms: 0.2 to 0.6 ms each, ten times that on a slow machine."""
    plan = plan_of("qlora")
    simulate(plan, MINI, A100)
    best = min(_seconds(plan) for _ in range(10))
    assert best < 0.006


def _seconds(plan: Plan) -> float:
    start = time.perf_counter()
    simulate(plan, MINI, A100)
    return time.perf_counter() - start


def test_an_estimate_never_imports_torch() -> None:
    code = "import sys, advisor.memory.estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
