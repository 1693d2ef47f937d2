"""`Plan` and an architecture → model, adapters and optimizer, on any device.

The trace, the probe and the training all build here, so what is predicted is the program that runs.
On "meta" nothing has storage; elsewhere weights are random, in the storage format of the real ones, or are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advisor.errors import EnvironmentLacksError, InputError, PlanError, first_line
from advisor.plan import Plan, Quantization
from advisor.training.adapters import add_adapters
from advisor.training.configuration import build_config
from advisor.training.flash import use_flash_attention
from advisor.training.loss import chunk_loss
from advisor.training.optimizer import build_optimizer
from advisor.training.packing import separate_samples

if TYPE_CHECKING:
    import torch
    from torch import nn

_INITIAL_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A model ready to train, and the parts of it that callers ask for."""

    model: Any
    """What the trainer calls: the causal LM, or PEFT's wrapper around it."""

    causal_lm: Any
    """The transformers model inside."""

    decoder: Any
    """The causal LM without its output head."""

    total_parameters: int
    """Weights as the architecture counts them; a 4-bit weight is one."""

    trainable_parameters: int
    """Weights that get a gradient."""


def build_model(plan: Plan, architecture: Mapping[str, Any], device: torch.device | str) -> BuiltModel:
    """The model of `plan` on `device`, with adapters, checkpointing and requires_grad as trained.

    Raises:
        InputError: the architecture or the adapter's target modules cannot be used.
    """
    return fill_model(build_skeleton(plan, architecture), plan, device)


def fill_model(causal_lm: Any, plan: Plan, device: torch.device | str) -> BuiltModel:
    """Give the skeleton of a model its weights on `device`, its adapters and its checkpointing.

    Raises:
        InputError: the adapter's target modules or the chunked loss do not suit this model.
    """
    import torch

    total = sum(parameter.numel() for parameter in causal_lm.parameters())
    _fill(causal_lm, plan, torch.device(device))
    return _prepare_to_train(causal_lm, plan, device, total)


def load_model(plan: Plan, path: str, device: torch.device | str, *, trust_remote_code: bool = False) -> BuiltModel:
    """The model of a folder or hub id with its own weights, from safetensors, prepared as `fill_model` does it.

    Raises:
        InputError: no safetensors there, or a model that the plan does not suit.
        EnvironmentLacksError: a package is missing, or the hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM

    try:
        causal_lm = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=_dtype(plan),
            attn_implementation=plan.attention,
            quantization_config=None if plan.quantization is None else _bitsandbytes_config(plan),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except ImportError as error:
        raise EnvironmentLacksError(
            f"{path} cannot be loaded: a package is missing.",
            why=str(error)[:300],
            hint='Install it; for attention, write attention = "sdpa" instead.',
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be loaded.",
            why=str(error)[:300],
            hint="Give a model folder or hub id whose weights are in safetensors.",
        ) from error
    return _prepare_to_train(causal_lm, plan, device, sum(_sizes(causal_lm)))


def _bitsandbytes_config(plan: Plan) -> Any:
    """What transformers quantises by while it loads; it would compute in fp32 unless told otherwise."""
    from transformers import BitsAndBytesConfig

    assert plan.quantization is not None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=plan.quantization.type,
        bnb_4bit_use_double_quant=plan.quantization.double,
        bnb_4bit_compute_dtype=_dtype(plan),
    )


def _sizes(model: nn.Module) -> Iterator[int]:
    """Elements of each parameter; two 4-bit weights share a stored byte."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        yield parameter.numel() if state is None else state.shape.numel()


def _prepare_to_train(causal_lm: Any, plan: Plan, device: torch.device | str, total: int) -> BuiltModel:
    """Everything after the weights: what is frozen, adapters, loss, checkpointing."""
    if plan.quantization is not None:
        _keep_training_format(causal_lm)
    if plan.upcast_frozen:
        _upcast_frozen(causal_lm)
    causal_lm.config.use_cache = _keeps_cache(plan)
    if plan.loss == "chunked":
        chunk_loss(causal_lm)
    if plan.packing and plan.attention == "flash_attention_2":
        separate_samples(causal_lm.base_model)
    model = causal_lm
    if plan.lora is not None:
        causal_lm.requires_grad_(False)
        if plan.gradient_checkpointing:
            causal_lm.enable_input_require_grads()
        model = add_adapters(causal_lm, plan.lora, device)
    if plan.gradient_checkpointing:
        _checkpoint(causal_lm)
    model.train()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return BuiltModel(
        model=model,
        causal_lm=causal_lm,
        decoder=causal_lm.base_model,
        total_parameters=total,
        trainable_parameters=trainable,
    )


