"""Derived counts against the models that transformers builds, module by module, without storage."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from advisor.architecture import FAMILIES, Architecture, architecture_from_config
from advisor.errors import InputError, UnsupportedError
from advisor.profiles import load_model, model_names

BUILDABLE = [name for name in model_names() if load_model(name).architecture.model_type in CONFIG_MAPPING]
BUILDABLE_FAMILIES = [family for family in FAMILIES if family in CONFIG_MAPPING]

TOTALS = {
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3-mini-128k": 3_821_079_552,
    "phi-3.5-mini": 3_821_079_552,
    "phi-3-medium-4k": 13_960_238_080,
    "phi-3-medium-128k": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "phi-4-reasoning": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "phi-3-small-8k": 7_392_272_384,
    "phi-3-small-128k": 7_392_272_384,
    "phi-3-vision": 4_146_621_440,
    "phi-3.5-vision": 4_146_621_440,
    "phi-3.5-moe": 41_873_153_344,
}

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def small(model_type: str, **keys: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SMALL, **keys}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in names}


CASES = {
    "llama": small("llama"),
    "llama with biases": small("llama", attention_bias=True, mlp_bias=True),
    "llama with a tied head": small("llama", tie_word_embeddings=True),
    "llama with wide heads": small("llama", head_dim=24),
    "llama with null head_dim": small("llama", head_dim=None),
    "llama with null key-value heads": small("llama", num_key_value_heads=None),
    "llama without key-value heads": without(small("llama"), "num_key_value_heads"),
    "llama with other families' keys": small("llama", lm_head_bias=True, vision={"hidden_size": 8}),
    "mistral": small("mistral"),
    "mistral with null window": small("mistral", sliding_window=None),
    "mistral with null head_dim": small("mistral", head_dim=None),
    "mistral with biases that it does not read": small("mistral", attention_bias=True, mlp_bias=True),
    "qwen2": small("qwen2"),
    "qwen2 with a tied head": small("qwen2", tie_word_embeddings=True),
    "qwen2 with null key-value heads": small("qwen2", num_key_value_heads=None),
    "qwen2 with biases that it does not read": small("qwen2", attention_bias=False, mlp_bias=True),
    "qwen2 with a window in some layers": small("qwen2", use_sliding_window=True, max_window_layers=1),
    "qwen2 with a window that is off": small("qwen2", sliding_window=32, max_window_layers=1),
    "qwen3": small("qwen3"),
    "qwen3 with biases": small("qwen3", attention_bias=True),
    "qwen3 with narrow heads": small("qwen3", head_dim=8),
    "gemma": small("gemma"),
    "gemma with biases": small("gemma", attention_bias=True, head_dim=16),
    "gemma with a head of its own": small("gemma", tie_word_embeddings=False),
    "phi3": small("phi3"),
    "phi3 with null key-value heads": small("phi3", num_key_value_heads=None),
    "phi3 with a bias that it does not read": small("phi3", attention_bias=True),
    "phi3 with rotation of part of the head": small("phi3", partial_rotary_factor=0.5),
    "phimoe": small("phimoe", num_local_experts=3),
    "phimoe with biases": small("phimoe", attention_bias=True, lm_head_bias=True),
}


def build(config: dict[str, Any], **changes: Any) -> PreTrainedModel:
    """The model that transformers makes of a config.json, without storage."""
    settings = CONFIG_MAPPING[config["model_type"]].from_dict({**config, **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings)


def modules_of(model: PreTrainedModel) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Parameters of each module: of every layer by the path inside it, and of those outside. Shared ones count once."""
    layers: list[dict[str, int]] = [{} for _ in model.model.layers]
    outside: dict[str, int] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        count = sum(tensor.numel() for tensor in own if id(tensor) not in seen)
        seen.update(map(id, own))
        if path.startswith("model.layers."):
            index, _, inside = path.removeprefix("model.layers.").partition(".")
            layers[int(index)][inside] = count
        else:
            outside[path] = count
    return layers, outside


def assert_same_modules(architecture: Architecture, model: PreTrainedModel) -> None:
    layers, outside = modules_of(model)
    assert outside == dict(architecture.outer_modules)
    for layer in layers:
        assert layer == dict(architecture.layer_modules)


