"""The estimated speed: what it is made of, and what makes it slower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from advisor.hardware import Gpu, what_if
from advisor.plan import Method, Plan
from advisor.profiles import default_plan, load_gpu, load_model
from advisor.speed import (
    BASIS,
    CHUNKED_LOSS_SPEEDUP,
    EIGHT_BIT_SLOWDOWN,
    HOST_BYTES_PER_S,
    MATMUL_EFFICIENCY,
    Speed,
    estimate_speed,
    product_operations,
    relative_seconds,
)
from advisor.units import GIB

MINI = load_model("phi-3-mini-4k").architecture
A100 = what_if(load_gpu("a100-80gb"))


def plan_of(method: Method, **changes: Any) -> Plan:
    return replace(default_plan(method, model="phi-3-mini-4k"), **changes)


def speed_of(plan: Plan, gpu: Gpu = A100, *, spilled_bytes: int = 0) -> Speed:
    speed = estimate_speed(plan, MINI, gpu, spilled_bytes=spilled_bytes)
    assert speed is not None
    return speed


@pytest.mark.parametrize(
    ("method", "checkpointing", "passes"),
    [("full", False, 6), ("full", True, 8), ("lora", False, 4), ("lora", True, 6), ("qlora", True, 6)],
)
def test_products_take_the_passes_that_a_method_needs(method: Method, checkpointing: bool, passes: int) -> None:
    plan = plan_of(method, gradient_checkpointing=checkpointing)
    layers = 32 * (3 * 3072 * 3072 + 3072 * 3072 + 3 * 3072 * 8192)
    head = 32064 * 3072
    forward_again = 2 if checkpointing else 0
    expected = plan.tokens * (passes * layers + (passes - forward_again) * head)
    # The adapters' own products are the rest: under 3 % at rank 16.
    assert expected <= product_operations(plan, MINI) <= 1.03 * expected


def test_products_take_half_of_the_cards_rate() -> None:
    plan = plan_of("full")
    operations = plan.gradient_accumulation * product_operations(plan, MINI)
    seconds = operations / (load_gpu("a100-80gb").dense_16bit_flops * MATMUL_EFFICIENCY)
    assert speed_of(plan).parts["matrix products"] == pytest.approx(seconds)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_step_is_the_sum_of_its_parts_and_tokens_go_by_its_time(method: Method) -> None:
    plan = plan_of(method, micro_batch=2, gradient_accumulation=4)
    speed = speed_of(plan)
    assert speed.step_seconds == pytest.approx(sum(speed.parts.values()))
    assert speed.tokens_per_second == pytest.approx(8 * 2048 / speed.step_seconds)


def test_stepping_in_backward_and_packing_cost_nothing_and_every_packed_token_is_trained_on() -> None:
    plan = plan_of("full", micro_batch=4, gradient_accumulation=1)
    for changed in (replace(plan, optimizer_in_backward=True), replace(plan, packing=True, padding="none")):
        assert speed_of(changed).step_seconds == speed_of(plan).step_seconds
        assert speed_of(changed).tokens_per_second == pytest.approx(4 * 2048 / speed_of(plan).step_seconds)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_checkpointing_costs_a_forward(method: Method) -> None:
    kept, recomputed = (speed_of(plan_of(method, gradient_checkpointing=again)) for again in (False, True))
    assert 1.15 < recomputed.step_seconds / kept.step_seconds < 1.6


def test_dequantising_is_a_cost_a_micro_step_that_shrinks_with_its_tokens() -> None:
    def share(micro_batch: int) -> float:
        lora, qlora = (
            speed_of(plan_of(method, micro_batch=micro_batch, gradient_accumulation=16 // micro_batch))
            for method in ("lora", "qlora")
        )
        assert lora.parts["dequantisation"] == 0
        return qlora.step_seconds / lora.step_seconds

    assert share(1) > share(4) > share(16) > 1
    one, four = (speed_of(plan_of("qlora", micro_batch=n, gradient_accumulation=4)) for n in (1, 4))
    assert one.parts["dequantisation"] == four.parts["dequantisation"]


def test_accumulating_repeats_everything_but_the_update() -> None:
    one, four = (speed_of(plan_of("full", gradient_accumulation=n)) for n in (1, 4))
    for part in ("matrix products", "attention", "kernel launches"):
        assert four.parts[part] == pytest.approx(4 * one.parts[part])
    assert four.parts["optimizer"] == one.parts["optimizer"]


def test_attention_grows_with_the_square_of_the_length() -> None:
    short, long = (speed_of(plan_of("lora", seq_len=n)) for n in (1024, 4096))
    assert long.parts["attention"] == pytest.approx(16 * short.parts["attention"])


def test_spilled_states_are_moved_both_ways_once_a_step() -> None:
    plan = plan_of("full")
    kept, spilled = speed_of(plan), speed_of(plan, spilled_bytes=12 * GIB)
    assert spilled.step_seconds - kept.step_seconds == pytest.approx(24 * GIB / HOST_BYTES_PER_S)


def test_eight_bit_states_and_the_chunked_loss_cost_and_gain_what_was_published() -> None:
    plan = plan_of("lora")
    usual = speed_of(plan).step_seconds
    # The smaller states are also read faster, which on adapters is under 1 %.
    eight_bit = speed_of(replace(plan, optimizer="adamw_bnb_8bit")).step_seconds
    assert eight_bit / usual == pytest.approx(EIGHT_BIT_SLOWDOWN, rel=0.01)
    chunked = speed_of(replace(plan, loss="chunked")).step_seconds
    assert usual / chunked == pytest.approx(CHUNKED_LOSS_SPEEDUP)


def test_a_faster_card_is_faster() -> None:
    plan = plan_of("lora")
    seconds = [speed_of(plan, what_if(load_gpu(name))).step_seconds for name in ("t4", "a100-80gb", "h100")]
    assert seconds == sorted(seconds, reverse=True)


def test_the_assumed_efficiency_is_said() -> None:
    assert speed_of(plan_of("lora")).basis == BASIS
    assert "50%" in BASIS
    assert "assumed" in BASIS


def test_without_rates_there_is_no_speed_but_plans_can_be_compared() -> None:
    unknown = what_if(vram_bytes=24 * GIB)
    plan = plan_of("lora")
    assert estimate_speed(plan, MINI, unknown) is None
    slower = relative_seconds(plan, MINI, unknown)
    assert slower > relative_seconds(replace(plan, gradient_checkpointing=False), MINI, unknown) > 0


def test_fp32_products_have_no_rate_in_a_profile() -> None:
    assert estimate_speed(plan_of("full", dtype="float32"), MINI, A100) is None
    assert estimate_speed(plan_of("full", dtype="float32", autocast="bfloat16"), MINI, A100) is not None
