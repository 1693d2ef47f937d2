"""`phi3-advise export`: a plan as another tool's configuration."""

from __future__ import annotations

import os
from shlex import quote
from typing import TYPE_CHECKING

import click

from advisor.cli.common import find_gpu, read_plan
from advisor.cli.completion import complete_gpus, complete_models
from advisor.errors import InputError
from advisor.export import TOOLS, Export, Tool, export_plan, fit_as_run, smaller_that_fits
from advisor.plan import Plan

if TYPE_CHECKING:
    from advisor.hardware import Gpu


@click.command("export")
@click.option("--to", "tool", required=True, type=click.Choice(TOOLS), help="The tool that shall train.")
@click.option("--plan", "path", type=click.Path(), default=None, help="A plan file.  [default: the recommendation]")
@click.option("--model", default=None, shell_complete=complete_models, help="Recommend for this model.")
@click.option("--gpu", default=None, shell_complete=complete_gpus, help="Recommend for this GPU.")
@click.option("--vram", default=None, help="Recommend for a GPU with that much memory.")
@click.option("--out", type=click.Path(), default=None, help="Write to a new file.  [default: stdout]")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def command(
    tool: Tool, path: str | None, model: str | None, gpu: str | None, vram: str | None, out: str | None
) -> None:
    """A plan as the configuration of trl, axolotl, llama-factory or accelerate.

    What the tool has no setting for is said on stderr and in the file.

    \b
    phi3-advise export --to trl --gpu t4 --out trl.yaml
    phi3-advise export --to axolotl --plan plan.toml
    """
    if path is None:
        plan, target = _recommend(model, gpu, vram)
    else:
        _reject_beside_plan({"--model": model, "--gpu": gpu, "--vram": vram})
        plan, target = read_plan(os.path.expanduser(path))
    file = quote(out) if out is not None else None
    export, said = _made_to_fit(export_plan(plan, tool, file=file), tool, target, file, may_change=path is None)
    _write(export, said, out)


def _reject_beside_plan(options: dict[str, str | None]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise InputError(
            f"--plan and {', '.join(given)} contradict each other.",
            why="A plan file says its own model and GPU.",
            hint="Leave one of them out.",
        )


def _recommend(model: str | None, gpu: str | None, vram: str | None) -> tuple[Plan, Gpu]:
    from advisor.advise import DEFAULT_MODEL, advise
    from advisor.profiles import load_model

    target = find_gpu(gpu=gpu, vram=vram, free=None, device=None)
    advice = advise(load_model(DEFAULT_MODEL if model is None else model), target)
    if advice.recommended is None:
        raise InputError(
            "There is no plan to export: nothing fits.", why=advice.reason, hint=f"Try: {advice.next_command}"
        )
    return advice.choice.plan, target


def _made_to_fit(
    export: Export, tool: Tool, gpu: Gpu, file: str | None, *, may_change: bool
) -> tuple[Export, tuple[str, ...]]:
    """The export, at a smaller micro-batch where what the tool runs would not fit; and what is to be said of it."""
    from advisor.errors import UnsupportedError
    from advisor.profiles import load_model
    from advisor.units import gib

    if export.as_run == export.plan:
        return export, ()
    try:
        arch = load_model(export.plan.model).architecture
    except UnsupportedError:
        return export, ()
    fit = fit_as_run(export, arch, gpu)
    if fit is None or fit.fits:
        return export, ()
    said = f"As {tool} runs it, this is {gib(fit.missing_bytes)} short on {gpu.name}"
    smaller = smaller_that_fits(export.plan, tool, arch, gpu)
    if smaller is None:
        return export, (f"{said}, and no smaller micro-batch helps.",)
    sizes = f"micro-batch {smaller.micro_batch} × {smaller.gradient_accumulation}"
    if may_change:
        before = f"{export.plan.micro_batch} × {export.plan.gradient_accumulation}"
        return export_plan(smaller, tool, file=file), (f"{said} at {before}: written with {sizes}, which fits.",)
    return export, (f"{said}; {sizes} would fit.",)


def _write(export: Export, said: tuple[str, ...], out: str | None) -> None:
    from advisor.report.terminal import make_console
    from advisor.report.terminal.text import print_command, print_warnings
    from advisor.report.yaml import config_text, grouped

    text = config_text(export)
    if out is None:
        click.echo(text, nl=False)
    else:
        from advisor.report.output import create_file

        create_file(os.path.expanduser(out), text.encode())
    console = make_console(stderr=True)
    print_warnings((*said, *(f"Not as planned: {told}." for told in grouped(export.lost))), console)
    if out is not None:
        for line in export.commands:
            print_command(console, line)
