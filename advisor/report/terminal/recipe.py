"""A recipe on a GPU: what it sets, what it needs, and what that comes to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from advisor.report.terminal.estimate import print_fit
from advisor.report.terminal.subject import print_gpu, print_model, print_plan
from advisor.report.terminal.text import joined, print_paragraph, print_warnings
from advisor.report.words import sentence
from advisor.units import duration, gib

if TYPE_CHECKING:  # this screen loads no more of the rest than its own values did
    from advisor.recipes import RecipeAnswer


def render_recipe(answer: RecipeAnswer, console: Console) -> None:
    """Title and source, the GPU, the plan, the memory bar, the verdict and the story."""
    print_paragraph(console, answer.recipe.label, style="bold")
    print_paragraph(console, f"Source: {answer.recipe.source}", style="dim", indent="  ")
    console.print()
    print_gpu(answer.gpu, console)
    print_model(answer.model, console)
    print_plan(answer.plan, console)
    print_warnings(answer.gpu.notes, console)
    print_fit(answer.fit, answer.verdict, console)
    console.print()
    for text in answer.story:
        print_paragraph(console, sentence(text), label="- ", indent="  ", label_style="")
    console.print()
    print_paragraph(console, _numbers(answer))
    console.print()
    print_paragraph(console, _footer(answer), style="dim")


def _numbers(answer: RecipeAnswer) -> str:
    said = [
        f"peak allocated {gib(answer.memory.allocated_bytes)} at {answer.memory.at}",
        f"reserved {gib(answer.memory.reserved_bytes)}",
        f"weights, gradients and optimizer states {gib(answer.state_bytes)}",
    ]
    if answer.spilled_bytes and answer.fit.fits:
        said.append(f"in host RAM {gib(answer.spilled_bytes)}")
    if answer.speed and answer.fit.fits:
        said.append(f"about {duration(answer.speed.step_seconds)} a step")
        said.append(f"{answer.speed.tokens_per_second:,.0f} tokens/s (estimate)")
    return joined(*said)


def _footer(answer: RecipeAnswer) -> str:
    said = "Tier: estimate, in closed form. Nothing was measured on this GPU."
    return f"{said} Speed assumes {answer.speed.basis}." if answer.speed and answer.fit.fits else said
