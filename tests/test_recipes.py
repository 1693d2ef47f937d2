"""The cookbook's notebooks, judged on the GPUs they were tried on."""

from __future__ import annotations

import pytest

from advisor.hardware import Gpu, what_if
from advisor.memory.step import trained_elements
from advisor.profiles import default_plan, load_gpu, load_model, load_recipe, recipe_names
from advisor.recipes import RecipeAnswer, examine_recipe, recipe_plan
from advisor.speed import HOST_BYTES_PER_S
from advisor.units import GIB, gib


def gpu_named(name: str) -> Gpu:
    return what_if(load_gpu(name))


def judged(recipe: str, gpu: str, model: str | None = None) -> RecipeAnswer:
    return examine_recipe(load_recipe(recipe), gpu_named(gpu), model=model)


def test_the_full_notebook_has_56_9_gib_of_states() -> None:
    answer = judged("cookbook-full", "a100-40gb")
    assert answer.state_bytes == 16 * 3_821_079_552
    assert gib(answer.state_bytes) == "56.94 GiB"
    assert any("56.94 GiB" in sentence for sentence in answer.story)


def test_on_a_40_gb_a100_the_full_notebook_runs_pinned_with_states_in_host_ram() -> None:
    answer = judged("cookbook-full", "a100-40gb")
    assert answer.fit.fits
    assert 0 < answer.spilled_bytes < answer.memory.host_bytes
    # Everything that is no paged state, and what is left of the states, is the whole card.
    kept = answer.memory.host_bytes - answer.spilled_bytes
    assert answer.fit.needed_bytes + kept == answer.fit.total_bytes
    (pinned,) = [sentence for sentence in answer.story if "pinned near" in sentence and "GiB:" in sentence]
    assert gib(answer.fit.total_bytes) in pinned
    assert gib(answer.spilled_bytes) in pinned


def test_what_spilling_costs_is_said_and_in_the_speed() -> None:
    answer = judged("cookbook-full", "a100-40gb")
    seconds = 2 * answer.spilled_bytes / HOST_BYTES_PER_S
    assert answer.speed is not None
    assert answer.speed.parts["host transfers"] == pytest.approx(seconds)
    assert any("Every optimizer step moves them both ways" in sentence for sentence in answer.story)


def test_on_a_t4_the_full_notebook_is_out_of_memory_by_how_much_and_when() -> None:
    answer = judged("cookbook-full", "t4")
    assert not answer.fit.fits
    assert answer.fit.missing_bytes > 10 * GIB
    assert answer.verdict.startswith(f"out of memory by {gib(answer.fit.missing_bytes)} at {answer.memory.at}")
    assert any("Even with all of them in host RAM" in sentence for sentence in answer.story)


def test_on_a_gpu_with_room_nothing_spills_and_that_is_said() -> None:
    answer = judged("cookbook-full", "h200")
    assert (answer.fit.fits, answer.spilled_bytes) == (True, 0)
    assert any("nothing spills" in sentence for sentence in answer.story)


@pytest.mark.parametrize("recipe", ["cookbook-lora", "cookbook-qlora"])
def test_the_notebooks_targets_match_two_modules(recipe: str) -> None:
    answer = judged(recipe, "a100-40gb")
    assert answer.memory.parameters.trainable == 8_912_896
    assert any("match two modules" in sentence for sentence in answer.story)


def test_rank_16_on_all_four_modules_trains_25_165_824() -> None:
    plan = default_plan("lora", model="phi-3-mini-4k")
    assert trained_elements(plan, load_model("phi-3-mini-4k").architecture) == 25_165_824
    assert judged("lora", "a100-40gb").memory.parameters.trainable == 25_165_824


@pytest.mark.parametrize("recipe", ["cookbook-lora", "cookbook-qlora"])
def test_without_bfloat16_a_notebook_takes_fp16_and_sdpa(recipe: str) -> None:
    on_t4, on_a100 = (recipe_plan(load_recipe(recipe), gpu_named(gpu)) for gpu in ("t4", "a100-40gb"))
    assert (on_t4.dtype, on_t4.autocast, on_t4.attention) == ("float16", "float16", "sdpa")
    assert (on_a100.dtype, on_a100.autocast, on_a100.attention) == ("bfloat16", "bfloat16", "flash_attention_2")


def test_the_full_notebook_keeps_its_fp32_weights_on_a_t4() -> None:
    plan = recipe_plan(load_recipe("cookbook-full"), gpu_named("t4"))
    assert (plan.dtype, plan.autocast, plan.attention) == ("float32", "float16", "eager")


def test_the_plan_names_its_gpu() -> None:
    assert judged("cookbook-lora", "t4").plan.gpu == "t4"
    assert recipe_plan(load_recipe("cookbook-lora"), what_if(vram_bytes=GIB)).gpu is None


def test_a_recipe_is_judged_for_another_model() -> None:
    answer = judged("cookbook-full", "a100-40gb", model="phi-4-mini")
    assert answer.model.name == answer.plan.model == "phi-4-mini"
    assert answer.state_bytes == 16 * 3_836_021_760


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("gpu", ["t4", "rx-7900-xtx", "h200"])
def test_every_recipe_can_be_judged_anywhere(recipe: str, gpu: str) -> None:
    answer = judged(recipe, gpu)
    assert answer.verdict
    assert set(load_recipe(recipe).notes) <= set(answer.story)
    assert answer.spilled_bytes <= answer.memory.host_bytes
