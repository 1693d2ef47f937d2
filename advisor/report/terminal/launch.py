"""A run's screens: what will be trained, what came of it, and what to do where it did not work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from advisor.report.terminal.estimate import print_fit, print_totals
from advisor.report.terminal.subject import print_gpu, print_plan
from advisor.report.terminal.text import print_command, print_paragraph, print_title, print_warnings
from advisor.report.words import clean, sentence
from advisor.units import duration, gib, size

if TYPE_CHECKING:  # this screen loads no more of the rest than its own values did
    from advisor.launch.attempt import Attempt
    from advisor.launch.data import DataFacts
    from advisor.launch.host_ram import RamNeed
    from advisor.launch.probing import Probed
    from advisor.launch.resolve import Launch
    from advisor.launch.stepdown import StepDown

_LONGEST_EXAMPLE = 1500
_NOT_PROBED = "not probed"


def render_launch(launch: Launch, console: Console) -> None:
    """What will be trained, on what, with which memory, and what it leaves."""
    from advisor.fit import explain_fit

    print_gpu(launch.gpu, console)
    label = f"{clean(launch.model.label)} · "
    print_paragraph(console, f"from {launch.job.model_path}", label=label, indent="  ")
    print_plan(launch.job.plan, console)
    if launch.advice is not None and launch.advice.recommended is not None:
        print_paragraph(console, sentence(launch.advice.reason), label="Why: ", indent="  ")
    if launch.data is not None:
        _print_data(launch.data, launch, console)
    if launch.fit is not None and launch.memory is not None:
        print_fit(launch.fit, explain_fit(launch.fit, launch.memory.at), console)
    console.print()
    print_totals(_what_it_takes(launch), console)
    warnings = launch.advice.warnings if launch.advice is not None else launch.gpu.notes
    print_warnings((*launch.notes, *warnings), console)


def _print_data(data: DataFacts, launch: Launch, console: Console) -> None:
    console.print()
    print_title(console, "Data")
    lengths = ", ".join(f"{'longest' if p == 100 else f'{p} %'} {n:,}" for p, n in data.percentiles)
    cut = f"{data.truncated:,} longer ones are cut" if data.truncated else "none is longer"
    rows = [
        ("source", clean(data.source)),
        ("samples", f"{data.train_samples:,} to train on, {data.validation_samples:,} held out ({data.format})"),
        ("tokens", f"{data.tokens:,} in all; per sample: {lengths}"),
        ("sequence length", f"{launch.job.plan.seq_len:,} tokens: {cut}"),
    ]
    if data.left_out:
        rows.append(("left out", f"{data.left_out:,} samples"))
    if launch.packing is not None:
        said = launch.packing.reason
        if launch.packing.packs:
            said += f" {_number(launch.packing.effective_batch, 'row')} to an optimizer step."
        rows.append(("packing", f"{'yes' if launch.packing.packs else 'no'}. {said}"))
    print_totals(rows, console)
    print_warnings(data.notes, console)
    console.print()
    print_title(console, "First example, as the model sees it; what carries loss is between » and «")
    _print_example(data.first.pieces, console)


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _print_example(pieces: Sequence[tuple[str, bool]], console: Console) -> None:
    shown, room = Text(), _LONGEST_EXAMPLE
    for text, carries_loss in pieces:
        part = text[:room]
        lines = "\n".join(map(clean, part.splitlines())) + ("\n" if part.endswith("\n") else "")
        shown.append(f"»{lines}«" if carries_loss else lines, style="bold green" if carries_loss else "dim")
        room -= len(part)
        if room <= 0:
            shown.append(" …")
            break
    console.print(shown)


def _what_it_takes(launch: Launch) -> list[tuple[str, str]]:
    from advisor.training.optimizer import learning_rate_of

    plan, disk, model = launch.job.plan, launch.preflight.disk, launch.preflight.model
    training = plan.training
    epochs = f"{training.epochs:g} epoch{'' if training.epochs == 1 else 's'}"
    length = f"{training.max_steps:,} steps" if training.max_steps is not None else epochs
    rows = [
        ("training", f"{length}, learning rate {learning_rate_of(plan):g}, {training.schedule}, seed {training.seed}"),
        ("run folder", clean(_short(launch.job.out))),
    ]
    if model is not None and model.download_bytes:
        rows.append(("download", f"{size(model.download_bytes)} into {clean(model.cache or '')}"))
    if disk is not None:
        parts = f"{disk.checkpoints} checkpoints of {size(disk.checkpoint_bytes)}, {size(disk.final_bytes)} at the end"
        rows.append(("disk", f"up to {size(disk.total_bytes)}: {parts}"))
    if launch.preflight.ram is not None:
        rows.append(("host RAM", _ram(launch.preflight.ram, launch.preflight.ram_available_bytes)))
    return rows


def _ram(need: RamNeed, available_bytes: int | None) -> str:
    """What has to be there, and what is seen beside it while there is room."""
    said = f"up to {size(need.required_bytes)}"
    if available_bytes is not None:
        said += f" of {size(available_bytes)} free"
    if need.mapped_bytes:
        said += f"; while loading, {size(need.mapped_bytes)} of weight files on top, as far as there is room"
    return said


def render_dry_run(launch: Launch, probed: Probed | None, console: Console) -> None:
    """Everything that would be started, to the letter, and the probe's verdict."""
    from advisor.launch.command import CONFIG_FILE, JOB_FILE, accelerate_config, training_command
    from advisor.profiles import plan_to_toml

    for title, text in (
        ("Resolved plan (plan.toml)", plan_to_toml(launch.job.plan)),
        (f"accelerate's configuration ({CONFIG_FILE})", accelerate_config(launch.job.plan, launch.gpu)),
    ):
        console.print()
        print_title(console, title)
        for line in text.splitlines():
            console.print(Text(f"  {clean(line)}"), soft_wrap=True)
    console.print()
    print_title(console, "Command")
    print_command(console, training_command(launch.job, launch.gpu).text)
    if launch.job.resume:
        from advisor.launch.resume import go_on_command

        file = os.path.join(_short(launch.job.out), JOB_FILE)
        print_paragraph(console, f"{file} says what was done before; it is written anew by the command that goes on:")
        print_command(console, go_on_command(launch.job))
    console.print()
    render_probed(probed, console)
    said = "Dry run: nothing was trained and no weights were downloaded."
    folder = _short(launch.job.out)
    where = f"{folder} is as it was." if launch.job.resume else f"{folder} holds what the command starts."
    print_paragraph(console, f"{said} {where}", style="dim")


