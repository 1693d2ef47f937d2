"""The step trains: the loss falls for every method, and it does what Trainer's does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from advisor.plan import Plan
from advisor.training.build import BuiltModel, build_model
from advisor.training.step import Step, make_batch, settings_of, weights_to_save, wrap_forward


def losses(plan: Plan, architecture: dict[str, Any], steps: int) -> tuple[list[float], BuiltModel, list[str]]:
    """The loss of one batch seen again and again, and the turns that the step announced."""
    torch.manual_seed(0)
    built = build_model(plan, architecture, "cpu")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(plan.autocast)
    wrap_forward(built.model, None if dtype is None else lambda: torch.autocast("cpu", dtype))
    batch = make_batch(plan, architecture["vocab_size"], "cpu")
    seen: list[float] = []

    def remember(_: Any, __: Any, output: Any) -> None:
        seen.append(output["loss"].item())

    built.model.register_forward_hook(remember)
    turns: list[str] = []
    trained = [p for p in built.model.parameters() if p.requires_grad]
    step = Step(built.model, torch.optim.AdamW(trained, lr=2e-2), settings_of(plan), turns.append)
    for _ in range(steps):
        step.run([lambda: batch] * plan.gradient_accumulation)
    step.evaluate(lambda: batch)
    return seen, built, turns


@pytest.mark.parametrize("loss", ["standard", "chunked"])
def test_the_loss_falls(method: str, loss: str, make_plan: Any, architecture: dict[str, Any]) -> None:
    seen, _, _ = losses(make_plan(method, loss=loss, hold_outputs=True), architecture, steps=8)
    assert seen[-1] < seen[0] - 0.3


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_the_loss_falls_under_autocast(autocast: str, make_plan: Any, architecture: dict[str, Any]) -> None:
    seen, _, _ = losses(make_plan("lora", autocast=autocast, hold_outputs=True), architecture, steps=8)
    assert seen[-1] < seen[0] - 0.3


def test_float16_scales_the_loss_and_bfloat16_does_not(make_plan: Any) -> None:
    assert settings_of(make_plan("lora", autocast="float16")).scales_gradients
    assert not settings_of(make_plan("lora", autocast="bfloat16")).scales_gradients


def test_turns_come_in_order_and_nothing_is_left(make_plan: Any, architecture: dict[str, Any]) -> None:
    _, built, turns = losses(make_plan("lora", gradient_accumulation=2), architecture, steps=1)
    assert turns == ["forward", "backward"] * 2 + ["optimizer step", "evaluation"]
    assert all(p.grad is None for p in built.model.parameters())
    assert built.model.training


def test_a_checkpoint_holds_the_adapters_or_every_weight(
    method: str, make_plan: Any, architecture: dict[str, Any]
) -> None:
    built = build_model(make_plan(method), architecture, "cpu")
    saved = weights_to_save(built.model)
    if method == "full":
        assert sum(t.numel() for t in saved.values()) == built.total_parameters
    else:
        assert sum(t.numel() for t in saved.values()) == built.trainable_parameters
    pointers = {p.data_ptr() for p in built.model.parameters()}
    assert all(tensor.data_ptr() in pointers for tensor in saved.values())
