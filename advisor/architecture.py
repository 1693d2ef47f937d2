"""What memory depends on in a decoder-only model: its numbers and its linear modules.

An `Architecture` is made from a config.json's own keys, whether they stand in a profile or in a file, and from what
`FAMILIES` knows of its model_type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from advisor.errors import InputError, UnsupportedError, shown
from advisor.families import FAMILIES, Family

_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**21,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**13,
    "max_position_embeddings": 2**31,
    "num_local_experts": 2**12,
}
_VISION_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
_LARGEST_VISION = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One linear module of a decoder layer."""

    name: str
    """Its own name, as LoRA targets are spelled: "qkv_proj"."""

    path: str
    """Its path inside the layer: "self_attn.qkv_proj"."""

    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of the weight matrix."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """Elements of weight and bias."""
        return self.weights + (self.outputs if self.bias else 0)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The numbers of a decoder-only model, checked, with the family's defaults filled in."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    tied: bool
    """Input and output embedding share one matrix."""

    window: int | None
    """Sliding-window length, where any layer uses one."""

    window_layers: int
    """How many layers use it."""

    rotary_dim: int
    attention_bias: bool
    mlp_bias: bool
    head_bias: bool
    residual_dropout: float
    attention_dropout: float
    experts: int
    """Experts a layer; 0 for a dense model."""

    config: Mapping[str, Any]
    """The keys that were given, for building the model."""

    @property
    def family(self) -> Family:
        """How its layers are laid out."""
        return FAMILIES[self.model_type]

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (and of all value heads)."""
        return self.kv_heads * self.head_dim

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linear modules of one layer, in the order of the forward pass."""
        return _attention_linears(self) + _mlp_linears(self)

    @cached_property
    def layer_modules(self) -> Mapping[str, int]:
        """Parameters of each module of one layer, by path."""
        family, hidden = self.family, self.hidden_size
        modules = {linear.path: linear.parameters for linear in self.linears}
        if family.qk_norm:
            modules |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        modules |= dict.fromkeys(family.layer_norms, hidden * (2 if family.norm_bias else 1))
        if self.experts:
            modules["mlp.router"] = self.experts * hidden
            modules["mlp.experts"] = self.experts * 3 * hidden * self.intermediate_size
        return modules

    @cached_property
    def outer_modules(self) -> Mapping[str, int]:
        """Parameters of each module outside the layers; a tied head counts nothing."""
        embedding = self.vocab_size * self.hidden_size
        norm = self.family.module_names.get("norm", "norm")
        modules = {
            "model.embed_tokens": embedding,
            f"model.{norm}": self.hidden_size * (2 if self.family.norm_bias else 1),
            "lm_head": 0 if self.tied else embedding,
        }
        if self.head_bias:
            modules["lm_head"] += self.vocab_size
        vision = self.config.get("vision")
        if vision and self.family.image_tower:
            modules |= vision_modules(vision, self.hidden_size)
        return modules

    @cached_property
    def parameters(self) -> int:
        """All parameters, a shared one counted once."""
        return sum(self.outer_modules.values()) + self.layers * sum(self.layer_modules.values())

    @property
    def vision_parameters(self) -> int:
        """Parameters of the image tower, which stays frozen."""
        return sum(n for name, n in self.outer_modules.items() if name.startswith("model.vision"))


def _attention_linears(arch: Architecture) -> tuple[Linear, ...]:
    family, hidden = arch.family, arch.hidden_size
    bias = arch.attention_bias if family.qkv_bias is None else family.qkv_bias
    out_bias = arch.attention_bias if family.output_bias is None else family.output_bias
    widths = {"q_proj": arch.query_size, "k_proj": arch.kv_size, "v_proj": arch.kv_size}
    if family.fused:
        widths = {family.module_names.get("qkv_proj", "qkv_proj"): sum(widths.values())}
    output = family.module_names.get("o_proj", "o_proj")
    return (
        *(
            Linear(name=name, path=f"self_attn.{name}", inputs=hidden, outputs=width, bias=bias)
            for name, width in widths.items()
        ),
        Linear(name=output, path=f"self_attn.{output}", inputs=arch.query_size, outputs=hidden, bias=out_bias),
    )


def _mlp_linears(arch: Architecture) -> tuple[Linear, ...]:
    if arch.experts:
        return ()
    family, hidden, inner = arch.family, arch.hidden_size, arch.intermediate_size
    bias = arch.mlp_bias or family.norm_bias
    widths = {"gate_proj": inner, "up_proj": inner}
    if family.fused:
        widths = {family.module_names.get("gate_up_proj", "gate_up_proj"): 2 * inner}
    return (
        *(
            Linear(name=name, path=f"mlp.{name}", inputs=hidden, outputs=width, bias=bias)
            for name, width in widths.items()
        ),
        Linear(name="down_proj", path="mlp.down_proj", inputs=inner, outputs=hidden, bias=bias),
    )


def vision_modules(vision: Mapping[str, int], hidden_size: int) -> dict[str, int]:
    """Parameters of the image tower of Phi-3-vision: CLIP ViT, a two-layer projection, two separators.

    Source: image_embedding_phi3_v.py of microsoft/Phi-3-vision-128k-instruct; CLIPVisionModel of transformers.
    """
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    positions = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    merged = 4 * width
    return {
        "model.vision_embed_tokens.embeddings": width * 3 * vision["patch_size"] ** 2 + width + positions * width,
        "model.vision_embed_tokens.norms": 4 * width,
        "model.vision_embed_tokens.layers": vision["num_hidden_layers"] * block,
        "model.vision_embed_tokens.img_projection": merged * hidden_size + hidden_size + hidden_size**2 + hidden_size,
        "model.vision_embed_tokens.separators": 2 * merged,
    }


def architecture_from_config(config: Mapping[str, Any], *, origin: str) -> Architecture:
    """The architecture that a config.json describes.

    Args:
        config: its keys; no more than `model_type` and the numbers are needed.
        origin: what to call it in errors.

    Raises:
        InputError: not a decoder-only causal language model, or numbers that no model can have.
        UnsupportedError: a causal language model whose layer the closed form does not know.
    """
    model_type = require_causal(config, origin=origin)
    if model_type not in FAMILIES:
        raise UnsupportedError(
            f"{origin}: the closed form does not know the layers of {model_type[:60]!r}.",
            why=f"It knows {', '.join(FAMILIES)}.",
            hint="If it is a decoder-only model that transformers can build, trace it: phi3-advise trace --plan FILE",
        )
    return _checked(config, model_type, origin)


def require_causal(config: Mapping[str, Any], *, origin: str) -> str:
    """The model_type of a config.json that says nothing against being a decoder-only causal language model.

    Raises:
        InputError: it has no model_type, or names an encoder or another head.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError(
            f"{origin} has no model_type.",
            why="Without it nobody can tell which kind of model the numbers describe.",
            hint='A config.json needs "model_type" (such as "phi3") and the sizes.',
        )
    classes = config.get("architectures")
    named = [c for c in classes if isinstance(c, str)] if isinstance(classes, list) else []
    other_head = bool(named) and not any(c.endswith(("ForCausalLM", "LMHeadModel")) for c in named)
    if config.get("is_encoder_decoder") is True or other_head:
        raise InputError(
            f"{origin} is not a decoder-only causal language model.",
            why=f"It says {', '.join(named)[:120] or model_type!r}"
            + (" with an encoder." if config.get("is_encoder_decoder") is True else "."),
            hint="phi3-advise fine-tunes causal language models: Phi-3, Phi-4, Llama, Mistral, Qwen, Gemma.",
        )
    return model_type


