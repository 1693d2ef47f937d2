"""`phi3-advise trace`: one plan's memory, from the installed code run on tensors without storage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from advisor.cli.common import print_json, progress_line, read_plan
from advisor.cli.completion import complete_gpus
from advisor.errors import InputError
from advisor.profiles import find_model
from advisor.report.language import localise_label

if TYPE_CHECKING:  # a trace's imports are for when one runs
    from advisor.traced import TracedPlan


@click.command("trace")
@click.option("--plan", "path", required=True, type=click.Path(), help="The plan file (TOML).")
@click.option(
    "--gpu",
    shell_complete=complete_gpus,
    default=None,
    help="A GPU by name, in place of the plan's, with nothing of it in use.",
)
@click.option("--vram", default=None, metavar="SIZE", help="The GPU's memory, such as 12GiB, in place of its own.")
@click.option("--free", default=None, metavar="SIZE", help="How much of it is free, such as 9GiB.")
@click.option(
    "--allocator",
    type=click.Choice(["training", "torch"]),
    default=None,
    help="Run as by this project's training, or with torch's defaults, as most scripts do. A plan that holds its "
    "outputs is such a script.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
@click.option("--timeline", type=click.Path(), default=None, help="Write a page of what is allocated, event by event.")
@click.option("--snapshot", type=click.Path(), default=None, help="Write a snapshot for pytorch.org/memory_viz.")
@click.option("--debug", is_flag=True, help="Show tracebacks, and what the libraries say.")
def command(
    path: str,
    gpu: str | None,
    vram: str | None,
    free: str | None,
    allocator: str | None,
    as_json: bool,
    timeline: str | None,
    snapshot: str | None,
    debug: bool,
) -> None:
    """Memory of one plan: the installed code run on tensors without storage. No GPU, no weights, seconds.

    \b
    phi3-advise trace --plan plan.toml
    phi3-advise trace --plan plan.toml --gpu t4 --json
    phi3-advise trace --plan plan.toml --free 9GiB --allocator torch
    phi3-advise trace --plan plan.toml --timeline run.html --snapshot run.pickle
    """
    timeline, snapshot = (out and os.path.expanduser(out) for out in (timeline, snapshot))
    _check_outputs(timeline, snapshot)
    plan, target = read_plan(path, gpu, vram=vram, free=free)
    model = find_model(plan.model)
    from advisor.memory.regime import TORCH_DEFAULTS, training_regime
    from advisor.traced import trace_plan

    regime = {"training": training_regime(), "torch": TORCH_DEFAULTS, None: None}[allocator]
    with progress_line(debug) as progress:
        traced = trace_plan(plan, model, target, regime=regime, progress=progress)
        room = traced.survival.room_bytes if traced.survival else None
        if timeline is not None:
            from advisor.report.timeline import write_timeline

            progress("timeline")
            write_timeline(traced.trace, timeline, title=_title(traced), gpu_total_bytes=room)
        if snapshot is not None:
            from advisor.report.snapshot import write_snapshot

            progress("snapshot")
            write_snapshot(traced.trace, snapshot, gpu_total_bytes=room)
    if as_json:
        from advisor.report.json import trace_object

        print_json(trace_object(traced))
        return
    from advisor.report.terminal import make_console, render_trace

    render_trace(traced, make_console())


def _title(traced: TracedPlan) -> str:
    """The plan in a few words, in the language of the screens."""
    from advisor.report.words import METHOD_NAMES

    plan = traced.plan
    said = (METHOD_NAMES[plan.method], f"{plan.micro_batch:,} × {plan.seq_len:,} tokens", traced.gpu.name)
    return " · ".join((traced.model.label, *map(localise_label, said)))


def _check_outputs(timeline: str | None, snapshot: str | None) -> None:
    """Refuses what could not be written, before the seconds that a trace takes."""
    from advisor.report.output import check_creatable

    for path in (timeline, snapshot):
        if path is not None:
            check_creatable(path)
    if timeline is not None and snapshot is not None and os.path.realpath(timeline) == os.path.realpath(snapshot):
        raise InputError(
            f"--timeline and --snapshot both name {timeline}.",
            hint="Give each a file of its own: --timeline run.html --snapshot run.pickle",
        )
