"""`phi3-advise estimate`: one plan's memory in closed form."""

from __future__ import annotations

import os
from typing import Any

import click

from advisor.cli.common import detect_gpu, print_json
from advisor.hardware import Gpu
from advisor.plan import Plan
from advisor.profiles import ModelProfile, load_gpu, load_model, plan_with_defaults, read_toml

ASSUMED_CAPABILITY = (8, 0)
"""Whose kernels are assumed where no GPU is named and none is here."""


@click.command("estimate")
@click.option("--plan", "path", required=True, type=click.Path(), help="The plan file (TOML).")
@click.option("--gpu", default=None, help="A GPU by name, in place of the plan's.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
@click.option("--explain", is_flag=True, help="Every term: its formula, its inputs, its result.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def command(path: str, gpu: str | None, as_json: bool, explain: bool) -> None:
    """Memory of one plan, in closed form: no GPU, no torch, milliseconds.

    \b
    phi3-advise estimate --plan plan.toml
    phi3-advise estimate --plan plan.toml --explain
    phi3-advise estimate --plan plan.toml --gpu t4 --json
    """
    from advisor.fit import check_fit
    from advisor.memory.estimate import simulate, summarise

    plan, model, target = read_plan(path, gpu)
    ledger = simulate(plan, model.architecture, target)
    memory = summarise(ledger, plan, model.architecture, target)
    if as_json:
        from advisor.report.json import plan_object, terms_object

        answer = plan_object("estimate", plan, memory)
        print_json(answer | {"terms": terms_object(ledger.alive_at_peak())} if explain else answer)
        return
    from advisor.report.terminal import make_console, render_estimate, render_explain

    console = make_console()
    known = target if target.total_bytes else None
    render_estimate(plan, model, target, memory, check_fit(memory.reserved_bytes, target) if known else None, console)
    if explain:
        render_explain(ledger, memory, console)


def read_plan(path: str, gpu: str | None = None) -> tuple[Plan, ModelProfile, Gpu]:
    """A plan file's plan, its model, and the GPU that it is for: named, detected, or none.

    Raises:
        InputError: the file, a field, the model or the GPU cannot be used.
    """
    fields: dict[str, Any] = read_toml(path)
    if gpu is not None:
        fields["gpu"] = gpu
    target = _target(fields.get("gpu"))
    plan = plan_with_defaults(fields, folder=os.path.dirname(path), bfloat16=target.bfloat16 is not False)
    return plan, load_model(plan.model), target


def _target(name: object) -> Gpu:
    """The plan's GPU; a detected one; or the kernels of an assumed capability and no judgement of fit."""
    from advisor.hardware import what_if

    if isinstance(name, str):
        return what_if(load_gpu(name))
    detected = detect_gpu(None)
    if detected is not None:
        return detected
    note = "No GPU is named and none was found: kernels of compute capability 8.0 are assumed, and fit is not judged."
    return Gpu(
        name="no GPU",
        backend="cuda",
        total_bytes=0,
        driver_bytes=0,
        detected=False,
        capability=ASSUMED_CAPABILITY,
        bfloat16=True,
        notes=(note,),
    )
