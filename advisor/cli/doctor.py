"""`phi3-advise doctor`: what this machine has for training, and whether it computes."""

from __future__ import annotations

import click

from advisor.cli.common import print_json
from advisor.errors import InputError


@click.command("doctor")
@click.option("--device", default=None, help="Where to compute: cuda, cuda:1, cpu, mps.  [default: the GPU, else cpu]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def command(device: str | None, as_json: bool) -> int:
    """GPU, driver, packages, memory and disk, and three small computations, each with a verdict and a remedy.

    \b
    phi3-advise doctor
    phi3-advise doctor --device cpu

    Exit code 3 where something that training needs is missing or wrong.
    """
    from advisor.doctor import examine

    _check_device(device)
    checks = examine(device)
    if as_json:
        from advisor.report.json import doctor_object

        made = list(checks)
        print_json(doctor_object(made))
    else:
        from advisor.report.terminal import make_console
        from advisor.report.terminal.doctor import render_doctor

        made = render_doctor(checks, make_console())
    return 3 if any(check.verdict == "bad" for check in made) else 0


def _check_device(device: str | None) -> None:
    """Refuses what torch would not understand.

    Raises:
        InputError: no device is called that.
    """
    import re

    if device is not None and not re.fullmatch(r"(cuda|xpu|mps|cpu)(:\d{1,4})?", device):
        raise InputError(f"{device[:40]!r} is no device.", hint="Write cuda, cuda:1, cpu, mps or xpu.")
