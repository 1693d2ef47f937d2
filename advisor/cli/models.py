"""`phi3-advise models`: the models that are known by name."""

from __future__ import annotations

import click

from advisor.cli.common import print_json
from advisor.profiles import load_model, model_names


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def command(as_json: bool) -> None:
    """Models known by name, with their parameters, and whether they can be launched.

    \b
    phi3-advise models
    """
    profiles = tuple(load_model(name) for name in model_names())
    if as_json:
        from advisor.report.json import models_object

        print_json(models_object(profiles))
        return
    from advisor.report.terminal import make_console, render_models

    render_models(profiles, make_console())
