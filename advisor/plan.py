"""`Plan`: one frozen value that says everything about a training run.

Field names are those of the plan file (TOML) and of the JSON output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from advisor.errors import PlanError, shown
from advisor.hyperparameters import DEFAULT_HYPERPARAMETERS, Hyperparameters
from advisor.plan_checks import check_bool, check_choice, check_int, check_text

Method = Literal["full", "lora", "qlora"]
Dtype = Literal["bfloat16", "float16", "float32"]
Autocast = Literal["bfloat16", "float16", "none"]
Padding = Literal["none", "longest"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
Loss = Literal["standard", "chunked"]
QuantizationType = Literal["nf4", "fp4"]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
]

METHODS: tuple[Method, ...] = get_args(Method)
METHOD_LABELS: dict[Method, str] = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
ITEMSIZE: Mapping[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes an element."""

_FEWEST_PACKED_SAMPLES = 16
_SHORTEST_PACKED_TOKENS = 64


def most_packed_samples(seq_len: int) -> int:
    """Samples in a packed row at most: one for every 64 tokens, and 16 of however few.

    The packer begins another row rather than take more, so that memory is known before the data is:
    variable-length attention makes room for 128 tokens more with each (flash_attn/flash_api.cpp, mha_varlen_bwd).
    """
    return max(_FEWEST_PACKED_SAMPLES, seq_len // _SHORTEST_PACKED_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How bitsandbytes stores the frozen weights."""

    bits: int = 4
    """Bits a weight: 4."""

    type: QuantizationType = "nf4"
    """The sixteen values a 4-bit weight can take."""

    double: bool = True
    """Whether the scales are themselves quantised to 8 bits."""

    def __post_init__(self) -> None:
        if self.bits != 4 or not isinstance(self.bits, int):
            raise PlanError(
                "quantization.bits",
                f"{shown(self.bits)} bits are not supported",
                why="QLoRA is defined on 4-bit weights, and that is what the trainer builds.",
                hint='Write bits = 4, or method = "lora" for unquantised weights.',
            )
        check_choice("quantization.type", self.type, get_args(QuantizationType))
        check_bool("quantization.double", self.double)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The adapters of LoRA and QLoRA."""

    rank: int = 16
    """Inner dimension of the two low-rank matrices."""

    alpha: int = 16
    """The update is scaled by alpha / rank."""

    dropout: float = 0.0
    """Probability that an element of the adapter's input is dropped."""

    target_modules: str | tuple[str, ...] = "all-linear"
    """"all-linear" (every Linear but the output head, and what no adapter goes around), or names of Linear modules."""

    def __post_init__(self) -> None:
        check_int("lora.rank", self.rank)
        check_int("lora.alpha", self.alpha)
        dropout = self.dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise PlanError(
                "lora.dropout", f"{shown(dropout)} is not a probability from 0 up to 1", hint="Write 0.05, say."
            )
        targets = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        if not isinstance(targets, tuple):
            raise PlanError(
                "lora.target_modules",
                f"{shown(targets)} is neither a name nor a list of names",
                hint='Write target_modules = "all-linear", or a list such as ["qkv_proj", "o_proj"].',
            )
        for target in targets:
            check_text("lora.target_modules", target)
        if not targets or len(targets) > 256:
            raise PlanError(
                "lora.target_modules",
                "no module is named" if not targets else f"{len(targets)} names are too many",
                hint='Write target_modules = "all-linear", or a list such as ["qkv_proj", "o_proj"].',
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything about one training run that memory, speed or the trainer depends on."""

    model: str
    """A profile's name, the path of a config.json, or a hub id."""

    method: Method
    """What is trained: every weight, or low-rank adapters over 16-bit or 4-bit weights."""

    dtype: Dtype = "bfloat16"
    """Storage of the weights that are not quantised, and what 4-bit weights compute in."""

    autocast: Autocast = "none"
    """The dtype that mixed precision computes in."""

    quantization: Quantization | None = None
    """4-bit storage of the frozen weights; QLoRA only."""

    upcast_frozen: bool = False
    """Store every 16-bit tensor that is not quantised as fp32 (PEFT's kbit preparation)."""

    lora: LoraSettings | None = None
    """The adapters; LoRA and QLoRA only."""

    optimizer: Optimizer = "adamw_torch_fused"
    """Spelled as transformers' OptimizerNames."""

    micro_batch: int = 1
    """Sequences in one forward."""

    gradient_accumulation: int = 1
    """Micro-batches to an optimizer step."""

    seq_len: int = 2048
    """Tokens in the longest sequence."""

    padding: Padding = "none"
    """"none": every sequence is full and there is no mask; "longest": the worst case has one."""

    gradient_checkpointing: bool = True
    """Keep one hidden state a layer and recompute the rest in backward."""

    attention: Attention = "sdpa"
    """Spelled as transformers' attn_implementation."""

    loss: Loss = "standard"
    """"standard": all logits at once; "chunked": the head and the loss a chunk at a time."""

    hold_outputs: bool = False
    """The caller keeps the logits through backward, as many hand-written loops do."""

    packing: bool = False
    """Rows are several samples end to end: positions restart, and attention stays inside a sample."""

    optimizer_in_backward: bool = False
    """Step each parameter as its gradient arrives, so gradients never stand all at once; full fine-tuning only."""

    training: Hyperparameters = DEFAULT_HYPERPARAMETERS
    """What the result depends on and the memory does not."""

    gpu: str | None = None
    """The GPU profile whose kernels and context apply; None is the detected GPU."""

    def __post_init__(self) -> None:
        check_text("model", self.model)
        if self.gpu is not None:
            check_text("gpu", self.gpu)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in ("micro_batch", "gradient_accumulation", "seq_len"):
            check_int(name, getattr(self, name))
        for name in ("upcast_frozen", "gradient_checkpointing", "hold_outputs", "packing", "optimizer_in_backward"):
            check_bool(name, getattr(self, name))
        for name, kind in _TABLES.items():
            allowed = (kind,) if name == "training" else (kind, type(None))
            if not isinstance(getattr(self, name), allowed):
                raise PlanError(
                    name, f"{shown(getattr(self, name))} is not a table", hint="Leave it out, or give its settings."
                )
        _check_method(self)
        _check_precision(self)
        _check_combinations(self)

    @property
    def tokens(self) -> int:
        """Tokens in one micro-batch."""
        return self.micro_batch * self.seq_len

    @property
    def samples(self) -> int:
        """Sequences in one micro-batch that attention keeps apart; the padding of a packed row counts as one more."""
        return self.micro_batch * (most_packed_samples(self.seq_len) + 1 if self.packing else 1)

    @property
    def effective_batch(self) -> int:
        """Sequences to an optimizer step, on one GPU."""
        return self.micro_batch * self.gradient_accumulation

    @property
    def saved_dtype(self) -> Dtype:
        """The dtype of the model that a full fine-tuning leaves: fp32 weights under autocast are saved in 16 bits."""
        return self.autocast if self.dtype == "float32" and self.autocast != "none" else self.dtype


_CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "dtype": get_args(Dtype),
    "autocast": get_args(Autocast),
    "optimizer": get_args(Optimizer),
    "padding": get_args(Padding),
    "attention": get_args(Attention),
    "loss": get_args(Loss),
}


_TABLES: dict[str, type[Any]] = {"quantization": Quantization, "lora": LoraSettings, "training": Hyperparameters}


def _check_method(plan: Plan) -> None:
    """Settings that a method needs or excludes."""
    if (plan.lora is None) != (plan.method == "full"):
        raise PlanError(
            "lora",
            "full fine-tuning has no adapters" if plan.lora else f"{plan.method} needs adapter settings",
            hint='Leave the lora table out, or choose method = "lora" or "qlora".'
            if plan.lora
            else "Add lora = { rank = 16 }.",
        )
    if (plan.quantization is None) != (plan.method != "qlora"):
        raise PlanError(
            "quantization",
            "only qlora quantises its weights" if plan.quantization else "qlora needs it",
            hint='Choose method = "qlora", or leave the quantization table out.'
            if plan.quantization
            else "Add quantization = { bits = 4 }.",
        )
    if plan.upcast_frozen and plan.method != "qlora":
        raise PlanError(
            "upcast_frozen",
            "only means something for qlora",
            why="It is what PEFT's prepare_model_for_kbit_training does to a quantised model.",
            hint='For fp32 weights write dtype = "float32".',
        )


def _check_precision(plan: Plan) -> None:
    """Combinations of number formats that torch refuses or that lose training silently."""
    if plan.autocast != "none" and plan.dtype != "float32" and plan.autocast != plan.dtype:
        raise PlanError(
            "autocast",
            f"{plan.autocast} over {plan.dtype} weights",
            why="The two 16-bit formats would be converted into each other at every operation.",
            hint=f'Write autocast = "{plan.dtype}".',
        )
    if plan.method == "full" and plan.dtype == "float16":
        raise PlanError(
            "dtype",
            "full fine-tuning cannot train float16 weights",
            why='Gradient scaling refuses fp16 gradients ("Attempting to unscale FP16 gradients").',
            hint='Write dtype = "float32" with autocast = "float16".',
        )
    if plan.attention == "flash_attention_2" and plan.dtype == "float32" and plan.autocast == "none":
        raise PlanError(
            "attention",
            "flash_attention_2 computes in 16 bits only",
            hint='Use attention = "sdpa", or a 16-bit dtype or autocast.',
        )


def _check_combinations(plan: Plan) -> None:
    """Ways of stepping and batching that exclude each other."""
    if plan.packing and plan.padding != "none":
        raise PlanError(
            "packing", "packed rows are full, so nothing is padded", hint='Write padding = "none", or packing = false.'
        )
    if not plan.optimizer_in_backward:
        return
    refusals = {
        "only full fine-tuning has gradients that are worth it": plan.method != "full",
        "gradients are gone before a second micro-batch could add to them": plan.gradient_accumulation > 1,
        "gradient scaling has to see all gradients before it steps": plan.autocast == "float16",
    }
    for why, broken in refusals.items():
        if broken:
            raise PlanError(
                "optimizer_in_backward",
                why,
                hint="Write optimizer_in_backward = false, or method = full, gradient_accumulation = 1 and bfloat16.",
            )


def plan_from_fields(values: Mapping[str, Any], base: Plan | None = None) -> Plan:
    """A plan from the plain values of a plan file; what it leaves out comes from `base`.

    Raises:
        PlanError: an unknown field (the nearest is offered), a wrong type or a bad value.
    """
    values = dict(values)
    _reject_unknown("", values, Plan)
    for name, kind in _TABLES.items():
        if name in values:
            inherited = getattr(base, name) if base is not None else None
            values[name] = _table(name, values[name], kind, inherited)
    if base is not None:
        return replace(base, **values)
    for name in ("model", "method"):
        if name not in values:
            raise PlanError(name, "is missing", hint=f"Add a line such as {_EXAMPLE[name]}.")
    return Plan(**values)


_EXAMPLE = {"model": 'model = "phi-3-mini-4k"', "method": 'method = "qlora"'}


def _table(name: str, value: object, kind: type[Any], inherited: Any) -> Any:
    if value is None and name != "training":
        return None
    if not isinstance(value, Mapping):
        raise PlanError(name, f"{shown(value)} is not a table", hint=f"Write {name} = {{ ... }}.")
    _reject_unknown(f"{name}.", value, kind)
    settings = dict(value)
    if isinstance(settings.get("target_modules"), list):
        settings["target_modules"] = tuple(settings["target_modules"])
    return replace(inherited, **settings) if inherited is not None else kind(**settings)


def _reject_unknown(prefix: str, values: Mapping[str, Any], kind: type[Any]) -> None:
    known = [field.name for field in fields(kind)]
    for name in values:
        if name not in known:
            from difflib import get_close_matches

            near = get_close_matches(str(name)[:60], known, n=1)
            raise PlanError(
                f"{prefix}{str(name)[:60]}",
                "is not a field of a plan",
                hint=f"Did you mean {prefix}{near[0]}?" if near else f"The fields are {', '.join(known)}.",
            )


def plan_to_fields(plan: Plan) -> dict[str, Any]:
    """The plain values of a plan, in the order of the plan file; the inverse of `plan_from_fields`."""
    values: dict[str, Any] = {}
    for field in fields(Plan):
        value = getattr(plan, field.name)
        if isinstance(value, (Quantization, LoraSettings, Hyperparameters)):
            value = {inner.name: getattr(value, inner.name) for inner in fields(value)}
            if isinstance(value.get("target_modules"), tuple):
                value["target_modules"] = list(value["target_modules"])
        values[field.name] = value
    return values


__all__ = [
    "ITEMSIZE",
    "METHODS",
    "METHOD_LABELS",
    "Attention",
    "Autocast",
    "Dtype",
    "Hyperparameters",
    "LoraSettings",
    "Loss",
    "Method",
    "Optimizer",
    "Padding",
    "Plan",
    "Quantization",
    "most_packed_samples",
    "plan_from_fields",
    "plan_to_fields",
]
