"""`phi3-advise explore`: change a plan with keys and see its memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from shlex import join
from typing import TYPE_CHECKING

import click

from advisor.cli.common import find_gpu
from advisor.cli.completion import complete_gpus, complete_models
from advisor.errors import EnvironmentLacksError, InputError

if TYPE_CHECKING:
    from advisor.explore import View
    from advisor.report.explorer.app import Launch


@click.command("explore")
@click.option("--model", default=None, shell_complete=complete_models, help="A profile, a config.json, or a hub id.")
@click.option("--gpu", default=None, shell_complete=complete_gpus, help="What if: a GPU by name.")
@click.option("--vram", default=None, help="What if: a GPU with that much memory.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def command(model: str | None, gpu: str | None, vram: str | None) -> None:
    """Change a plan with keys and see its memory move; trace it, save it, launch it.

    \b
    phi3-advise explore
    phi3-advise explore --gpu t4 --model phi-3.5-mini
    """
    if find_spec("textual") is None:
        raise EnvironmentLacksError(
            "The explorer needs textual, not installed here.",
            why="It draws the screen and reads the keys; nothing else needs it.",
            hint="pip install textual",
        )
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise EnvironmentLacksError(
            "The explorer needs a terminal.",
            why="Its input or its output is a pipe, a file or a notebook.",
            hint="Run it in a terminal, or use phi3-advise estimate --plan plan.toml.",
        )
    view = first_view(model, gpu, vram)
    from advisor.report.explorer.app import Explorer
    from advisor.report.terminal import make_console

    make_console(stderr=True)  # where the encoding lacks a character, a look-alike is written from here on
    asked = Explorer(view).run()
    if asked is not None:
        launch(asked)


def first_view(model: str | None, gpu: str | None, vram: str | None) -> View:
    """The recommendation for a model and a GPU; the plan that misses least where nothing fits.

    Raises:
        InputError: a name or an amount that cannot be used, or a model that the closed form does not know.
    """
    from advisor.advise import DEFAULT_MODEL, advise
    from advisor.explore import show, warm_up
    from advisor.profiles import load_model

    profile = load_model(DEFAULT_MODEL if model is None else model)
    target = find_gpu(gpu=gpu, vram=vram, free=None, device=None)
    if not target.total_bytes:
        raise InputError("Nothing says how large the GPU is.", hint="Add --gpu t4 or --vram 12GiB.")
    plan = advise(profile, target).choice.plan
    view = show(profile, target, replace(plan, gpu=target.profile.name if target.profile else None))
    warm_up(view)
    return view


def launch(asked: Launch) -> None:
    """Prints the command that trains the plan, and runs it where the data was named."""
    words = ["train", "--plan", asked.plan_file, "--data", asked.data or "train.jsonl"]
    click.echo(f"phi3-advise {join(words)}")
    if asked.data:
        from advisor.cli import main

        main(words)