@pytest.mark.parametrize("name", BUILDABLE)
def test_a_profiles_modules_are_those_that_transformers_builds(name: str) -> None:
    config = dict(load_model(name).architecture.config)
    model = build(config, num_hidden_layers=2)
    assert_same_modules(architecture_from_config({**config, "num_hidden_layers": 2}, origin=name), model)


@pytest.mark.parametrize("name", BUILDABLE)
def test_a_profiles_total_is_that_of_the_whole_model(name: str) -> None:
    architecture = load_model(name).architecture
    model = build(dict(architecture.config))
    assert architecture.parameters == sum(tensor.numel() for tensor in model.parameters())
    assert architecture.layers == len(model.model.layers)


@pytest.mark.parametrize("name", BUILDABLE)
def test_a_profile_rotates_as_much_of_a_head_as_the_model(name: str) -> None:
    config = dict(load_model(name).architecture.config)
    model = build(config, num_hidden_layers=1)
    assert load_model(name).architecture.rotary_dim == 2 * model.model.rotary_emb.inv_freq.numel()


def test_every_profile_has_the_known_total() -> None:
    assert {name: load_model(name).architecture.parameters for name in model_names()} == TOTALS


def test_all_but_the_models_with_remote_code_can_be_built() -> None:
    remote = {name for name in model_names() if name not in BUILDABLE}
    assert remote == {"phi-3-small-8k", "phi-3-small-128k", "phi-3-vision", "phi-3.5-vision"}
    assert {name for name in model_names() if not load_model(name).launchable} == remote


@pytest.mark.parametrize("case", CASES)
def test_a_familys_modules_are_those_that_transformers_builds(case: str) -> None:
    config = CASES[case]
    model = build(config)
    architecture = architecture_from_config(config, origin=case)
    assert_same_modules(architecture, model)
    assert architecture.parameters == sum(tensor.numel() for tensor in model.parameters())
    assert architecture.rotary_dim == 2 * model.model.rotary_emb.inv_freq.numel()


@pytest.mark.parametrize("case", CASES)
def test_linear_modules_have_the_shapes_and_names_of_the_real_ones(case: str) -> None:
    architecture = architecture_from_config(CASES[case], origin=case)
    layer = build(CASES[case]).model.layers[0]
    real = {
        path: (module.in_features, module.out_features, module.bias is not None)
        for path, module in layer.named_modules()
        if type(module) is torch.nn.Linear
    }
    assert {linear.path: (linear.inputs, linear.outputs, linear.bias) for linear in architecture.linears} == real
    assert all(linear.path.endswith(f".{linear.name}") for linear in architecture.linears)


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name]["model_type"].startswith("qwen")])
def test_a_qwen_uses_its_window_in_the_layers_that_say_so(case: str) -> None:
    architecture = architecture_from_config(CASES[case], origin=case)
    config = build(CASES[case]).config
    assert architecture.window_layers == Counter(config.layer_types)["sliding_attention"]
    assert (architecture.window is not None) == (architecture.window_layers > 0)


@pytest.mark.parametrize("case", ["mistral", "mistral with null window", "phi3"])
def test_the_window_is_the_configurations(case: str) -> None:
    assert architecture_from_config(CASES[case], origin=case).window == build(CASES[case]).config.sliding_window


@pytest.mark.parametrize("family", BUILDABLE_FAMILIES)
def test_defaults_are_those_of_the_configuration_class(family: str) -> None:
    flags = {"use_sliding_window": True} if FAMILIES[family].window == "flag" else {}
    configuration = CONFIG_MAPPING[family](**flags)
    defaults = {key: value for key, value in FAMILIES[family].defaults.items() if key not in flags}
    assert {key: getattr(configuration, key) for key in defaults} == defaults


@pytest.mark.parametrize("family", BUILDABLE_FAMILIES)
def test_a_config_that_says_only_its_type_is_that_types_default_model(family: str) -> None:
    architecture = architecture_from_config({"model_type": family}, origin=family)
    assert architecture.parameters == sum(tensor.numel() for tensor in build({"model_type": family}).parameters())


