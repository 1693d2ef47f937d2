"""A probe's screen: whether it ran, what it took, and each moment as predicted and as measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from advisor.report.language import localise_label
from advisor.report.terminal.estimate import print_totals
from advisor.report.terminal.subject import print_gpu, print_plan
from advisor.report.terminal.text import joined, print_paragraph, print_title, print_warnings
from advisor.report.words import clean, sentence
from advisor.units import GIB, duration, gib, short_count, size

if TYPE_CHECKING:  # this screen loads no more of the rest than its own values did
    from collections.abc import Iterator

    from advisor.probe.answer import ProbeAnswer
    from advisor.probe.find import Found
    from advisor.probe.measurement import Measurement

_NAMES = {"micro_batch": "micro-batch", "seq_len": "sequence length"}
_METERS = {
    "cuda allocator": "counted by torch's CUDA allocator",
    "xpu allocator": "counted by torch's XPU allocator",
    "profiler": "counted by torch's profiler, without what a matrix product takes and gives back",
    "none": "not counted: this device tells no peaks",
}
_AFTERWARDS = {
    True: "looked at: the probe's process is off it",
    False: "the driver still lists the probe's process",
    None: "not known: the driver names no process of ours, and more is in use than before",
}


def render_probe(answer: ProbeAnswer, console: Console) -> None:
    """The device, the plan, the verdict, the totals, the moments."""
    print_gpu(answer.gpu, console)
    found = answer.measurement
    parameters = short_count(found.total_parameters) if found.total_parameters else "unknown"
    label = f"{clean(answer.model.label)} · "
    weights = "random weights, made on the device"
    print_paragraph(console, joined(f"{parameters} parameters", weights), label=label, indent="  ")
    print_plan(answer.plan, console)
    print_warnings(answer.warnings, console)
    if answer.found is not None:
        _print_tries(answer.found, console)
    console.print()
    label, style = ("Runs. ", "bold green") if answer.fits else ("Does not run. ", "bold red")
    print_paragraph(console, sentence(answer.reason), label=label, label_style=style, indent="  ")
    console.print()
    print_totals(list(_totals(answer)), console)
    _print_moments(answer, console)
    console.print()
    print_paragraph(console, f"Tier: probe: {_what_was_run(found)}; memory is {_METERS[found.meter]}.", style="dim")


def _what_was_run(found: Measurement) -> str:
    """Of a run that ended early, only what it came to."""
    if found.outcome != "ran":
        return f"{found.steps} steps were run to their end"
    saved = " and the saving path" if "saving" in found.moments else ""
    return f"{found.steps} steps{',' if saved else ' and'} an evaluation{saved} were run"


def _totals(answer: ProbeAnswer) -> Iterator[tuple[str, str]]:
    found = answer.measurement
    if found.allocated_bytes is not None:
        yield "peak allocated", f"{_amount(found.allocated_bytes)} at {found.at}"
    if found.reserved_bytes is not None and found.meter != "profiler":
        yield "peak reserved", _amount(found.reserved_bytes)
    if found.driver_bytes is not None:
        yield "driver's view", f"{_amount(found.driver_bytes)} of this process at the end"
    measured = "measured" if found.context_bytes is not None and answer.imitation is None else "not measured"
    provenance = answer.target.context_provenance if measured == "not measured" else measured
    yield "context", f"{_amount(answer.context_bytes)} ({provenance})"
    if found.host_peak_bytes is not None:
        yield "host RAM", f"{_amount(found.host_peak_bytes)} at the peak"
    seconds, rate = found.seconds_per_step, found.tokens_per_second
    if seconds is not None and rate is not None:
        yield "speed", f"{duration(seconds)} a step, {rate:,.0f} tokens/s"
    if answer.gpu.backend == "cuda":
        yield "GPU afterwards", _AFTERWARDS[found.released]
    if found.seconds is not None:
        yield "the probe took", duration(found.seconds)


def _amount(size_bytes: int) -> str:
    return gib(size_bytes) if size_bytes >= GIB else size(size_bytes)


def _print_tries(found: Found, console: Console) -> None:
    name = _NAMES[found.field]
    console.print()
    print_title(console, f"Largest {name}, by trying")
    for one in found.tries:
        peak = one.measurement.reserved_bytes
        said = "runs" if one.measurement.outcome == "ran" else "out of memory"
        reached = f", {_amount(peak)} at the peak" if peak is not None else ""
        print_paragraph(console, f"{said}{reached}", label=f"  {one.value:,}: ", indent="    ")
    estimate = f"the estimate said {found.estimated:,}" if found.estimated is not None else "the estimate had none"
    verdict = f"{found.largest:,}" if found.largest is not None else "none"
    ceiling = " (as far as was tried)" if found.largest == found.limit else ""
    print_paragraph(console, f"{verdict}{ceiling}; {estimate}.", label=f"{name}: ", indent="  ")


def _print_moments(answer: ProbeAnswer, console: Console) -> None:
    moments = answer.measurement.moments
    if not moments:
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(localise_label("Highest in each moment"))
    table.add_column(localise_label("measured"), justify="right")
    for prediction in answer.predictions:
        table.add_column(localise_label(f"{prediction.tier} said"), justify="right")
    for moment, measured in moments.items():
        row = [localise_label(moment), _amount(measured)]
        row += [_compared(one.memory.moments.get(moment), measured) for one in answer.predictions]
        style = "bold" if moment == answer.measurement.at else ""
        table.add_row(*row, style=style)
    peak = answer.measurement.allocated_bytes
    if peak is not None:
        compared = [_compared(one.memory.allocated_bytes, peak) for one in answer.predictions]
        table.add_row(localise_label("peak"), _amount(peak), *compared, style="bold")
    console.print()
    console.print(table)


def _compared(predicted: int | None, measured: int) -> str:
    """What was predicted, and how far off it was: below zero is an under-prediction."""
    if predicted is None:
        return "–"
    error = predicted / measured - 1 if measured else 0.0
    return f"{_amount(predicted)} ({error:+.2%})".replace("-", "−")


__all__ = ["render_probe"]
