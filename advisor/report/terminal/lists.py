"""What is known by name: methods against GPUs, and models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from advisor.report.language import localise_label
from advisor.report.terminal.subject import print_model
from advisor.report.terminal.text import print_paragraph
from advisor.report.words import METHOD_NAMES, clean
from advisor.units import gib, short_count

if TYPE_CHECKING:  # this screen loads no more of the rest than its own values did
    from advisor.advise import Request
    from advisor.profiles import ModelProfile
    from advisor.survey import Reach, SurveyRow


def render_survey(rows: Sequence[SurveyRow], model: ModelProfile, request: Request, console: Console) -> None:
    """The largest micro-batch and the longest sequence of each method on each GPU."""
    print_model(model, console, f"sequences of {request.seq_len:,} tokens", f"rank {request.lora_rank}")
    console.print()
    table = _table("GPU", "usable", *METHOD_NAMES.values())
    for row in rows:
        name = row.gpu.profile.name if row.gpu.profile else row.gpu.name
        reaches = (_reach(row.reach[method]) for method in METHOD_NAMES)
        table.add_row(Text(clean(name)), gib(row.gpu.total_bytes), *reaches)
    console.print(table)
    console.print()
    for note in _survey_notes(rows, model, request):
        print_paragraph(console, note, style="dim")


def _survey_notes(rows: Sequence[SurveyRow], model: ModelProfile, request: Request) -> tuple[str, ...]:
    positions = model.architecture.max_positions
    stepped = any(reach.in_backward for row in rows for reach in row.reach.values())
    price = "* only by stepping in backward: gradients are not clipped, and the micro-batch is the effective batch."
    return (
        f"Largest micro-batch at {request.seq_len:,} tokens / longest sequence at micro-batch 1.",
        "With checkpointing, chunked loss and paged 8-bit states. – does not fit; + is where the search stops.",
        *((price,) if stepped else ()),
        f"{model.label} was made for {positions:,} tokens: beyond them memory is not what limits it.",
        "Tier: estimate, in closed form. Nothing was measured. The names go with --gpu.",
    )


def _reach(reach: Reach) -> Text:
    from advisor.survey import LARGEST_MICRO_BATCH, LONGEST_SEQ_LEN

    if reach.micro_batch is None and reach.seq_len is None:
        return Text("–", style="red")
    batch, length = _limited(reach.micro_batch, LARGEST_MICRO_BATCH), _limited(reach.seq_len, LONGEST_SEQ_LEN)
    return Text(f"{batch}* / {length}" if reach.in_backward else f"{batch} / {length}", style="green")


def _limited(number: int | None, limit: int) -> str:
    """A number as far as it was searched."""
    if number is None:
        return "–"
    return f"{number:,}+" if number >= limit else f"{number:,}"


def render_models(profiles: Sequence[ModelProfile], console: Console) -> None:
    """Models with their numbers; why one cannot be launched stands below."""
    table = _table("model", "parameters", "layers", "hidden", "context", "window", "launchable")
    reasons: dict[str, int] = {}
    for profile in profiles:
        arch = profile.architecture
        launchable = Text(localise_label("yes"), style="green")
        if not profile.launchable:
            number = reasons.setdefault(profile.launch_note, len(reasons) + 1)
            launchable = Text(localise_label(f"no ({number})"), style="red")
        window = "–" if arch.window is None else f"{arch.window:,}"
        sizes = (short_count(arch.parameters), f"{arch.layers}", f"{arch.hidden_size:,}", f"{arch.max_positions:,}")
        table.add_row(Text(clean(profile.name)), *sizes, window, launchable)
    console.print(table)
    if reasons:
        console.print()
    for reason, number in reasons.items():
        print_paragraph(console, reason, label=f"({number}) ", indent="    ")


def _table(*headings: str) -> Table:
    """A table without lines: names to the left, numbers to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        first = number == 0  # names, which are copied from here
        table.add_column(localise_label(heading), justify="left" if first else "right", overflow="fold", no_wrap=first)
    return table