def test_every_family_but_those_with_remote_code_is_built_here() -> None:
    assert set(FAMILIES) - set(BUILDABLE_FAMILIES) == {"phi3small", "phi3_v"}
    assert {config["model_type"] for config in CASES.values()} == set(BUILDABLE_FAMILIES)


def test_phi_3_smalls_own_config_says_nothing_of_its_tied_head() -> None:
    config = without(dict(load_model("phi-3-small-8k").architecture.config), "tie_word_embeddings")
    assert architecture_from_config(config, origin="config.json").parameters == TOTALS["phi-3-small-8k"]


def test_the_image_tower_of_phi_3_vision_is_clips() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    vision = load_model("phi-3-vision").architecture.config["vision"]
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    with torch.device("meta"):
        tower = CLIPVisionModel(CLIPVisionConfig(**{key: vision[key] for key in keys}))
    outer = load_model("phi-3-vision").architecture.outer_modules
    held = sum(outer[f"model.vision_embed_tokens.{part}"] for part in ("embeddings", "norms", "layers"))
    assert held == sum(tensor.numel() for tensor in tower.parameters())


BAD_NUMBERS = [0, -1, 1.5, 2.0, float("nan"), float("inf"), 10**5000, "64", True, [64], {}, 2**40]


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"],
)
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda value: type(value).__name__)
def test_a_number_that_no_model_has_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        architecture_from_config(small("llama", **{key: value}), origin="config.json")
    assert key in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (small("phimoe", num_local_experts="16"), "num_local_experts"),
        (small("phimoe", num_local_experts=-2), "num_local_experts"),
        (small("llama", tie_word_embeddings="false"), "tie_word_embeddings"),
        (small("llama", attention_bias=1), "attention_bias"),
        (small("phi3", resid_pdrop=float("nan")), "resid_pdrop"),
        (small("phi3", resid_pdrop="0.1"), "resid_pdrop"),
        (small("llama", attention_dropout=1.0), "attention_dropout"),
        (small("phi3", sliding_window="2047"), "sliding_window"),
        (small("phi3", sliding_window=-1), "sliding_window"),
        (small("phi3", partial_rotary_factor=float("nan")), "partial_rotary_factor"),
        (small("phi3", rope_scaling={"partial_rotary_factor": [1]}), "partial_rotary_factor"),
        (small("qwen2", use_sliding_window="yes"), "use_sliding_window"),
        (small("qwen2", max_window_layers=None, use_sliding_window=[]), "use_sliding_window"),
        (small("qwen2", max_window_layers="28"), "max_window_layers"),
        (small("phi3_v", vision=3), "vision"),
        (small("phi3_v", vision={"hidden_size": "1024"}), "vision"),
        (small("llama", num_attention_heads=5), "heads"),
        (small("llama", num_key_value_heads=3), "heads"),
    ],
)
def test_a_setting_that_cannot_be_is_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as caught:
        architecture_from_config(config, origin="config.json")
    assert named in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"model_type": "t5", "is_encoder_decoder": True},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
    ],
)
def test_what_is_not_a_causal_language_model_is_refused_as_such(config: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        architecture_from_config(config, origin="config.json")
    assert not isinstance(caught.value, UnsupportedError)
    assert "decoder-only causal" in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize("model_type", ["falcon", "bert", "x" * 10_000])
def test_an_unknown_family_is_to_be_traced(model_type: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        architecture_from_config({"model_type": model_type}, origin="config.json")
    assert "trace" in caught.value.hint
    assert all(family in caught.value.why for family in FAMILIES)
    assert len(caught.value.what) < 200


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ""}, {"model_type": ["phi3"]}])
def test_a_config_without_a_model_type_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="model_type"):
        architecture_from_config(config, origin="config.json")


def test_a_real_config_with_all_its_other_keys_is_understood(tmp_path: Path) -> None:
    settings = CONFIG_MAPPING["phi3"]()
    settings.architectures = ["Phi3ForCausalLM"]
    path = tmp_path / "config.json"
    path.write_text(settings.to_json_string(use_diff=False))
    assert load_model(str(path)).architecture.parameters == TOTALS["phi-3-mini-4k"]
    assert len(json.loads(path.read_text())) > 20
