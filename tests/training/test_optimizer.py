"""The optimizer of a plan, and stepping in backward: the same training, one gradient at a time."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from advisor.training.build import build_model, build_optimizer
from advisor.training.optimizer import DEFAULT_LEARNING_RATE, learning_rate_of
from advisor.training.step import Step, make_batch, settings_of

OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]


@pytest.fixture(autouse=True)
def _paged_states_on_the_cpu() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
        yield


def run(plan: Any, architecture: dict[str, Any], steps: int) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    built = build_model(plan, architecture, "cpu")
    optimizer = build_optimizer(plan, built.model)
    step = Step(built.model, optimizer, settings_of(plan))
    batch = make_batch(plan, architecture["vocab_size"], "cpu")
    for _ in range(steps):
        step.run([lambda: batch])
    return built.model, optimizer


def test_a_plan_says_its_learning_rate_and_weight_decay(
    method: str, make_plan: Any, architecture: dict[str, Any]
) -> None:
    for name in OPTIMIZERS:
        plan = make_plan(method, optimizer=name, training={"learning_rate": 3e-4, "weight_decay": 0.1})
        decayed, others = build_optimizer(plan, build_model(plan, architecture, "cpu").model).param_groups
        assert (decayed["lr"], others["lr"]) == (3e-4, 3e-4), name
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0), name
    assert learning_rate_of(make_plan(method)) == DEFAULT_LEARNING_RATE[method]  # type: ignore[index]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stepping_in_backward_trains_as_stepping_after_it(
    name: str, make_plan: Any, architecture: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without clipping both do the same arithmetic, so the weights are equal and not only close.
    monkeypatch.setattr("advisor.training.step.MAX_GRADIENT_NORM", float("inf"))
    fields = {"optimizer": name, "training": {"learning_rate": 1e-2, "weight_decay": 0.1}}
    after, _ = run(make_plan("full", **fields), architecture, steps=3)
    within, _ = run(make_plan("full", optimizer_in_backward=True, **fields), architecture, steps=3)
    for (path, expected), (_, found) in zip(after.named_parameters(), within.named_parameters(), strict=True):
        assert torch.equal(found, expected), path


@pytest.mark.parametrize("tied", [False, True])
def test_no_more_than_one_gradient_stands(tied: bool, make_plan: Any, architecture: dict[str, Any]) -> None:
    plan = make_plan("full", optimizer_in_backward=True)
    built = build_model(plan, {**architecture, "tie_word_embeddings": tied}, "cpu")
    standing: list[int] = []

    def count(_: torch.Tensor) -> None:
        standing.append(sum(p.grad is not None for p in built.model.parameters()))

    for parameter in built.model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    step = Step(built.model, build_optimizer(plan, built.model), settings_of(plan))
    step.run([lambda: make_batch(plan, 512, "cpu")])
    assert standing == [1] * len(list(built.model.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_state_round_trips_and_a_scheduler_drives_it(
    name: str, make_plan: Any, architecture: dict[str, Any]
) -> None:
    plan = make_plan("full", optimizer=name, optimizer_in_backward=True, training={"learning_rate": 1e-2})
    model, optimizer = run(plan, architecture, steps=2)
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    batch = make_batch(plan, architecture["vocab_size"], "cpu")

    def two_more_steps(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            # The steps of backward are none that a scheduler could have counted.
            warnings.filterwarnings("error")
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            for expected in (1e-2, 5e-3):
                assert [group["lr"] for group in optimizer.param_groups] == [expected] * 2
                Step(model, optimizer, settings_of(plan)).run([lambda: batch])
                scheduler.step()
        found: dict[str, torch.Tensor] = copy.deepcopy(model.state_dict())
        return found

    torch.manual_seed(1)
    expected = two_more_steps(model, optimizer)
    fresh = build_model(plan, architecture, "cpu").model
    fresh.load_state_dict(weights)
    resumed = build_optimizer(plan, fresh)
    resumed.load_state_dict(states)
    for path, found in two_more_steps(fresh, resumed).items():
        assert torch.equal(found, expected[path]), path
