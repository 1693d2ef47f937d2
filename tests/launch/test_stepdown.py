"""What is given up, and in which order, where a plan ran out of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advisor.hardware import Gpu, what_if
from advisor.launch.stepdown import step_down
from advisor.memory.estimate import estimate
from advisor.plan import Hyperparameters, Plan
from advisor.profiles import default_plan, load_gpu, load_model

T4 = what_if(load_gpu("t4"))
CPU = replace(T4, backend="cpu", profile=None)


def descent(plan: Plan, gpu: Gpu = T4, **options: bool) -> list[Plan]:
    plans = [plan]
    while (step := step_down(plans[-1], gpu, **options)) is not None:
        plans.append(step.plan)
        assert step.change
        assert len(plans) < 50
    return plans


def start(**fields: object) -> Plan:
    plan = default_plan("full", model="phi-3-mini-4k")
    fields = {"micro_batch": 4, "gradient_accumulation": 4, "gradient_checkpointing": False, **fields}
    return replace(plan, **fields)


def test_what_costs_least_is_given_up_first() -> None:
    full = [plan for plan in descent(start()) if plan.method == "full"]
    batches = [(plan.micro_batch, plan.gradient_accumulation) for plan in full]
    assert batches[:3] == [(4, 4), (2, 8), (1, 16)]
    rest = [(plan.gradient_checkpointing, plan.loss, plan.optimizer) for plan in full[2:]]
    assert rest == [
        (False, "standard", full[0].optimizer),
        (True, "standard", full[0].optimizer),
        (True, "chunked", full[0].optimizer),
        *((True, "chunked", name) for name in ("adamw_bnb_8bit", "paged_adamw_8bit")),
    ]
    assert [plan.method for plan in descent(start())][-1] == "qlora"


@pytest.mark.parametrize("batch", [(4, 4), (7, 3), (6, 1), (1, 1), (5, 5)])
def test_the_effective_batch_the_data_and_the_hyperparameters_stay(batch: tuple[int, int]) -> None:
    first = start(micro_batch=batch[0], gradient_accumulation=batch[1], training=Hyperparameters(seed=7), seq_len=640)
    for plan in descent(first):
        assert plan.effective_batch == batch[0] * batch[1]
        assert (plan.seq_len, plan.training, plan.padding) == (640, first.training, first.padding)


def test_sequences_are_cut_only_with_consent_and_never_below_what_is_useful() -> None:
    assert {plan.seq_len for plan in descent(start())} == {2048}
    assert [plan.seq_len for plan in descent(start(), shorter=True) if plan.method == "full"][-4:] == [
        2048,
        1024,
        512,
        256,
    ]


def test_the_advice_s_plan_of_the_next_method_is_taken_where_there_is_one() -> None:
    advised = default_plan("lora", model="phi-3-mini-4k")
    advised = replace(advised, micro_batch=8, gradient_accumulation=2)
    last = [plan for plan in descent(start()) if plan.method == "full"][-1]
    step = step_down(last, T4, advised=(advised,))
    assert step is not None
    assert (step.plan.method, step.plan.micro_batch) == ("lora", 8)


def test_a_processor_has_no_paged_states_and_without_bitsandbytes_there_are_no_4_bit_weights() -> None:
    assert not any(plan.optimizer.startswith("paged") for plan in descent(start(optimizer="adamw_torch"), CPU))
    without = descent(start(), has_bitsandbytes=False)
    assert {plan.method for plan in without} == {"full", "lora"}
    assert {plan.optimizer for plan in without} == {start().optimizer, "adamw_torch_fused"}


def test_stepping_in_backward_leaves_the_batch_as_it_is() -> None:
    plan = start(micro_batch=4, gradient_accumulation=1, optimizer_in_backward=True)
    assert {(p.micro_batch, p.gradient_accumulation) for p in descent(plan) if p.method == "full"} == {(4, 1)}


def test_every_step_within_a_method_needs_less_by_the_estimate() -> None:
    arch = load_model("phi-3-mini-4k").architecture
    plans = [plan for plan in descent(start(optimizer="adamw_torch_fused")) if plan.method == "full"]
    peaks = [estimate(plan, arch, T4).allocated_bytes for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]
