"""`phi3-advise estimate`: one plan's memory in closed form."""

from __future__ import annotations

import click

from advisor.cli.common import print_json, read_plan
from advisor.cli.completion import complete_gpus
from advisor.profiles import load_model


@click.command("estimate")
@click.option("--plan", "path", required=True, type=click.Path(), help="The plan file (TOML).")
@click.option(
    "--gpu",
    shell_complete=complete_gpus,
    default=None,
    help="A GPU by name, in place of the plan's, with nothing of it in use.",
)
@click.option("--vram", default=None, metavar="SIZE", help="The GPU's memory, such as 12GiB, in place of its own.")
@click.option("--free", default=None, metavar="SIZE", help="How much of it is free, such as 9GiB.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
@click.option("--explain", is_flag=True, help="Every term: its formula, its inputs, its result.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def command(path: str, gpu: str | None, vram: str | None, free: str | None, as_json: bool, explain: bool) -> None:
    """Memory of one plan, in closed form: no GPU, no torch, milliseconds.

    \b
    phi3-advise estimate --plan plan.toml
    phi3-advise estimate --plan plan.toml --explain
    phi3-advise estimate --plan plan.toml --gpu t4 --json
    phi3-advise estimate --plan plan.toml --free 9GiB
    """
    from advisor.cautions import plan_cautions
    from advisor.fit import check_fit
    from advisor.memory.estimate import simulate, summarise

    plan, target = read_plan(path, gpu, vram=vram, free=free)
    model = load_model(plan.model)
    ledger = simulate(plan, model.architecture, target)
    memory = summarise(ledger, plan, model.architecture, target)
    fit = check_fit(memory.reserved_bytes, target) if target.total_bytes else None
    cautions = plan_cautions(plan, model, target)
    if as_json:
        from advisor.report.json import estimate_object, terms_object

        answer = estimate_object(plan, memory, target, fit, (*target.notes, *cautions))
        print_json(answer | {"terms": terms_object(ledger.alive_at_peak())} if explain else answer)
        return
    from advisor.report.terminal import make_console, render_estimate, render_explain

    console = make_console()
    render_estimate(plan, model, target, memory, fit, console, cautions=cautions)
    if explain:
        render_explain(ledger, memory, console)
