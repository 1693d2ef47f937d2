"""What a trace says about Phi-3-mini's geometry, and about plans that differ in one setting."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from advisor.errors import EnvironmentLacksError, InputError, PlanError
from advisor.memory.allocator import CachingAllocator
from advisor.memory.regime import TORCH_DEFAULTS, training_regime
from advisor.memory.trace import Allocation, Event, Trace, trace
from advisor.memory.trace.replayed import walk
from advisor.memory.trace.result import WARM_UP
from advisor.plan import plan_from_fields
from advisor.units import GIB, MIB

PHI3_MINI: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
SHALLOW = {**PHI3_MINI, "num_hidden_layers": 2}
LORA = {"method": "lora", "lora": {"rank": 16}}
QLORA = {"method": "qlora", "lora": {"rank": 16}, "quantization": {}}


def traced(architecture: dict[str, Any] = SHALLOW, **fields: Any) -> Trace:
    settings = {"model": "x", "micro_batch": 2, "seq_len": 1024, **fields}
    gpu_capability = settings.pop("capability", (8, 0))
    return trace(plan_from_fields(settings), architecture, capability=gpu_capability)


@pytest.mark.parametrize(
    ("fields", "gib"),
    [
        ({**LORA, "hold_outputs": True}, 9.92),
        ({**QLORA, "hold_outputs": True}, 4.91),
        ({**QLORA, "hold_outputs": True, "upcast_frozen": True}, 6.28),
        (LORA, 9.68),
        ({**QLORA, "upcast_frozen": True}, 5.79),
    ],
    ids=["lora held", "qlora held", "kbit held", "lora", "kbit"],
)
def test_reference_peaks(fields: dict[str, Any], gib: float) -> None:
    found = traced(PHI3_MINI, seq_len=2048, **fields)
    assert found.at == "loss backward"
    # DESIGN.md gives two decimals, and rounds down.
    assert found.allocated_bytes / GIB == pytest.approx(gib, abs=0.01)


@pytest.mark.parametrize("fields", [{"method": "full"}, LORA], ids=["full", "lora"])
def test_a_later_micro_batchs_gradients_are_gradients_until_they_are_added_up(fields: dict[str, Any]) -> None:
    found = traced(**fields, gradient_accumulation=2, seq_len=128)
    name = "o_proj.weight" if fields["method"] == "full" else "o_proj.lora_A.default.weight"
    made = [
        e.allocation for e in found.events if not e.freed and e.allocation.module.endswith(f"layers.0.self_attn.{name}")
    ]
    # Two steps of two micro-batches.
    assert sum(allocation.component == "gradients" for allocation in made) == 4


def test_components_add_up_to_the_peak() -> None:
    found = traced(**QLORA)
    assert sum(found.components.values()) == found.allocated_bytes


def test_weights_in_4_bits_are_called_quantization_as_in_closed_form() -> None:
    """Half a byte a weight and its statistics; what stays in 16 bits is the embedding, the head and the norms."""
    plain, quantized = traced(**LORA).components, traced(**QLORA).components
    moved = plain["weights"] - quantized["weights"]
    assert quantized["quantization"] == pytest.approx(moved / 4, rel=0.05)


def test_adapters_are_fp32_whatever_the_base() -> None:
    found = traced(**LORA)
    assert found.components["adapters"] == 4 * found.trainable_parameters
    assert found.components["optimizer"] >= 8 * found.trainable_parameters


def test_foreach_adamw_makes_a_parameter_sized_temporary_and_fused_none() -> None:
    fused = traced(method="full", optimizer="adamw_torch_fused").peaks["optimizer step"]
    foreach = traced(method="full", optimizer="adamw_torch").peaks["optimizer step"]
    parameters = traced(method="full").total_parameters
    assert foreach - fused == pytest.approx(2 * parameters, rel=0.01)


def test_paged_states_are_not_in_torchs_allocator() -> None:
    paged = traced(method="full", optimizer="paged_adamw_32bit")
    assert paged.components.get("optimizer", 0) < 0.001 * paged.total_parameters


def test_fp32_weights_under_autocast_keep_16_bit_copies_through_the_forward() -> None:
    plain = traced(method="full", dtype="float32", gradient_checkpointing=True)
    mixed = traced(method="full", dtype="float32", autocast="bfloat16", gradient_checkpointing=True)
    layers = 2 * (9 * 3072**2 + 3 * 3072 * (8192 - 3072))
    assert mixed.peaks["loss"] > plain.peaks["loss"] - 4 * layers
    cast = [a for a in mixed.events if a.allocation.operation.startswith("aten._to_copy") and not a.freed]
    assert any(event.allocation.shape == (16384, 3072) for event in cast)


def test_padding_materialises_a_mask_and_leaves_flash_attention() -> None:
    full, padded = traced(**LORA), traced(**LORA, padding="longest")
    operations = {event.allocation.operation for event in padded.events}
    assert any("efficient_attention" in operation for operation in operations)
    assert not any("efficient_attention" in event.allocation.operation for event in full.events)


def test_a_t4_computes_bfloat16_attention_in_math_and_float16_in_the_efficient_kernel() -> None:
    bf16 = {event.allocation.operation for event in traced(**LORA, capability=(7, 5)).events}
    fp16 = {event.allocation.operation for event in traced(**LORA, dtype="float16", capability=(7, 5)).events}
    assert "aten._softmax.default" in bf16 or "aten._safe_softmax.default" in bf16
    assert any("efficient_attention" in operation for operation in fp16)


def test_a_sliding_window_shorter_than_the_sequence_makes_a_mask() -> None:
    windowed = traced({**SHALLOW, "sliding_window": 512}, **LORA)
    assert any("efficient_attention" in event.allocation.operation for event in windowed.events)


def test_chunking_the_loss_removes_the_logits() -> None:
    assert traced(**LORA, loss="chunked", seq_len=2048).allocated_bytes < traced(**LORA, seq_len=2048).allocated_bytes


def test_without_checkpointing_more_is_alive() -> None:
    assert traced(**LORA, gradient_checkpointing=False).allocated_bytes > traced(**LORA).allocated_bytes


def test_everything_made_in_a_step_and_not_kept_is_freed() -> None:
    found = traced(**LORA)
    step_events = [
        e for e in found.events if e.allocation.moment == "loss backward" and e.allocation.component != "workspace"
    ]
    gradients = [e for e in step_events if e.allocation.component == "gradients"]
    assert sum(-1 if e.freed else 1 for e in step_events if e not in gradients) == 0


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),
        ("gemma", {"head_dim": 128}),
        ("gemma3_text", {"head_dim": 128, "sliding_window": 128}),
        ("mixtral", {"num_local_experts": 4}),
        ("phimoe", {"num_local_experts": 4}),
        ("gpt_neox", {}),
        ("falcon", {}),
    ],
)
@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
@pytest.mark.filterwarnings("default")  # PEFT and transformers warn about some of them
def test_other_architectures(model_type: str, extra: dict[str, Any], method: dict[str, Any]) -> None:
    small = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 4}
    fields = {**method, "lora": {"rank": 8}, "seq_len": 256}
    found = traced({**SHALLOW, "model_type": model_type, **small, **extra}, **fields)
    assert found.allocated_bytes > 0


def test_an_unknown_model_type_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no model_type"):
        traced({"model_type": "phi33"}, **LORA)


@pytest.mark.parametrize("model_type", ["gemma2", "bloom"])
def test_an_architecture_without_sdpa_is_offered_eager(model_type: str) -> None:
    with pytest.raises(PlanError, match="attention") as caught:
        traced({**SHALLOW, "model_type": model_type}, **LORA)
    assert 'attention = "eager"' in caught.value.hint


def test_flash_attention_is_not_refused_by_an_architecture_without_sdpa() -> None:
    small = {**SHALLOW, "model_type": "gemma2", "hidden_size": 512, "num_attention_heads": 4, "head_dim": 128}
    found = traced(
        {**small, "num_key_value_heads": 4, "sliding_window": 4096}, **LORA, attention="flash_attention_2", seq_len=128
    )
    assert any("_flash_attention_forward" in event.allocation.operation for event in found.events)


def test_flash_attention_runs_in_an_architecture_that_chose_a_class_for_it() -> None:
    small = {"model_type": "falcon", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 1}
    found = traced({**small, "num_attention_heads": 4}, **LORA, attention="flash_attention_2", seq_len=64)
    assert any("_flash_attention_forward" in event.allocation.operation for event in found.events)


def test_flash_attention_is_refused_where_transformers_refuses_it() -> None:
    small = {"model_type": "bloom", "vocab_size": 512, "hidden_size": 128, "n_layer": 1, "n_head": 4}
    with pytest.raises(PlanError, match="bloom cannot use flash_attention_2"):
        traced(small, **LORA, attention="flash_attention_2", seq_len=64)


@pytest.mark.parametrize(
    "fields",
    [
        {**QLORA, "upcast_frozen": True},
        {**QLORA, "upcast_frozen": True, "autocast": "bfloat16"},
        {"method": "full", "dtype": "float32", "autocast": "bfloat16"},
    ],
    ids=["kbit", "kbit under autocast", "fp32 weights under autocast"],
)
@pytest.mark.parametrize("padding", ["none", "longest"])
def test_flash_attention_2_over_fp32_hidden_states_computes_in_16_bits(fields: dict[str, Any], padding: str) -> None:
    # transformers casts to what get_target_dtype says: autocast's dtype, or the quantised model's.
    found = traced(**fields, attention="flash_attention_2", padding=padding, seq_len=128)
    outputs = [e.allocation for e in found.events if "_flash_attention_forward" in e.allocation.operation]
    assert {allocation.dtype for allocation in outputs if allocation.shape[-1:] == (96,)} == {"bfloat16"}


def test_float16_scales_its_gradients() -> None:
    found = traced(**LORA, dtype="float16", autocast="float16", seq_len=128)
    steps = [e.allocation for e in found.events if e.allocation.component == "optimizer" and not e.freed]
    assert any("reciprocal" in allocation.operation for allocation in steps)
    assert found.components["optimizer"] >= 8 * found.trainable_parameters


def test_softmax_from_float16_to_fp32_is_one_kernel() -> None:
    def copies_of_scores(dtype: str) -> int:
        found = traced(**LORA, dtype=dtype, attention="eager", seq_len=128, micro_batch=1)
        scores = (1, 32, 128, 128)
        made = [e.allocation for e in found.events if not e.freed and e.allocation.shape == scores]
        copies = [a for a in made if a.dtype == "float32" and a.operation.startswith("aten._to_copy")]
        return sum(a.moment == "forward" for a in copies)

    assert copies_of_scores("bfloat16") > copies_of_scores("float16") == 0


def test_evaluation_and_saving_are_moments_of_their_own() -> None:
    found = traced(**LORA)
    kept = found.components["weights"] + found.components["adapters"] + 8 * found.trainable_parameters
    assert kept < found.saving_bytes < found.evaluation_bytes < found.step_bytes == found.allocated_bytes


def test_a_trace_ends_with_what_the_run_still_holds() -> None:
    found = traced(**LORA)
    alive = sum(-e.allocation.nbytes if e.freed else e.allocation.nbytes for e in found.events)
    assert alive > 8 * found.trainable_parameters
    states = {e.allocation.module for e in found.events if e.allocation.component == "optimizer"}
    assert any("lora_A" in module for module in states)


def test_what_cannot_be_traced_is_named() -> None:
    # PEFT cannot wrap this router, whose forward returns a tuple.
    router = {"method": "lora", "lora": {"target_modules": ["router"]}}
    with pytest.raises(EnvironmentLacksError, match="router"):
        traced({**SHALLOW, "model_type": "phimoe", "num_local_experts": 4}, **router, seq_len=64)


FIRST_TRACE = """
from advisor.memory.trace import trace
from advisor.plan import plan_from_fields
plan = {"model": "x", "method": "qlora", "lora": {}, "quantization": {}, "seq_len": 1024, "micro_batch": 2}
found = trace(plan_from_fields(plan), %r)
inside = [e.allocation for e in found.events if e.allocation.operation == "inside bitsandbytes.gemm_4bit.default"]
print(*sorted({allocation.nbytes for allocation in inside if "layers.0.mlp.down_proj" in allocation.module}))
"""


def test_the_first_trace_of_a_process_knows_what_bitsandbytes_expands() -> None:
    # Its operators exist only once it is imported. 3,072 × 8,192 weights: an fp32 scale for every 64, and 2 bytes each.
    command = [sys.executable, "-c", FIRST_TRACE % SHALLOW]
    sizes = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()
    assert sizes == [str(3072 * 8192 // 64 * 4), str(3072 * 8192 * 2)]


def test_importing_the_trace_does_not_import_torch() -> None:
    code = "import sys, advisor.memory.trace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_single_full_sequence_is_neither_padded_nor_packed() -> None:
    fields = {"model": "tiny", "method": "lora", "lora": {"rank": 4}, "micro_batch": 1, "seq_len": 64}
    config = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }

    def step_bytes(**more: object) -> int:
        return trace(plan_from_fields({**fields, **more}), config, capability=(8, 0)).step_bytes

    # One sequence is as long as the longest, so a collator that pads to the longest adds nothing to it.
    mask = 3 * 512
    assert step_bytes(padding="longest") - step_bytes() <= mask
    # Read as packed, each of the 64 tokens would be a sequence with 128 rows of accumulators of its own.
    assert step_bytes(attention="flash_attention_2") == pytest.approx(step_bytes(), rel=0.01)


def test_loading_begins_with_one_block_as_large_as_the_weights() -> None:
    plain, quantized = traced(**LORA, seq_len=128), traced(**QLORA, seq_len=128)
    for found in (plain, quantized):
        made, freed = found.events[:2]
        assert made.allocation is freed.allocation
        assert (made.allocation.operation, freed.freed) == (WARM_UP, True)
        # As large as what then stays, without the scales: a byte for 64 weights, 4 for 256 scales. What is not
        # counted is codebooks, offsets, and what tensors are rounded up by.
        packed = found.components.get("quantization", 0) / (1 + 2 * (1 / 64 + 4 / 64 / 256))
        assert made.allocation.nbytes == pytest.approx(found.components["weights"] + packed, rel=0.0005)


def test_a_hand_written_loop_moves_its_model_after_loading() -> None:
    assert traced(**LORA, seq_len=128, hold_outputs=True).events[0].allocation.operation != WARM_UP


def test_a_warm_up_leaves_1_2_gib_of_the_gpu() -> None:
    block = Allocation(3 * GIB, (3 * GIB // 2,), "float16", "", WARM_UP, "loading", "weights")
    events = [Event(block, freed, "loading") for freed in (False, True)]
    held = [made.size for _, made in walk(events, CachingAllocator(total_bytes=4 * GIB), empties_cache=True) if made]
    assert held[0] == pytest.approx(2.8 * GIB, abs=MIB)


def test_bitsandbytes_makes_statistics_before_codes() -> None:
    found = traced(**QLORA, seq_len=128)
    sizes = [e.allocation.nbytes for e in found.events if not e.freed and "quantize_4bit" in e.allocation.operation]
    # Of qkv_proj, 9,216 × 3,072: fp32 scales for every 64 weights, then half a byte each.
    weights = 9216 * 3072
    first = sizes.index(weights // 64 * 4)
    assert sizes[first + 1] == weights // 2


def test_what_runs_a_plan_decides_how_the_allocator_is_run() -> None:
    ours, theirs = traced(**LORA, seq_len=1000), traced(**LORA, seq_len=1000, hold_outputs=True)
    assert ours.regime == training_regime()
    assert theirs.regime == TORCH_DEFAULTS
    assert theirs.reserved_bytes == theirs.default.reserved_bytes
    # Blocks are counted whole, in the total and in its parts.
    assert sum(theirs.components.values()) == theirs.allocated_bytes == theirs.default.allocated_bytes
    assert theirs.allocated_bytes > theirs.expandable.allocated_bytes
