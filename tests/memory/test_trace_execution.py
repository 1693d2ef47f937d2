"""The trace against real execution: torch.profiler's peak of the same step on CPU tensors."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from real_execution import RANDOM_STATE_BYTES, highest, profiled, traced_peak

from advisor.memory.kernels import AttentionCall, Cpu
from advisor.memory.trace.attention import run_attention
from advisor.memory.trace.tracker import Tracker
from advisor.plan import Plan, plan_from_fields
from advisor.training import loss
from advisor.training.build import build_model, build_optimizer
from advisor.training.step import Step, make_batch, settings_of

PHI3 = {
    "model_type": "phi3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**PHI3, "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True}

TOLERANCE = 0.001
"""That of the issue. What is left is a few bytes for each random state."""

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 8}},
    "qlora": {"method": "qlora", "lora": {"rank": 8}, "quantization": {}},
}


def profiled_peak(plan: Plan, architecture: dict[str, Any]) -> int:
    """Bytes above the start, at the highest point of two steps."""
    torch.manual_seed(0)
    built = build_model(plan, architecture, "cpu")
    step = Step(built.model, build_optimizer(plan, built.model), settings_of(plan))
    batches = [lambda: make_batch(plan, architecture["vocab_size"], "cpu")] * min(plan.gradient_accumulation, 2)
    gc.collect()

    def run() -> None:
        for _ in range(2):
            step.run(batches)

    return profiled(run)


def test_a_second_gradient_is_added_into_the_first_if_only_autograd_holds_that() -> None:
    def residual(device: str) -> torch.Tensor:
        inputs = torch.ones(1000, 1000, device=device, requires_grad=True) * 1.0
        # The gradients of both products meet at `inputs`: no third tensor is made.
        return (inputs * 2.0 + inputs * 3.0).sum()

    def tied(device: str) -> torch.Tensor:
        weight = torch.ones(1000, 1000, device=device, requires_grad=True) * 1.0
        tokens = torch.zeros(4000, dtype=torch.int64, device=device)
        # The older gradient, of a Linear's weight, is a transposed view, which is not added into.
        return (torch.nn.functional.linear(torch.nn.functional.embedding(tokens, weight), weight) * 1.0).sum()

    for program in (residual, tied):
        tracker = Tracker(Cpu())
        with tracker:
            result = program("meta")
            tracker.enter("backward")
            result.backward()
        backward = [event for event in tracker.events if event.allocation.moment == "loss backward"]
        traced = highest(-e.allocation.nbytes if e.freed else e.allocation.nbytes for e in backward)
        result = program("cpu")
        # On the CPU a Python number that multiplies is a tensor of its own.
        assert traced == pytest.approx(profiled(result.backward), abs=64)


def test_math_attention_adds_its_mask_into_the_scores() -> None:
    def tensors(device: str) -> list[torch.Tensor]:
        query, key, value = (torch.ones(2, 4, 512, 32, device=device) for _ in range(3))
        return [query, key, value, torch.zeros(2, 1, 512, 512, device=device)]

    def call(*given: torch.Tensor) -> AttentionCall:
        query, key, value, mask = given
        return AttentionCall(
            query=query, key=key, value=value, mask=mask, dropout=0.0, causal=False, scale=None, grouped=False
        )

    tracker = Tracker(Cpu())
    with tracker:
        made = tensors("meta")
        before = len(tracker.events)
        run_attention(call(*made), "math")
    later = tracker.events[before:]
    traced = highest(-e.allocation.nbytes if e.freed else e.allocation.nbytes for e in later)
    real = call(*tensors("cpu"))
    assert traced == pytest.approx(profiled(lambda: run_attention(real, "math")), rel=TOLERANCE)


@pytest.mark.parametrize("architecture", [PHI3, GROUPED], ids=["phi3", "grouped"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dtype": "float32"},
        {"gradient_checkpointing": False},
        {"loss": "chunked", "seq_len": 1024},
        {"loss": "chunked", "seq_len": 1024, "dtype": "float32"},
        {"attention": "eager"},
        # In fp32: the peak is inside a product, where oneDNN's bf16 kernel takes a scratchpad of its own.
        {"hold_outputs": True, "gradient_accumulation": 2, "dtype": "float32"},
        {"optimizer": "adamw_torch"},
    ],
    ids=["bf16", "fp32", "no-checkpointing", "chunked", "chunked-fp32", "eager", "held", "unfused"],
)
def test_peak_is_that_of_real_execution(architecture: dict[str, Any], method: str, settings: dict[str, Any]) -> None:
    fields = {"model": "small", "micro_batch": 2, "seq_len": 256, **METHODS[method], **settings}
    plan = plan_from_fields(fields)
    real = profiled_peak(plan, architecture)
    if plan.gradient_checkpointing:
        # The chunks of the loss are checkpointed as the layers are.
        real -= RANDOM_STATE_BYTES * PHI3["num_hidden_layers"]  # type: ignore[operator]
    assert traced_peak(plan, architecture) == pytest.approx(real, rel=TOLERANCE)


WIDE = {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        (
            {"model_type": "qwen3_moe", **WIDE, **HEADS, **EXPERTS},
            {"method": "full", "padding": "longest", "gradient_accumulation": 3},
        ),
        (
            {"model_type": "gemma3_text", **WIDE, **HEADS, "sliding_window": 128},
            {"method": "full", "gradient_checkpointing": False, "optimizer": "adamw_torch"},
        ),
        (
            {"model_type": "gpt2", "vocab_size": 2048, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 512},
            {**METHODS["qlora"], "gradient_checkpointing": False, "lora": {"rank": 8, "dropout": 0.05}},
        ),
    ],
    ids=["experts", "windows", "transposed weights and dropout"],
)
def test_other_architectures_are_traced_as_they_run(architecture: dict[str, Any], fields: dict[str, Any]) -> None:
    plan = plan_from_fields({"model": "small", "dtype": "float32", "micro_batch": 2, "seq_len": 256, **fields})
    assert traced_peak(plan, architecture) == pytest.approx(profiled_peak(plan, architecture), rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_weight_is_quantised_on_a_processor_beside_the_places_of_its_codes(dtype: str, kind: str) -> None:
    from bitsandbytes.functional import quantize_4bit

    def quantise(device: str) -> Any:
        return quantize_4bit(torch.ones(256, 1024, dtype=getattr(torch, dtype), device=device), quant_type=kind)

    quantise("cpu")
    tracker = Tracker(Cpu())
    with tracker:
        quantise("meta")
    traced = highest(-e.allocation.nbytes if e.freed else e.allocation.nbytes for e in tracker.events)
    assert traced == pytest.approx(profiled(lambda: quantise("cpu")), rel=TOLERANCE)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("settings", [{}, {"dtype": "float32"}, {"optimizer_in_backward": True}], ids=str)
def test_the_optimizers_of_bitsandbytes_compute_in_fp32_on_a_processor_which_pages_nothing(
    optimizer: str, settings: dict[str, Any]
) -> None:
    fields = {"model": "small", "method": "full", "micro_batch": 1, "seq_len": 64, "gradient_checkpointing": False}
    plan = plan_from_fields({**fields, "optimizer": optimizer, **settings})
    assert traced_peak(plan, PHI3) == pytest.approx(profiled_peak(plan, PHI3), rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_the_loop_that_chunks_the_loss_before_torch_2_13(
    method: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_torch_has_chunks", lambda: False)
    fields = {"model": "small", "micro_batch": 2, "seq_len": 512, **METHODS[method]}
    plan = plan_from_fields({**fields, "dtype": dtype, "loss": "chunked"})
    real = profiled_peak(plan, PHI3) - RANDOM_STATE_BYTES * PHI3["num_hidden_layers"]  # type: ignore[operator]
    assert traced_peak(plan, PHI3) == pytest.approx(real, rel=TOLERANCE)


@pytest.mark.parametrize("architecture", [PHI3, GROUPED], ids=["phi3", "grouped-tied"])
@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": False},
        {"loss": "chunked", "seq_len": 1024},
        {"dtype": "bfloat16", "seq_len": 512},
    ],
    ids=["fp32", "no-checkpointing", "chunked", "bf16"],
)
def test_stepping_in_backward_is_traced_as_it_runs(
    architecture: dict[str, Any], optimizer: str, settings: dict[str, Any]
) -> None:
    # In fp32 where the peak is inside a product: there oneDNN's bf16 kernel takes a scratchpad of its own.
    fields = {"model": "small", "method": "full", "dtype": "float32", "micro_batch": 2, "seq_len": 256, **settings}
    plan = plan_from_fields({**fields, "optimizer": optimizer, "optimizer_in_backward": True})
    real = profiled_peak(plan, architecture)
    if plan.gradient_checkpointing:
        real -= RANDOM_STATE_BYTES * PHI3["num_hidden_layers"]  # type: ignore[operator]
    assert traced_peak(plan, architecture) == pytest.approx(real, rel=TOLERANCE)


@pytest.mark.parametrize("architecture", [PHI3, GROUPED], ids=["phi3", "grouped-tied"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch": 1, "seq_len": 512, "gradient_checkpointing": False},
        {"attention": "eager"},
        {"gradient_checkpointing": False, "hold_outputs": True},
    ],
    ids=["two-rows", "one-row", "eager", "held"],
)
def test_packed_rows_are_traced_as_they_run(
    architecture: dict[str, Any], method: str, settings: dict[str, Any]
) -> None:
    fields = {"model": "small", "dtype": "float32", "micro_batch": 2, "seq_len": 256, **METHODS[method], **settings}
    plan = plan_from_fields({**fields, "packing": True})
    real = profiled_peak(plan, architecture)
    if plan.gradient_checkpointing:
        real -= RANDOM_STATE_BYTES * PHI3["num_hidden_layers"]  # type: ignore[operator]
    assert traced_peak(plan, architecture) == pytest.approx(real, rel=TOLERANCE)
