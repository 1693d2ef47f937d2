"""`Plan` and a model → the optimizer that the trace, the probe and the training step with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from advisor.plan import Method, Plan

if TYPE_CHECKING:
    import torch

_NOT_DECAYED = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")

DEFAULT_LEARNING_RATE: Mapping[Method, float] = {"full": 1e-5, "lora": 2e-4, "qlora": 2e-4}
"""Peak learning rate of a method whose plan names none.

Adapters: 2e-4, with which the LoRA paper tuned GPT-2 and GPT-3 and the QLoRA paper models of 7 and 13 billion
parameters. Every weight: 1e-5, within the 5e-6 to 2e-5 that published full fine-tunes of instruction models of a
few billion parameters used, and a tenth to a twentieth of LoRA's, as comparisons of the two found best.
Source: Hu et al. 2021 (arXiv 2106.09685, appendix D); Dettmers et al. 2023 (arXiv 2305.14314, appendix B); Taori et
al. 2023 (Stanford Alpaca: 2e-5); Schulman et al. 2025, "LoRA Without Regret".
"""


def learning_rate_of(plan: Plan) -> float:
    """The peak learning rate: the plan's, or its method's default."""
    chosen = plan.training.learning_rate
    return DEFAULT_LEARNING_RATE[plan.method] if chosen is None else chosen


def build_optimizer(plan: Plan, model: Any) -> torch.optim.Optimizer:
    """The optimizer of `plan` over the trainable parameters, in Trainer's two groups.

    With `optimizer_in_backward` it hooks every parameter, and backward steps them.
    Trainer would keep the 8-bit states of embeddings in fp32; this does not.

    Source: transformers' Trainer.create_optimizer and trainer_optimizer.py.
    """
    import torch

    groups = parameter_groups(model, plan.training.weight_decay)
    rate = learning_rate_of(plan)
    makers: Mapping[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw_torch": lambda: torch.optim.AdamW(groups, lr=rate),
        "adamw_torch_fused": lambda: torch.optim.AdamW(groups, lr=rate, fused=True),
        "adamw_bnb_8bit": lambda: _bitsandbytes_adamw(groups, rate, bits=8, paged=False),
        "adamw_8bit": lambda: _bitsandbytes_adamw(groups, rate, bits=8, paged=False),
        "paged_adamw_32bit": lambda: _bitsandbytes_adamw(groups, rate, bits=32, paged=True),
        "paged_adamw_8bit": lambda: _bitsandbytes_adamw(groups, rate, bits=8, paged=True),
    }
    optimizer = makers[plan.optimizer]()
    if not plan.optimizer_in_backward:
        return optimizer
    from advisor.training.in_backward import SteppedInBackward

    return SteppedInBackward(optimizer)


def parameter_groups(model: Any, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, as Trainer groups them."""
    from torch import nn
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = set(get_parameter_names(model, [nn.LayerNorm], list(_NOT_DECAYED)))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]


def _bitsandbytes_adamw(groups: list[dict[str, Any]], rate: float, *, bits: int, paged: bool) -> torch.optim.Optimizer:
    from advisor.training.paged_adamw import PagedAdamW

    return PagedAdamW(  # type: ignore[no-untyped-call]
        groups, lr=rate, weight_decay=0.0, optim_bits=bits, is_paged=paged
    )
