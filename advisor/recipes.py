"""What a recipe does on a GPU: its memory, what spills to host RAM, what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from advisor.fit import Fit, explain_fit
from advisor.hardware import Gpu
from advisor.memory.estimate import Memory, summarise
from advisor.memory.step import state_bytes
from advisor.plan import Attention, Autocast, Plan
from advisor.profiles import ModelProfile, Recipe, load_model, plan_with_defaults, without_bfloat16
from advisor.search import evaluate
from advisor.speed import HOST_BYTES_PER_S, Speed, estimate_speed
from advisor.units import duration, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeAnswer:
    """A recipe's plan on a GPU, and its story in sentences."""

    recipe: Recipe
    model: ModelProfile
    gpu: Gpu
    plan: Plan
    memory: Memory
    fit: Fit
    speed: Speed | None
    state_bytes: int
    """Weights, gradients and both running averages of every trained parameter, wherever they are."""

    spilled_bytes: int
    """Paged states that do not fit beside the rest and so live in host RAM."""

    verdict: str
    story: tuple[str, ...]


def recipe_plan(recipe: Recipe, gpu: Gpu, *, model: str | None = None) -> Plan:
    """The recipe's plan as its notebook would run it on this GPU.

    Without bfloat16 a notebook takes float16, and SDPA in place of flash-attn 2.
    """
    fields = dict(recipe.fields)
    fields["model"] = model or fields.get("model", "phi-3-mini-4k")
    plan = plan_with_defaults(fields)
    if gpu.bfloat16 is False:
        if plan.dtype == "bfloat16":
            plan = without_bfloat16(plan)
        autocast: Autocast = "float16" if plan.autocast == "bfloat16" else plan.autocast
        attention: Attention = "sdpa" if plan.attention == "flash_attention_2" else plan.attention
        plan = replace(plan, autocast=autocast, attention=attention)
    return replace(plan, gpu=gpu.profile.name if gpu.profile else None)


def examine_recipe(recipe: Recipe, gpu: Gpu, *, model: str | None = None) -> RecipeAnswer:
    """Memory, fit, speed and story of a recipe on a GPU.

    Raises:
        InputError: an unknown model, or a field that cannot be used.
    """
    plan = recipe_plan(recipe, gpu, model=model)
    profile = load_model(plan.model)
    found = evaluate(plan, profile.architecture, gpu)
    memory = summarise(found.ledger, plan, profile.architecture, gpu)
    states = state_bytes(plan, profile.architecture)
    story = [*recipe.notes]
    if memory.host_bytes:
        story += _paging_story(memory, found.fit, states, found.spilled_bytes)
    return RecipeAnswer(
        recipe=recipe,
        model=profile,
        gpu=gpu,
        plan=plan,
        memory=memory,
        fit=found.fit,
        speed=estimate_speed(plan, profile.architecture, gpu, spilled_bytes=found.spilled_bytes),
        state_bytes=states,
        spilled_bytes=found.spilled_bytes,
        verdict=explain_fit(found.fit, memory.at),
        story=tuple(story),
    )


def _paging_story(memory: Memory, fit: Fit, states: int, spilled: int) -> list[str]:
    paged = memory.host_bytes
    states_told = f"Weights, gradients and both Adam moments are {gib(states)}"
    story = [f"{states_told}; the {gib(paged)} of moments are paged, and may leave the GPU."]
    if not fit.fits:
        story.append(f"Even with all of them in host RAM, {gib(fit.needed_bytes)} must be on the GPU at {memory.at}.")
    elif spilled:
        cost = duration(2 * spilled / HOST_BYTES_PER_S)
        story.append(
            f"It runs pinned near {gib(fit.total_bytes)}: the rest leaves {gib(paged - spilled)} of room for paged "
            f"states, so {gib(spilled)} spill to host RAM."
        )
        story.append(
            f"Every optimizer step moves them both ways: {cost} at {HOST_BYTES_PER_S / 1e9:.0f} GB/s (assumed)."
        )
    else:
        story.append("All of them have room on this GPU, so nothing spills.")
    return story
