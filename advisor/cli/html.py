"""`phi3-advise --html`: the answer as a page, with one step of the recommended plan by trace."""

from __future__ import annotations

import os

import click

from advisor.advise import Advice
from advisor.cli.common import progress_line
from advisor.errors import AdvisorError, InputError
from advisor.profiles import ModelSource
from advisor.report.language import localise
from advisor.traced import TracedPlan, trace_plan


def check_page(path: str, plan_path: str | None) -> None:
    """Refuses what could not be written, before the seconds that a trace takes.

    Raises:
        InputError: the file exists, or cannot be written, or is to hold the plan as well.
    """
    from advisor.report.output import check_creatable

    target = os.path.expanduser(path)
    check_creatable(target)
    if plan_path is not None and os.path.realpath(target) == os.path.realpath(os.path.expanduser(plan_path)):
        raise InputError(
            f"--html and --save-plan both name {path}.",
            hint="Give each a file of its own: --html report.html --save-plan plan.toml",
        )


def write_page(advice: Advice, model: ModelSource, path: str, traced: TracedPlan | None) -> None:
    """Traces the plan where that has not been done, and writes the page; one without the trace where none can run.

    Raises:
        InputError: the file exists by now, or cannot be written.
    """
    step: TracedPlan | AdvisorError
    with progress_line() as progress:
        try:
            step = traced or trace_plan(advice.choice.plan, model, advice.gpu, progress=progress)
        except AdvisorError as error:
            step = error
        progress("page")
        from advisor.report.html import write_report

        write_report(advice, os.path.expanduser(path), step)
    if isinstance(step, AdvisorError):
        click.echo(localise(f"phi3-advise: {path} shows no step: {step.what}"), err=True)
    else:
        click.echo(localise(f"phi3-advise: {path} is written."), err=True)
