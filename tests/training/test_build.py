"""What is built: which parameters train, in what format, and what a wrong plan says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from advisor.architecture import architecture_from_config
from advisor.errors import InputError, PlanError, UnsupportedError
from advisor.training.build import BuiltModel, build_config, build_model, build_optimizer


def trainable(built: BuiltModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in built.model.named_parameters() if p.requires_grad}


def test_full_trains_every_parameter(make_plan: Any, architecture: dict[str, Any]) -> None:
    built = build_model(make_plan("full"), architecture, "cpu")
    assert len(trainable(built)) == len(list(built.model.parameters()))
    assert built.trainable_parameters == built.total_parameters


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_alone_train_and_are_fp32(method: str, make_plan: Any, architecture: dict[str, Any]) -> None:
    built = build_model(make_plan(method, dtype="bfloat16"), architecture, "cpu")
    found = trainable(built)
    assert found
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in found.items())
    adapted = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in found}
    assert adapted == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    # rank × (inputs + outputs) of each.
    size, kv, middle = 128, 64, 256
    widths = (size + size + 2 * kv) + (size + size) + (size + 2 * middle) + (middle + size)
    assert built.trainable_parameters == 2 * 8 * widths


@pytest.mark.parametrize("family", ["phi3", "llama", "qwen2", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_architecture(
    method: str, family: str, tied: bool, make_plan: Any, architecture: dict[str, Any]
) -> None:
    config = {**architecture, "model_type": family, "tie_word_embeddings": tied}
    built = build_model(make_plan(method), config, "meta")
    assert built.total_parameters == architecture_from_config(config, origin="test").parameters


def test_every_linear_but_the_head_is_4_bit(make_plan: Any, architecture: dict[str, Any]) -> None:
    from bitsandbytes.nn import Linear4bit

    built = build_model(make_plan("qlora", dtype="bfloat16"), architecture, "cpu")
    for name, module in built.causal_lm.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name:
            assert isinstance(module, Linear4bit) == (not name.endswith("lm_head")), name
            if isinstance(module, Linear4bit):
                assert module.compute_dtype == torch.bfloat16
                assert module.weight.numel() == module.in_features * module.out_features // 2
                assert module.weight.quant_state.nested


def test_kbit_preparation_stores_what_is_not_quantised_as_fp32(make_plan: Any, architecture: dict[str, Any]) -> None:
    built = build_model(make_plan("qlora", dtype="bfloat16", upcast_frozen=True), architecture, "cpu")
    dtypes = {p.dtype for p in built.model.parameters()}
    assert dtypes == {torch.uint8, torch.float32}


def test_checkpointing_is_on_as_planned_and_not_reentrant(
    method: str, make_plan: Any, architecture: dict[str, Any]
) -> None:
    for wanted in (True, False):
        built = build_model(make_plan(method, gradient_checkpointing=wanted), architecture, "cpu")
        layers = [m for m in built.causal_lm.modules() if type(m).__name__ == "Phi3DecoderLayer"]
        assert [layer.gradient_checkpointing for layer in layers] == [wanted] * 2
        if wanted:
            assert all(not layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in layers)


def test_adapters_where_nothing_matches_are_an_error_with_the_names(
    make_plan: Any, architecture: dict[str, Any]
) -> None:
    plan = make_plan("lora", lora={"rank": 8, "target_modules": ["query_key_value"]})
    with pytest.raises(PlanError, match="target_modules") as caught:
        build_model(plan, architecture, "meta")
    assert "qkv_proj" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "phi33"}, InputError),
        ({}, InputError),
        ({"model_type": "t5"}, UnsupportedError),
        (
            {"model_type": "phi3", "hidden_size": 100, "num_attention_heads": 3, "rope_scaling": {"type": "x"}},
            InputError,
        ),
    ],
)
def test_a_configuration_that_cannot_be_built_is_an_input_error(
    config: dict[str, Any], error: type[InputError]
) -> None:
    with pytest.raises(error):
        build_config(config)


@pytest.mark.parametrize(
    ("config", "padding"),
    [
        ({"model_type": "opt", "vocab_size": 512}, 1),
        ({"model_type": "phi3", "vocab_size": 512}, None),
        ({"model_type": "phi3", "vocab_size": 512, "pad_token_id": 3}, 3),
    ],
)
def test_padding_is_the_architectures_own_where_a_smaller_vocabulary_has_it(
    config: dict[str, Any], padding: int | None
) -> None:
    assert build_config(config).pad_token_id == padding


SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def adapted(built: BuiltModel) -> set[str]:
    """Last names of the modules that have adapters."""
    return {name.split(".")[-4] for name in trainable(built) if "lora_A" in name}


def test_adapters_on_all_linear_modules_leave_a_router_alone(make_plan: Any) -> None:
    # Its forward returns what it chose as well: wrapped by PEFT, it would end the first forward.
    plan = make_plan("lora")
    built = build_model(plan, {"model_type": "phimoe", **SMALL, **HEADS, "num_local_experts": 4}, "meta")
    assert adapted(built) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_adapters_on_all_linear_modules_leave_out_what_mambas_kernel_reads(make_plan: Any) -> None:
    plan = make_plan("lora", attention="eager")
    built = build_model(plan, {"model_type": "falcon_mamba", **SMALL}, "meta")
    assert adapted(built) == {"in_proj", "x_proj", "dt_proj"}


@pytest.mark.parametrize(
    ("config", "left_out"),
    [
        ({"model_type": "falcon_h1", **SMALL, **HEADS, "lm_head_multiplier": 0.5}, "lm_head_multiplier"),
        ({"model_type": "bert", **SMALL, "num_attention_heads": 4, "is_decoder": True}, "transform"),
    ],
)
def test_a_chunked_loss_leaves_nothing_out_of_the_logits(config: dict[str, Any], left_out: str, make_plan: Any) -> None:
    with pytest.raises(PlanError, match=left_out):
        build_model(make_plan("full", loss="chunked"), config, "meta")


def test_what_peft_refuses_is_not_said_to_be_missing(make_plan: Any) -> None:
    plan = make_plan("lora", attention="eager", lora={"target_modules": ["out_proj"]})
    with pytest.raises(PlanError, match="PEFT refuses") as caught:
        build_model(plan, {"model_type": "falcon_mamba", **SMALL}, "meta")
    assert "dt_proj, in_proj" in caught.value.hint


def test_gpt2s_transposed_weights_are_quantised_too(make_plan: Any) -> None:
    small = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 1, "n_head": 4}
    block = build_model(make_plan("qlora"), small, "meta").decoder.h[0]
    fused = block.attn.c_attn.base_layer
    assert type(fused).__name__ == "Linear4bit"
    assert (fused.in_features, fused.out_features) == (64, 192)


def test_what_transformers_refuses_to_build_is_not_blamed_on_attention(make_plan: Any) -> None:
    with pytest.raises(InputError, match="cannot build this gemma3n_text model") as caught:
        build_model(make_plan("full"), {"model_type": "gemma3n_text", **SMALL, **HEADS}, "meta")
    assert not isinstance(caught.value, PlanError)


def test_an_architecture_without_checkpointing_is_offered_none(make_plan: Any) -> None:
    small = {"model_type": "ctrl", "vocab_size": 512, "n_embd": 64, "dff": 64, "n_layer": 2, "n_head": 2}
    plan = make_plan("full", attention="eager", gradient_checkpointing=True)
    with pytest.raises(PlanError) as caught:
        build_model(plan, small, "meta")
    assert caught.value.hint == "Write gradient_checkpointing = false."


def test_the_optimizer_holds_every_trained_parameter_in_two_groups(
    method: str, make_plan: Any, architecture: dict[str, Any]
) -> None:
    plan = make_plan(method)
    built = build_model(plan, architecture, "cpu")
    groups = build_optimizer(plan, built.model).param_groups
    held = [p for group in groups for p in group["params"]]
    assert len(groups) == 2
    assert {id(p) for p in held} == {id(p) for p in trainable(built).values()}
    norms = {id(p) for name, p in built.model.named_parameters() if "norm" in name}
    assert not norms & {id(p) for p in groups[0]["params"]}
