"""What is not trained, and why: a run that would learn nothing, something else, or far too slowly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from advisor.errors import EnvironmentLacksError, InputError, PlanError
from advisor.plan import Plan
from advisor.training.build import BuiltModel
from advisor.training.checkpoints import Checkpoint
from advisor.training.plan_refusals import refuse_products_in_fp32, refuse_scaling_on_the_processor

_FREE_TO_CHANGE = ("epochs", "max_steps")
"""Hyperparameters that a resumed run may have others of: how long it goes on."""


def usable_device(arguments: Any, asked: str, plan: Plan) -> torch.device:
    """Where Trainer trains.

    Raises:
        EnvironmentLacksError: that is not what was asked for.
        PlanError: the plan's mixed precision does not exist there.
    """
    device: torch.device = arguments.device
    # More would be DataParallel: one process trains on one device.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if device.type != torch.device(asked).type:
        raise EnvironmentLacksError(
            f"There is no {asked} here: torch would train on {device.type}.",
            hint=f"Install a torch that knows this device, or say --device {device.type}.",
        )
    refuse_scaling_on_the_processor(plan, device.type)
    return device


def refuse_padding_with_the_end(tokenizer: Any) -> None:
    """A padding token that ends texts is masked wherever it stands, and the model never learns to stop.

    Raises:
        InputError: it is, or there is none.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError(
            "The tokenizer pads with the token that ends a text.",
            why="As padding it is masked, so the model would never learn to stop.",
            hint="Give the tokenizer a padding token of its own, such as <unk>.",
        )


def refuse_slow_arithmetic(plan: Plan, built: BuiltModel) -> None:
    """4-bit weights compute in the plan's dtype; bitsandbytes' default is fp32, and it takes the dtype of its inputs.

    Raises:
        PlanError: they would compute in fp32 though the plan does not say so.
    """
    if plan.quantization is None or plan.dtype == "float32":
        return
    from bitsandbytes.nn.modules import Linear4bit

    dtype = getattr(torch, plan.dtype)
    found = {module.compute_dtype for module in built.causal_lm.modules() if isinstance(module, Linear4bit)}
    if found - {dtype}:
        raise PlanError("dtype", f"the 4-bit weights compute in {found}, not in {plan.dtype}")
    refuse_products_in_fp32(plan)


def refuse_another_run(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> None:
    """A checkpoint goes on only as the run that wrote it: other data or settings have another order and meaning.

    Raises:
        InputError: with what differs.
    """
    before, now = (_comparable(one) for one in (checkpoint.facts, facts))
    different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if different:
        raise InputError(
            f"{checkpoint.path} was written by another run: {', '.join(different)} differ.",
            why="With them the rows would come in another order, or the states would mean something else.",
            hint="Resume with the run folder's own plan.toml and the same data, or start anew in another folder.",
        )


def _comparable(facts: Mapping[str, Any]) -> dict[str, Any]:
    plan = dict(facts.get("plan", {}))
    training = {f"training.{name}": value for name, value in plan.pop("training", {}).items()}
    for name in _FREE_TO_CHANGE:
        training.pop(f"training.{name}", None)
    for name in ("gpu", "model"):
        plan.pop(name, None)
    return {**plan, **training, "data": facts.get("data")}