def _keep_training_format(model: nn.Module) -> None:
    """Stop bitsandbytes from packing 4-bit weights for inference on the CPU.

    The first evaluation would do it, in place, and no gradient passes through the kernel for packed weights.
    Source: bitsandbytes 0.50 nn/modules.py (Linear4bit.forward), autograd/_functions.py (matmul_4bit).
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _keeps_cache(plan: Plan) -> bool:
    """Whether the forward builds a key-value cache, which lives as long as the outputs that hold it.

    Trainer switches it off. A hand-written loop has the model's default, which is on in training too: forward makes a
    DynamicCache wherever none is passed, and its first update copies each layer's keys and values. Checkpointed
    layers take it away again. Packed rows never have one: beside a cache transformers does not look for positions
    that restart, and attention would cross from sample to sample.
    Source: transformers Trainer (TrainingArguments.use_cache), models/qwen2/modeling_qwen2.py (Qwen2Model.forward),
    utils/generic.py (merge_with_config_defaults), cache_utils.py (DynamicLayer.update), modeling_layers.py; the same
    in 5.8.1 and 5.23.
    """
    return plan.hold_outputs and not plan.gradient_checkpointing and not plan.packing


def _dtype(plan: Plan) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, plan.dtype)
    return dtype


def build_skeleton(plan: Plan, architecture: Mapping[str, Any]) -> Any:
    """The causal LM with its parameters on meta; its buffers are computed, and so are on the CPU."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = build_config(architecture)
    # flash_attention_2 needs its package only to run; the name is set once the model exists.
    built_with = "eager" if plan.attention == "flash_attention_2" else plan.attention
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=_dtype(plan), attn_implementation=built_with)
    except ValueError as error:
        if "attention implementation" not in str(error):
            raise InputError(
                f"transformers cannot build this {config.model_type} model: {first_line(error)}",
                hint="Check the config.json against the installed transformers.",
            ) from error
        raise PlanError(
            "attention",
            f"{config.model_type} cannot use {plan.attention}",
            why=str(error)[:300],
            hint='Write attention = "eager".',
        ) from error
    except ImportError as error:
        raise EnvironmentLacksError(
            f"{config.model_type} needs a package that is not installed.", why=first_line(error), hint="Install it."
        ) from error
    if plan.attention != built_with:
        use_flash_attention(model)
    model.tie_weights()
    return model


def _fill(model: Any, plan: Plan, device: torch.device) -> None:
    """Give parameters storage on `device` in the order in which transformers loads a checkpoint.

    4-bit weights arrive in 16 bits and are quantised one at a time, as transformers does it; every Linear and Conv1D
    but the output head and the last module is. Shared parameters stay shared.
    Source: transformers core_model_loading.py (convert_and_load_state_dict_in_model, dot_natural_key),
    integrations/bitsandbytes.py (replace_with_bnb_linear), quantizers/base.py (get_keys_to_not_convert).
    """
    from torch import nn

    quantised = dict(quantised_modules(model, plan))
    made: dict[int, nn.Parameter] = {}
    for name, parameter in sorted(
        model.named_parameters(remove_duplicate=False), key=lambda item: _natural_order(item[0])
    ):
        path, _, leaf = name.rpartition(".")
        if plan.quantization is not None and leaf == "weight" and path in quantised:
            _replace(model, path, _linear_4bit(quantised[path], plan.quantization, _dtype(plan), device))
            continue
        if id(parameter) not in made:
            values = _random(parameter, device)
            if device.type != "meta" and parameter.dim() < 2:
                values.fill_(0.0 if leaf == "bias" else 1.0)
            made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(path), leaf, made[id(parameter)])
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
    if plan.quantization is not None:
        model.is_loaded_in_4bit = True
        model.is_quantized = True
        model.config._is_quantized = True


def quantised_modules(model: Any, plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    """The modules that become 4-bit, by name: every Linear and Conv1D but the output head and the last module."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if plan.quantization is None:
        return
    last = [name for name, _ in model.named_parameters()][-1].rpartition(".")[0]
    kept = (model.get_output_embeddings(), model.get_submodule(last))
    for path, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and module not in kept:
            yield path, module


def _natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Numbers before words, numbers by value."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _linear_4bit(linear: Any, quantization: Quantization, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """One Linear or Conv1D on meta → its quantised form on `device`.

    Without storage the weights and statistics come from bitsandbytes' own shape functions.
    """
    import torch
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    # The codebook is cached for the process: a storage-less one would break later real work.
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    with torch.device("meta"):
        quantized = Linear4bit(
            1,
            1,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=quantization.double,
            quant_type=quantization.type,
        )
    weight = _random(linear.weight, device)
    if not isinstance(linear, torch.nn.Linear):
        weight = weight.T.contiguous()  # a Conv1D's is (inputs, outputs)
    quantized.out_features, quantized.in_features = weight.shape
    data, state = functional.quantize_4bit(
        weight,
        compress_statistics=quantization.double,
        quant_type=quantization.type,
    )
    del weight
    quantized.weight = Params4bit(
        data,
        requires_grad=False,
        quant_state=state,
        compress_statistics=quantization.double,
        quant_type=quantization.type,
        module=quantized,
        bnb_quantized=True,
    )
    quantized.quant_state = state
    if linear.bias is not None:
        quantized.bias = linear.bias
    return quantized


def _random(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A random tensor of this shape and dtype; without values on meta."""
    import torch

    tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
    return tensor if device.type == "meta" else tensor.normal_(std=_INITIAL_STD)


def _upcast_frozen(model: Any) -> None:
    """What peft's prepare_model_for_kbit_training does: freeze, and 16-bit → fp32 unless quantised."""
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _checkpoint(causal_lm: Any) -> None:
    """`enable_checkpointing`, where the architecture has layers for it.

    Raises:
        PlanError: it has not.
    """
    if not causal_lm.supports_gradient_checkpointing:
        raise PlanError(
            "gradient_checkpointing",
            f"{causal_lm.config.model_type} has no layers that can be checkpointed",
            hint="Write gradient_checkpointing = false.",
        )
    enable_checkpointing(causal_lm)


def enable_checkpointing(model: Any) -> None:
    """Non-reentrant checkpointing of every layer; the method was renamed in transformers 5.2x."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


__all__ = [
    "BuiltModel",
    "build_config",
    "build_model",
    "build_optimizer",
    "build_skeleton",
    "enable_checkpointing",
    "fill_model",
    "load_model",
    "quantised_modules",
]
