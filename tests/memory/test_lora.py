"""Which modules an adapter's targets match: the architecture's answer against PEFT's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from advisor.architecture import Architecture, architecture_from_config
from advisor.errors import PlanError
from advisor.memory.lora import adapted_names, match_targets
from advisor.plan import LoraSettings, Plan
from advisor.profiles import default_plan

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 11,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def arch_of(model_type: str) -> Architecture:
    return architecture_from_config({**TINY, "model_type": model_type}, origin="tiny")


def plan_of(targets: str | tuple[str, ...]) -> Plan:
    base = default_plan("lora", model="tiny")
    return replace(base, lora=LoraSettings(target_modules=targets))


def adapted_by_peft(model_type: str, targets: str | tuple[str, ...]) -> set[str]:
    """Paths inside a layer of the modules that PEFT adapts in every layer."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    import torch

    config: Any = transformers.AutoConfig.for_model(model_type, **TINY)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        settings = peft.LoraConfig(
            target_modules=targets if isinstance(targets, str) else list(targets), task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(model, settings)
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_modules() if ".lora_A." in name}


@pytest.mark.parametrize("model_type", ["phi3", "llama", "qwen3"])
@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        "ALL-Linear",
        ("o_proj", "down_proj"),
        ("q_proj", "o_proj", "gate_up_proj"),
        ("self_attn.o_proj",),
        r".*\.(o_proj|down_proj)",
        r"model\.layers\.\d+\.self_attn\.\w*_proj",
        r"model\.layers\.\d+\.self_attn\.(?!q_norm|k_norm).*",
        r".*_proj",
    ],
    ids=str,
)
def test_targets_match_what_peft_adapts(model_type: str, targets: str | tuple[str, ...]) -> None:
    assert adapted_names(plan_of(targets), arch_of(model_type)) == adapted_by_peft(model_type, targets)


def test_a_target_that_matches_nothing_is_named() -> None:
    matched, unmatched = match_targets(plan_of(("q_proj", "o_proj", "up_proj")), arch_of("phi3"))
    assert matched == {"o_proj"}
    assert unmatched == ("q_proj", "up_proj")


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (("q_proj",), "qkv_proj"),
        ("o_proj", "whole path"),
        (("lm_head",), "lm_head"),
        ("lm_head", "lm_head"),
        (("embed_tokens", "o_proj"), "embed_tokens"),
        (".*", "lm_head"),
        ("(", "regular expression"),
        (("self_attn",), "self_attn"),
        (r"model\.layers\.\d+\.mlp\..*", "activation_fn"),
        (("3.self_attn.o_proj",), "1 of 11 layers"),
        (r"model\.layers\.\d\..*o_proj", "10 of 11 layers"),
        ((".",), "qkv_proj"),
    ],
    ids=str,
)
def test_targets_that_cannot_be_honoured_are_refused(targets: str | tuple[str, ...], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        match_targets(plan_of(targets), arch_of("phi3"))
    error = caught.value
    assert "lora.target_modules" in str(error)
    assert says in f"{error} {error.why} {error.hint}"


def test_full_fine_tuning_adapts_nothing() -> None:
    assert match_targets(default_plan("full", model="tiny"), arch_of("phi3")) == (frozenset(), ())