def render_probed(probed: Probed | None, console: Console) -> None:
    """The probe's verdict, and what was given up for it."""
    if probed is not None:
        for step in probed.steps_down:
            print_paragraph(console, f"Out of memory in the probe; taken instead: {step.change}.", label="! ")
    print_paragraph(console, _probe_verdict(probed), label="Probe: ", indent="  ")


def _probe_verdict(probed: Probed | None) -> str:
    if probed is None:
        return f"{_NOT_PROBED}."
    reached = f"peak reserved {gib(probed.reserved_bytes)}. " if probed.reserved_bytes is not None else ""
    return f"{'it holds' if probed.holds else 'it does not hold'}: {reached}{probed.message}".rstrip(": ")


def render_start(launch: Launch, console: Console) -> None:
    """What happens now, for the minutes in which a large model loads and nothing else is seen."""
    log = os.path.join(_short(launch.job.out), "log.txt")
    said = f"the model is loaded first. Ctrl-C saves and stops. The log: {log}"
    print_paragraph(console, said, label="Training: ", indent="  ")


def render_report(attempts: Sequence[Attempt], probed: Probed | None, console: Console) -> None:
    """A finished run in one table: memory as predicted, probed and reached, time, losses, where everything is."""
    last = attempts[-1]
    result, job = last.ended.result, last.launch.job
    console.print()
    print_title(console, f"Trained: {_number(result.step, 'step')}", "bold green")
    print_totals([*_memory_rows(last, probed), *_result_rows(last), ("run folder", clean(_short(job.out)))], console)
    for attempt in attempts[:-1]:
        if attempt.aside is not None:
            print_paragraph(console, f"What ran out of memory before is in {_short(attempt.aside)}.", style="dim")
    console.print()
    print_title(console, "To use it:")
    for line in usage(last):
        console.print(Text(f"  {clean(line)}"), soft_wrap=True)
    if job.plan.method != "full":
        print_title(console, "To merge it into the model:")
        print_command(console, f"phi3-advise merge {_quoted(job.out)}")


def usage(attempt: Attempt) -> tuple[str, ...]:
    """The lines of Python that load what a run left."""
    job = attempt.launch.job
    adapter = job.plan.method != "full"
    name = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    run = _short(job.out)
    imports = (f"from peft import {name}", "from transformers import AutoTokenizer")
    return (
        *(imports if adapter else (f"from transformers import {name}, AutoTokenizer",)),
        f'model = {name}.from_pretrained("{run}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{run}")',
    )


