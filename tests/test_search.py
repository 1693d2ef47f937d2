"""The search against trying everything: the same plan's speed, or the same least need, for far fewer evaluations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import advisor.search
from advisor.advise import Request, base_plan
from advisor.hardware import Gpu, what_if
from advisor.in_backward import largest_that
from advisor.plan import METHODS, Attention, Plan
from advisor.profiles import ModelProfile, load_gpu, load_model
from advisor.search import (
    LOSSES,
    OPTIMIZERS,
    Candidate,
    any_fits,
    at_micro_batch,
    combinations,
    divisors,
    evaluate,
    search,
    smallest_plan,
)
from advisor.units import GIB

BOTH: tuple[Attention, ...] = ("sdpa", "flash_attention_2")

CASES: list[tuple[str, str, int, int, tuple[Attention, ...]]] = [
    ("phi-3-mini-4k", "t4", 2048, 16, ("sdpa",)),
    ("phi-3-mini-4k", "t4", 512, 12, ("sdpa",)),
    ("phi-3-mini-4k", "rtx-4060-8gb", 2048, 1, ("sdpa",)),
    ("phi-3-mini-4k", "rtx-4060-8gb", 256, 16, ("sdpa",)),
    ("phi-3-mini-4k", "rtx-3080-10gb", 2048, 2, BOTH),
    ("phi-3-mini-4k", "rtx-4090", 512, 12, ("sdpa",)),
    ("phi-3-mini-4k", "v100-32gb", 512, 16, ("sdpa",)),
    ("phi-3-mini-4k", "v100-32gb", 512, 2, ("sdpa",)),
    ("phi-3-mini-4k", "a10", 64, 64, ("sdpa",)),
    ("phi-3-mini-4k", "a100-80gb", 4096, 16, BOTH),
    ("phi-3-mini-4k", "rx-7900-xtx", 1024, 12, ("sdpa",)),
    ("phi-3.5-mini", "rtx-3090", 512, 16, BOTH),
    ("phi-3.5-mini", "h100", 8192, 16, BOTH),
    ("phi-3-medium-4k", "t4", 1024, 16, ("sdpa",)),
    ("phi-3-medium-4k", "t4", 1024, 1, ("sdpa",)),
    ("phi-3-medium-4k", "t4", 512, 12, ("sdpa",)),
    ("phi-3-medium-4k", "a100-80gb", 1024, 64, BOTH),
    ("phi-3-medium-4k", "l4", 64, 4, ("sdpa",)),
    ("phi-3-small-8k", "t4", 1024, 12, ("sdpa",)),
    ("phi-3-small-8k", "rtx-4060-ti-16gb", 128, 12, ("sdpa",)),
    ("phi-4", "h100", 4096, 64, ("sdpa",)),
    ("phi-4", "a6000", 128, 16, ("sdpa",)),
    ("phi-4-mini", "t4", 2048, 16, ("sdpa",)),
    ("phi-4-mini", "a10g", 512, 12, ("sdpa",)),
    ("phi-4-mini", "rtx-5090", 2048, 2, ("sdpa",)),
    ("phi-4-mini", "rtx-2080-ti", 8192, 4, ("sdpa",)),
]
"""Grouped heads on cards without flash attention, states that spill, a few tokens, batches without accumulation."""


def everything(base: Plan, model: ModelProfile, gpu: Gpu, attentions: tuple[Attention, ...]) -> list[Candidate]:
    plans = combinations(base, attentions)
    assert len(plans) == 2 * len(LOSSES) * len(OPTIMIZERS) * len(attentions) == len(set(plans))
    sizes = [size for size in range(1, base.effective_batch + 1) if base.effective_batch % size == 0]
    return [evaluate(at_micro_batch(plan, size), model.architecture, gpu) for plan in plans for size in sizes]


@pytest.mark.parametrize(("model_name", "gpu_name", "seq_len", "batch", "attentions"), CASES)
def test_the_search_finds_what_trying_everything_finds(
    monkeypatch: pytest.MonkeyPatch,
    model_name: str,
    gpu_name: str,
    seq_len: int,
    batch: int,
    attentions: tuple[Attention, ...],
) -> None:
    model, gpu = load_model(model_name), what_if(load_gpu(gpu_name))
    request = Request(seq_len=seq_len, effective_batch=batch)
    for method in METHODS:
        base = base_plan(method, model, gpu, request)
        tried = everything(base, model, gpu, attentions)
        fitting = [candidate for candidate in tried if candidate.fit.fits]
        least = min(candidate.fit.needed_bytes for candidate in tried)
        with monkeypatch.context() as patch:
            evaluations = counted(patch)
            found = search(base, model.architecture, gpu, attentions=attentions)
        assert any_fits(base, model.architecture, gpu, attentions=attentions) == bool(fitting)
        if found.plan.optimizer_in_backward:
            assert not fitting
            continue
        assert found.fit.fits == bool(fitting)
        if fitting:
            assert found.seconds == min(candidate.seconds for candidate in fitting)
        else:
            assert found.fit.needed_bytes == least
        assert sum(not plan.optimizer_in_backward for plan in evaluations) <= 0.6 * len(tried)
        assert smallest_plan(base, model.architecture, gpu, attentions=attentions).fit.needed_bytes == least


IN_BACKWARD: list[tuple[str, str, int, int, tuple[Attention, ...]]] = [
    ("phi-3-mini-4k", "rtx-4080", 2048, 16, ("sdpa",)),
    ("phi-3-mini-4k", "rtx-3080-10gb", 2048, 4, BOTH),
    ("phi-3-mini-4k", "rtx-4070-ti", 128, 12, ("sdpa",)),
    ("phi-3-mini-4k", "rtx-4060-8gb", 2048, 4, ("sdpa",)),
    ("phi-3-mini-4k", "t4", 512, 4, ("sdpa",)),
    ("phi-4-mini", "rtx-4070-ti", 2048, 16, ("sdpa",)),
    ("phi-3-medium-4k", "a100-40gb", 1024, 16, ("sdpa",)),
    ("phi-3-medium-4k", "a6000", 2048, 8, BOTH),
]
"""Cards on which no ordinary full fine-tune fits: some are large enough to step in backward, some are not."""


@pytest.mark.parametrize(("model_name", "gpu_name", "seq_len", "batch", "attentions"), IN_BACKWARD)
def test_where_nothing_ordinary_fits_full_fine_tuning_steps_in_backward_with_the_largest_batch_that_does(
    model_name: str, gpu_name: str, seq_len: int, batch: int, attentions: tuple[Attention, ...]
) -> None:
    model, gpu = load_model(model_name), what_if(load_gpu(gpu_name))
    base = base_plan("full", model, gpu, Request(seq_len=seq_len, effective_batch=batch))
    assert not any(candidate.fit.fits for candidate in everything(base, model, gpu, attentions))
    tried = []
    if base.autocast != "float16":
        stepped = [
            replace(plan, optimizer_in_backward=True, gradient_accumulation=1, micro_batch=size)
            for plan in combinations(base, attentions)
            for size in range(1, batch + 1)
        ]
        tried = [evaluate(plan, model.architecture, gpu) for plan in stepped]
    fitting = [candidate for candidate in tried if candidate.fit.fits]
    found = search(base, model.architecture, gpu, attentions=attentions)
    assert found.fit.fits == found.plan.optimizer_in_backward == bool(fitting)
    if fitting:
        largest = max(candidate.plan.micro_batch for candidate in fitting)
        assert found.plan.effective_batch == found.plan.micro_batch == largest
        assert found.seconds == min(one.seconds for one in fitting if one.plan.micro_batch == largest)
        frugal = smallest_plan(base, model.architecture, gpu, attentions=attentions)
        assert frugal.plan == found.plan
    # What is offered as a way out keeps the batch and the clipping.
    assert not any_fits(base, model.architecture, gpu, attentions=attentions)


@pytest.mark.parametrize(("limit", "most", "found"), [(0, 16, None), (1, 16, 1), (9, 16, 9), (16, 16, 16), (99, 7, 7)])
@pytest.mark.parametrize("regular_from", [1, 2])
def test_the_largest_number_that_fits_is_found(limit: int, most: int, found: int | None, regular_from: int) -> None:
    assert largest_that(lambda number: number <= limit, most, regular_from) == found


def test_a_larger_number_may_fit_where_the_first_does_not() -> None:
    assert largest_that(lambda number: 2 <= number <= 5, 16, 2) == 5


def counted(patch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that the search computes from here on."""
    plans: list[Plan] = []

    def counting(plan: Plan, *rest: Any) -> Candidate:
        plans.append(plan)
        return evaluate(plan, *rest)

    patch.setattr(advisor.search, "evaluate", counting)
    return plans