_NULL_MEANS_SOMETHING = ("sliding_window", "num_key_value_heads")
"""Keys whose null is no default: no window, and as many key-value heads as heads."""


def _wrong(origin: str, key: str, value: object, needed: str) -> InputError:
    hint = "Check the file against the model's own config.json."
    return InputError(f"{origin}: {key} = {shown(value, 40)} {needed}.", hint=hint)


def _check_vision(vision: object, origin: str) -> None:
    if vision is None:
        return
    sizes = [vision.get(key) for key in _VISION_KEYS] if isinstance(vision, Mapping) else [None]
    if any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= _LARGEST_VISION for n in sizes):
        raise InputError(
            f"{origin}: vision = {shown(vision, 40)} describes no image tower.",
            hint=f"It takes {', '.join(_VISION_KEYS)}, whole numbers from 1 to {_LARGEST_VISION:,}.",
        )


def _checked(config: Mapping[str, Any], model_type: str, origin: str) -> Architecture:
    family = FAMILIES[model_type]
    values = {**family.defaults, **{k: v for k, v in config.items() if v is not None or k in _NULL_MEANS_SOMETHING}}

    def number(key: str, default: int | None = None) -> int:
        value = default if values.get(key) is None else values[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST[key]:
            raise _wrong(origin, key, value, f"is not a whole number from 1 to {_LARGEST[key]:,}")
        return value

    def flag(key: str) -> bool:
        value = values[key] if key in family.defaults else False
        if not isinstance(value, bool):
            raise _wrong(origin, key, value, "is neither true nor false")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    kv_heads = number("num_key_value_heads", heads)
    head_dim = number("head_dim", max(1, hidden // heads))
    if heads % kv_heads or ("head_dim" not in values and hidden % heads):
        raise InputError(
            f"{origin}: {heads} attention heads do not divide into {kv_heads} key-value heads of {hidden} features.",
            hint="Check num_attention_heads, num_key_value_heads, hidden_size and head_dim.",
        )
    layers = number("num_hidden_layers")
    window, window_layers = _window(values, family, layers, origin)
    experts = number("num_local_experts") if family.mlp == "experts" else 0
    if family.image_tower:
        _check_vision(config.get("vision"), origin)
    return Architecture(
        model_type=model_type,
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size", values.get("ff_intermediate_size")),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=number("max_position_embeddings"),
        tied=flag("tie_word_embeddings"),
        window=window,
        window_layers=window_layers,
        rotary_dim=_rotary_dim(values, head_dim, origin),
        attention_bias=flag("attention_bias"),
        mlp_bias=flag("mlp_bias"),
        head_bias=flag("lm_head_bias"),
        residual_dropout=_probability(values, "resid_pdrop", origin),
        attention_dropout=_probability(values, "attention_dropout", origin),
        experts=experts,
        config=config,
    )


def _window(values: Mapping[str, Any], family: Family, layers: int, origin: str) -> tuple[int | None, int]:
    """Window length and the number of layers that use it."""
    window = values.get("sliding_window")
    if family.window == "never" or window is None:
        return None, 0
    if isinstance(window, bool) or not isinstance(window, int) or not 0 <= window <= 2**31:
        raise _wrong(origin, "sliding_window", window, "is not a number of tokens")
    if family.window == "always":
        return window, layers
    wanted, full = values["use_sliding_window"], values["max_window_layers"]
    if not isinstance(wanted, bool):
        raise _wrong(origin, "use_sliding_window", wanted, "is neither true nor false")
    if isinstance(full, bool) or not isinstance(full, int):
        raise _wrong(origin, "max_window_layers", full, "is not a number of layers")
    if not wanted:
        return None, 0
    using = max(0, layers - max(0, full))
    return (window, using) if using else (None, 0)


def _rotary_dim(values: Mapping[str, Any], head_dim: int, origin: str) -> int:
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    nested = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    factor = values.get("partial_rotary_factor", nested if nested is not None else 1.0)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
        raise _wrong(origin, "partial_rotary_factor", factor, "is not a share of the head")
    return int(head_dim * factor)


def _probability(values: Mapping[str, Any], key: str, origin: str) -> float:
    value = values.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise _wrong(origin, key, value, "is not a probability")
    return float(value)


__all__ = [
    "FAMILIES",
    "Architecture",
    "Family",
    "Linear",
    "architecture_from_config",
    "require_causal",
    "vision_modules",
]