def _memory_rows(attempt: Attempt, probed: Probed | None) -> Iterable[tuple[str, str]]:
    job, result = attempt.launch.job, attempt.ended.result
    measured = probed.reserved_bytes if probed is not None else job.probed_reserved_bytes
    yield "peak reserved", ""
    yield "  predicted", _amount(job.predicted_reserved_bytes)
    yield "  probed", _amount(measured) if measured is not None else "not probed"
    yield "  actual", _amount(result.peak_reserved_bytes, "not counted by this device")
    if result.peak_allocated_bytes is not None:
        predicted = _amount(job.predicted_allocated_bytes)
        yield "peak allocated", f"{_amount(result.peak_allocated_bytes)} ({predicted} predicted)"
    if result.driver_bytes is not None:
        yield "driver's view", gib(result.driver_bytes)
    if result.host_peak_bytes is not None:
        said = f"{size(result.host_peak_bytes)} resident at the peak"
        if attempt.launch.gpu.backend == "cpu" and attempt.launch.memory is not None:
            said += f" ({size(attempt.launch.memory.total_bytes)} predicted, libraries included)"
        need = attempt.launch.preflight.ram
        if need is not None and need.mapped_bytes:
            said += f" ({size(need.required_bytes)} predicted, and up to {size(need.mapped_bytes)} of weight files)"
        yield "host RAM", said


def _amount(size_bytes: int | None, unknown: str = "not known") -> str:
    return size(size_bytes) if size_bytes is not None else unknown


def _result_rows(attempt: Attempt) -> Iterable[tuple[str, str]]:
    result = attempt.ended.result
    if result.seconds:
        rate = f", {result.tokens_per_second:,.0f} tokens/s" if result.tokens_per_second is not None else ""
        yield "time", f"{duration(result.seconds)}{rate}"
    if result.first_loss is not None and result.final_loss is not None:
        held = f", {result.evaluation_loss:.4f} on what was held out" if result.evaluation_loss is not None else ""
        yield "loss", f"{result.first_loss:.4f} at first, {result.final_loss:.4f} at the end{held}"


def render_interrupted(attempt: Attempt, console: Console) -> None:
    """Where the checkpoint is, and how to go on."""
    from advisor.launch.attempt import resume_command

    result, job = attempt.ended.result, attempt.launch.job
    console.print()
    at = f"at step {result.step:,} of {result.steps:,}" if result.steps else "before the first step"
    said = f"{at}." if result.checkpoint and not attempt.ended.killed else f"{at}. {result.message}"
    print_paragraph(console, said, label="Stopped ", label_style="bold yellow", indent="  ")
    if result.checkpoint is None:
        print_paragraph(console, f"There is no checkpoint; what there is is in {_short(job.out)}.")
        print_title(console, "To start it again:")
    else:
        print_paragraph(console, f"The last checkpoint is {_short(result.checkpoint)}.")
        print_title(console, "To go on:")
    print_command(console, resume_command(attempt.launch))


def render_out_of_memory(attempt: Attempt, step: StepDown | None, taken: bool, console: Console) -> None:
    """What was predicted, what was reached, and the next plan to try."""
    job, result = attempt.launch.job, attempt.ended.result
    console.print()
    label = f"Out of memory at step {result.step + 1:,}. "
    print_paragraph(console, result.message, label=label, label_style="bold red", indent="  ")
    reached = result.peak_reserved_bytes
    print_totals(
        [
            ("predicted", f"{_amount(job.predicted_reserved_bytes)} reserved at the peak"),
            ("probed", _amount(job.probed_reserved_bytes) if job.probed_reserved_bytes is not None else "not probed"),
            ("reached", f"{_amount(reached, 'not counted by this device')}, and more was asked for"),
            ("there is", f"{_amount(job.capacity_bytes)} for this process's tensors"),
        ],
        console,
    )
    if step is None:
        hint = "Nothing is left to give up that keeps what is learned: take a shorter --seq-len, or a larger GPU."
        print_paragraph(console, hint, label="Next: ", indent="  ")
        return
    label = "Taken instead: " if taken else "Next plan to try: "
    print_paragraph(console, f"{step.change}; the effective batch stays.", label=label, indent="  ")
    print_plan(step.plan, console)
    if result.checkpoint is not None and not taken:
        from advisor.launch.attempt import resume_command

        kept = f"The last checkpoint, {_short(result.checkpoint)}, is complete. Where more memory is free, it goes on:"
        print_paragraph(console, kept)
        print_command(console, resume_command(attempt.launch))
        print_paragraph(console, "By the next plan it starts from the beginning:")


def render_set_aside(attempt: Attempt, console: Console) -> None:
    """Where the files of an attempt are that another one follows, in its folder and from its beginning."""
    if attempt.aside is not None:
        said = f"The training starts from the beginning; what the attempt before left is in {_short(attempt.aside)}."
        print_paragraph(console, said, style="dim")


def _short(path: str) -> str:
    """A path as a person would type it here."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _quoted(path: str) -> str:
    from shlex import quote

    return quote(_short(path))
