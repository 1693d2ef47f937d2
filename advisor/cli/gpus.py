"""`phi3-advise gpus`: methods against every known GPU."""

from __future__ import annotations

import click

from advisor.advise import DEFAULT_MODEL, Request
from advisor.cli.common import print_json
from advisor.cli.completion import complete_models
from advisor.profiles import load_model


@click.command("gpus")
@click.option(
    "--model",
    shell_complete=complete_models,
    default=DEFAULT_MODEL,
    show_default=True,
    help="A profile, a config.json, or a hub id.",
)
@click.option("--seq-len", type=int, default=2048, show_default=True, help="Tokens, for the largest micro-batch.")
@click.option("--lora-rank", type=int, default=16, show_default=True, help="Rank of the adapters.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def command(model: str, seq_len: int, lora_rank: int, as_json: bool) -> None:
    """Each method's largest micro-batch and longest sequence on every known GPU.

    \b
    phi3-advise gpus
    phi3-advise gpus --model phi-4 --seq-len 4096
    """
    from advisor.survey import survey

    profile = load_model(model)
    request = Request(seq_len=seq_len, lora_rank=lora_rank)
    rows = survey(profile, request)
    if as_json:
        from advisor.report.json import survey_object

        print_json(survey_object(rows))
        return
    from advisor.report.terminal import make_console, render_survey

    render_survey(rows, profile, request, make_console())
