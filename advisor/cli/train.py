"""`phi3-advise train`: a plan as it stands, or a run that was interrupted."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from advisor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from advisor.launch import Launch


@click.command("train")
@click.option("--plan", "path", type=click.Path(), default=None, help="The plan file (TOML).")
@click.option("--data", default=None, help="A file or folder (JSONL, JSON, CSV, Parquet), or a data set's hub id.")
@click.option("--out", type=click.Path(), default=None, help="The run folder.  [default: a new one under runs/]")
@click.option("--device", default=None, help="cuda, cuda:1, cpu, mps, xpu, or a number as nvidia-smi counts.")
@click.option("--epochs", type=float, default=None, help="Passes over the data, in place of the plan's.")
@click.option("--max-steps", type=int, default=None, help="Optimizer steps, in place of the plan's.")
@click.option("--learning-rate", type=float, default=None, help="Peak learning rate, in place of the plan's.")
@click.option("--seed", type=int, default=None, help="Of adapters, data order and dropout, in place of the plan's.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its last checkpoint.")
@click.option("--dry-run", is_flag=True, help="Show everything that would be started, and stop.")
@click.option("--yes", is_flag=True, help="Ask nothing.")
@click.option("--no-probe", is_flag=True, help="Train without the dry run before it.")
@click.option("--fallback", is_flag=True, help="If memory runs out, start again with the next smaller plan.")
@click.option("--skip-bad-rows", is_flag=True, help="Leave out rows that cannot be used, and count them.")
@click.option("--report-to", multiple=True, help="tensorboard, wandb or trackio; may be given again.")
@click.option("--trust-remote-code", is_flag=True, help="Let code that comes with the model run.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; everything else goes to stderr.")
@click.option("--debug", is_flag=True, help="Show tracebacks, and what the libraries say.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    path: str | None,
    data: str | None,
    out: str | None,
    device: str | None,
    epochs: float | None,
    max_steps: int | None,
    learning_rate: float | None,
    seed: int | None,
    resume: bool,
    dry_run: bool,
    yes: bool,
    no_probe: bool,
    fallback: bool,
    skip_bad_rows: bool,
    report_to: tuple[str, ...],
    trust_remote_code: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Train a plan as it stands, through `accelerate launch`.

    \b
    phi3-advise train --plan plan.toml --data train.jsonl
    phi3-advise train --plan plan.toml --data train.jsonl --device cpu --max-steps 10
    phi3-advise train --resume --out runs/phi-3-mini-4k-lora-20260801-142233
    phi3-advise train --resume --out runs/phi-3-mini-4k-lora-20260801-142233 --epochs 3
    """
    from advisor.cli.launch import Conduct, conduct, hyperparameters, require_device, resumed

    how = Conduct(dry_run=dry_run, yes=yes, fallback=fallback, as_json=as_json, debug=debug, probe=not no_probe)
    length = hyperparameters(epochs=epochs, max_steps=max_steps)
    rest = hyperparameters(learning_rate=learning_rate, seed=seed)
    if resume:
        from advisor.launch.resume import Said

        said = Said(
            data=data,
            length=length,
            skip_bad_rows=skip_bad_rows,
            report_to=report_to,
            trust_remote_code=trust_remote_code,
        )
        ctx.exit(conduct(resumed(out, device, said, plan=path, fallback=fallback or None, **rest), how))
    if path is None or data is None:
        raise InputError(
            f"{'--plan' if path is None else '--data'} is missing.",
            hint="Give both: phi3-advise train --plan plan.toml --data train.jsonl. "
            "To write a plan: phi3-advise --save-plan plan.toml",
        )
    from advisor.launch.resolve import Settings
    from advisor.profiles import plan_with_defaults, read_toml

    fields = read_toml(path)
    gpu = require_device(device)
    plan = plan_with_defaults(fields, folder=os.path.dirname(path), dtype=gpu.dtype)
    settings = Settings(
        data=data,
        out=os.path.expanduser(out) if out is not None else None,
        hyperparameters={**length, **rest},
        skip_bad_rows=skip_bad_rows,
        report_to=report_to,
        trust_remote_code=trust_remote_code,
    )

    def resolve(progress: Callable[[str], None]) -> Launch:
        from advisor.launch import resolve_plan

        return resolve_plan(plan, gpu, settings, progress)

    ctx.exit(conduct(resolve, how))
