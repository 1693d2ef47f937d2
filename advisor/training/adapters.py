"""LoRA's adapters around a causal LM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from advisor.errors import PlanError, first_line
from advisor.plan import LoraSettings

if TYPE_CHECKING:
    import torch
    from torch import nn


def add_adapters(model: Any, lora: LoraSettings, device: torch.device | str) -> Any:
    """PEFT's LoRA around the model; adapters are fp32 by PEFT's default.

    Raises:
        PlanError: none of the target modules exists in this model, or PEFT refuses one.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules
    # Of the model as it is: PEFT stops midway.
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if is_product(module)})
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=_never_wrapped(model) if targets == "all-linear" else None,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.device(device):
            return get_peft_model(model, config)
    except ValueError as error:
        # "... not found in the base model". Source: peft tuners/tuners_utils.py (inject_adapter).
        nothing = "found" in str(error)
        raise PlanError(
            "lora.target_modules",
            "no module of this model matches" if nothing else "PEFT refuses this model's",
            why=first_line(error),
            hint=f"The Linear modules of this model are {', '.join(names)}.",
        ) from error


def is_product(module: nn.Module) -> bool:
    """Whether a module is a matrix product: a Linear, or GPT-2's Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _never_wrapped(model: nn.Module) -> list[str] | None:
    """Linear modules that no adapter can go around, though PEFT's "all-linear" takes them.

    Those whose result is no product with their weight, such as a router that returns what it chose; and those whose
    weight a fused kernel reads past the module, as Mamba's does. PEFT refuses the second kind only where it meets them.
    """
    products = [(name, module) for name, module in model.named_modules() if is_product(module)]
    return [name for name, module in products if _has_other_result(module) or _is_refused(name, model)] or None


def _has_other_result(module: Any) -> bool:
    """Whether a model's own class makes of one row anything but a row of its outputs."""
    import torch

    own = type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
    if not own or not isinstance(module, torch.nn.Linear):
        return False
    try:
        with torch.no_grad():
            result = module(module.weight.new_zeros(1, 1, module.in_features))
    except (RuntimeError, ValueError, TypeError, LookupError):
        return True
    return not isinstance(result, torch.Tensor) or result.shape != (1, 1, module.out_features)


def _is_refused(name: str, model: Any) -> bool:
    """Source: peft tuners/tuners_utils.py (_check_lora_target_modules_mamba)."""
    from peft import LoraConfig

    try:
        from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
    except ImportError:
        return False
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False
