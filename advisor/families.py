"""How each transformers model class lays its decoder layer out: the knowledge of architectures, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Window = Literal["never", "always", "flag", "alternate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one transformers model class builds a decoder layer.

    Source of every entry: transformers 5.23, models/<model_type>/{configuration,modeling}_*.py; a test builds each
    family and compares module by module, and compares `defaults` with the configuration class.
    """

    defaults: Mapping[str, Any]
    """What the configuration class fills in for a key that config.json leaves out; the flags that it reads are here."""

    fused: bool = False
    """One `qkv_proj` and one `gate_up_proj` instead of five matrices."""

    qkv_bias: bool | None = None
    """Whether q, k and v have a bias; None: the config's `attention_bias`."""

    output_bias: bool | None = None
    """Whether `o_proj` has a bias; None: the config's `attention_bias`."""

    qk_norm: bool = False
    """Queries and keys pass an RMSNorm a head."""

    layer_norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Norms of the hidden size in a layer, by name."""

    norm_in_fp32: bool = False
    """The norm multiplies by its weight in fp32 and converts last, as Gemma does."""

    norm_bias: bool = False
    """LayerNorm with a bias instead of RMSNorm."""

    window: Window = "never"
    """Which layers use `sliding_window`: none, all, those that `use_sliding_window` says, every nth."""

    mlp: Literal["gated", "experts"] = "gated"

    module_names: Mapping[str, str] = field(default_factory=dict)
    """Module names that differ from Llama's."""

    image_tower: bool = False
    """`vision` in the config describes an image tower; other families ignore that key."""

    closed_form: bool = True
    """The estimate knows what this family's layer keeps for backward."""


_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_QWEN = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_PHI3 = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_DROPS = {"resid_pdrop": 0.0}
_PHI3SMALL_NAMES = {
    "qkv_proj": "query_key_value",
    "o_proj": "dense",
    "gate_up_proj": "up_proj",
    "norm": "final_layernorm",
}

FAMILIES: Mapping[str, Family] = {
    "phi3": Family(defaults=_PHI3 | _DROPS, fused=True, qkv_bias=False, output_bias=False, window="always"),
    "phi3_v": Family(
        defaults=_PHI3 | _DROPS, fused=True, qkv_bias=False, output_bias=False, window="always", image_tower=True
    ),
    "phi3small": Family(
        defaults={k: v for k, v in _PHI3.items() if k != "intermediate_size"}
        | {"hidden_act": "gegelu", "tie_word_embeddings": True},
        fused=True,
        qkv_bias=True,
        output_bias=True,
        norm_bias=True,
        module_names=_PHI3SMALL_NAMES,
    ),
    "phimoe": Family(
        defaults=_PHI3
        | {
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096 * 32,
            "attention_bias": False,
            "lm_head_bias": False,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
        },
        norm_bias=True,
        window="always",
        mlp="experts",
        closed_form=False,
    ),
    "llama": Family(defaults=_LLAMA | {"attention_bias": False, "mlp_bias": False}),
    "mistral": Family(
        defaults=_LLAMA
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        qkv_bias=False,
        output_bias=False,
        window="always",
    ),
    "qwen2": Family(defaults=_QWEN, qkv_bias=True, output_bias=False, window="flag"),
    "qwen3": Family(defaults=_QWEN | {"head_dim": 128, "attention_bias": False}, qk_norm=True, window="flag"),
    "gemma": Family(
        defaults=_LLAMA
        | {
            "vocab_size": 256000,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
            "attention_bias": False,
        },
        norm_in_fp32=True,
    ),
}
"""model_type → family. What is not here can still be traced."""
