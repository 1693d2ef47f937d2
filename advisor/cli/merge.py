"""`phi3-advise merge`: a run's adapter added into its base model, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from advisor.cli.common import print_json

if TYPE_CHECKING:
    from advisor.plan import Dtype


@click.command("merge")
@click.argument("run", type=click.Path())
@click.option("--out", type=click.Path(), default=None, help="The folder to make.  [default: RUN/merged]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default=None,
    help="The merged weights' format.  [default: as the base model has them]",
)
@click.option("--base", default=None, help="The base model's folder or hub id, where it has moved.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, and nothing else.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
def command(run: str, out: str | None, dtype: Dtype | None, base: str | None, as_json: bool) -> None:
    """Merge a run's adapter into its base model: a folder that loads without PEFT.

    On the CPU, a piece of a tensor at a time, so the RAM it takes does not depend on the model. A QLoRA adapter is
    merged into the 16-bit model.

    \b
    phi3-advise merge runs/first
    phi3-advise merge runs/first --out merged --dtype float16
    """
    from advisor.report.terminal import make_console, render_merge_needs, render_merged
    from advisor.training.merge import merge_adapter, prepare_merge

    merge = prepare_merge(run, out, base=base, dtype=dtype)
    render_merge_needs(merge, make_console(stderr=as_json))
    with _progress() as progress:
        merged = merge_adapter(merge, progress=progress)
    if as_json:
        from advisor.report.run_json import merge_object

        print_json(merge_object(merged))
        return
    render_merged(merged, make_console())


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr; nothing where nobody looks."""
    from advisor.report.terminal import make_console

    console = make_console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Merging"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("merge", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