def test_the_usual_answer_takes_a_fifth_of_the_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = load_model("phi-3-mini-4k"), what_if(load_gpu("t4"))
    evaluations = counted(monkeypatch)
    for method in METHODS:
        search(base_plan(method, model, gpu, Request()), model.architecture, gpu)
    assert len(evaluations) <= 3 * 60 // 5
    assert len(evaluations) == len(set(evaluations))


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, (1,)), (12, (1, 2, 3, 4, 6, 12)), (16, (1, 2, 4, 8, 16)), (7, (1, 7))]
)
def test_micro_batches_divide_the_effective_batch(batch: int, sizes: tuple[int, ...]) -> None:
    assert divisors(batch) == sizes
    base = base_plan("lora", load_model("phi-4"), what_if(load_gpu("t4")), Request(effective_batch=batch))
    assert {at_micro_batch(base, size).effective_batch for size in sizes} == {batch}


def test_the_largest_effective_batch_is_searched_too() -> None:
    model, gpu = load_model("phi-3-mini-4k"), what_if(load_gpu("a100-80gb"))
    found = search(base_plan("lora", model, gpu, Request(effective_batch=55_440)), model.architecture, gpu)
    assert found.plan.effective_batch == 55_440
    assert found.fit.fits


def test_states_that_spill_are_what_the_gpu_lacks_and_cost_time() -> None:
    model = load_model("phi-3-mini-4k")
    large = what_if(load_gpu("a100-80gb"))
    plan = replace(base_plan("full", model, large, Request()), optimizer="paged_adamw_8bit", loss="chunked")
    roomy = evaluate(plan, model.architecture, large)
    assert roomy.spilled_bytes == 0
    paged = 2 * sum(n for n in model.architecture.outer_modules.values() if n >= 100_000)
    paged += 2 * model.architecture.layers * sum(linear.weights for linear in model.architecture.linears)
    tight = evaluate(plan, model.architecture, replace(large, total_bytes=roomy.fit.needed_bytes + GIB))
    assert tight.spilled_bytes == paged - GIB
    assert tight.seconds > roomy.seconds
    exact = evaluate(plan, model.architecture, replace(large, total_bytes=roomy.fit.needed_bytes))
    assert exact.fit.fits
    assert exact.spilled_bytes == paged
