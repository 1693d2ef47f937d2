"""What `phi3-advise --launch` and `phi3-advise train` have in common: show, ask, train, report."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import click

from advisor.cli.common import print_json, progress_line
from advisor.errors import InputError, RunFailedError
from advisor.report.language import localise
from advisor.stopping import silence_stdout

if TYPE_CHECKING:
    from rich.console import Console

    from advisor.hardware import Gpu
    from advisor.launch import Attempt, Launch, StepDown
    from advisor.launch.probing import Probed
    from advisor.launch.resume import Said

Resolve = Callable[[Callable[[str], None]], "Launch"]

_SIGNALLED = 128
"""As a shell reports a program that a signal ended: this and the signal's number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conduct:
    """How a run is conducted, whatever is trained."""

    dry_run: bool = False
    yes: bool = False
    fallback: bool = False
    as_json: bool = False
    debug: bool = False
    save_plan: str | None = None
    probe: bool = True


def conduct(resolve: Resolve, how: Conduct) -> int:
    """Resolves a run, shows it, asks where somebody can answer, trains, reports; returns the exit code.

    Raises:
        AdvisorError: the run cannot start, or failed.
    """
    from advisor.launch.folder import write_run
    from advisor.report.terminal import make_console
    from advisor.report.terminal.launch import render_dry_run, render_launch, render_probed

    console = make_console(stderr=how.as_json)
    with progress_line(how.debug, "Preparing") as progress:
        launch = resolve(progress)
    if launch.advice is not None and launch.advice.recommended is None:
        return _nothing_fits(launch, how, console)
    if how.save_plan is not None:
        from advisor.profiles import save_plan_file

        save_plan_file(launch.job.plan, os.path.expanduser(how.save_plan))
    if how.fallback:
        launch = _smaller(launch, console)
    render_launch(launch, console)
    probed = _probe(launch, how)
    launch = probed.launch if probed is not None else launch
    if how.dry_run:
        if not launch.job.resume:
            write_run(launch.job, launch.gpu, launch.preflight.check)
        render_dry_run(launch, probed, console)
        _print_object(how, launch, probed, [])
        return 0 if launch.fits and (probed is None or probed.holds) else 1
    render_probed(probed, console)
    holds = launch.fits if probed is None else probed.holds
    if not _may_start(launch, holds, how):
        return 0 if holds else 1
    return _train(launch, probed, how, console)


def _smaller(launch: Launch, console: Console) -> Launch:
    """The first smaller plan that fits, and what was given up for it."""
    from advisor.launch.attempt import step_down_until_it_fits
    from advisor.report.terminal.text import print_paragraph

    smaller, steps = step_down_until_it_fits(launch)
    # Of several steps of one kind, the last says it all.
    changes = {step.change.partition(" ")[0]: step.change for step in steps}
    if changes:
        print_paragraph(
            console, f"It does not fit. Taken instead: {', '.join(changes.values())}.", label="! ", indent="  "
        )
    return smaller


def _probe(launch: Launch, how: Conduct) -> Probed | None:
    """The dry run; a plan that was given as it stands is made smaller only where --fallback says so."""
    from advisor.launch.probing import is_hopeless, probe_launch

    if not how.probe or launch.job.resume or is_hopeless(launch):
        return None
    steps_down = how.fallback or launch.advice is not None
    asks = not how.yes and _somebody_answers(how)
    with progress_line(how.debug, "Probing") as progress:

        def consents(step: StepDown) -> bool:
            with progress.paused():
                return _may_cut(step)

        return probe_launch(launch, progress, steps_down=steps_down, consents=consents if asks else None)


def _may_cut(step: StepDown, *, kept: bool = False) -> bool:
    """Asks whether sequences may be cut, which changes what is learned."""
    question = f"{localise(_again(step, kept))} {localise('Longer samples lose their ends.')}"
    return click.confirm(question, default=False, err=True)


def _may_start(launch: Launch, holds: bool, how: Conduct) -> bool:
    """Whether to train: asked where somebody can answer, and refused where memory speaks against it and nobody can.

    Raises:
        InputError: it does not fit, and nobody said to try all the same.
    """
    if how.yes:
        return True
    if _somebody_answers(how):
        return click.confirm(
            localise("Train now?" if holds else "It does not fit. Train all the same?"), default=holds, err=True
        )
    if holds:
        return True
    missing = launch.fit.missing_bytes if launch.fit is not None else 0
    from advisor.units import gib

    raise _DoesNotFitError(
        "The plan does not fit, and nobody is here to ask." if missing else "The plan does not hold in the probe.",
        why=f"By the estimate it is {gib(missing)} short." if missing else "",
        hint="Let --fallback take the next smaller plan, or try it all the same with --yes.",
    )


class _DoesNotFitError(InputError):
    """Exit code 1: nothing fits."""

    exit_code = 1


def _somebody_answers(how: Conduct) -> bool:
    """Whether a question would be seen and answered: in a pipe, or in a notebook's cell, nobody does."""
    from advisor.report.terminal import make_console
    from advisor.report.terminal.training import is_redrawable

    return not how.as_json and sys.stdin is not None and sys.stdin.isatty() and is_redrawable(make_console())


def _train(launch: Launch, probed: Probed | None, how: Conduct, console: Console) -> int:
    from advisor.launch import fetch_weights, start_over, train
    from advisor.launch.process import restore_cursor
    from advisor.report.terminal.launch import render_out_of_memory, render_set_aside, render_start

    fetch_weights(launch)
    attempts: list[Attempt] = []
    while True:
        render_start(launch, console)
        try:
            attempt = train(launch, stdout=_shown_on(how))
        finally:
            restore_cursor()
        attempts.append(attempt)
        if attempt.ended.result.outcome != "out_of_memory":
            break
        step, taken = _next_plan(launch, how, kept=attempt.ended.result.checkpoint is not None)
        render_out_of_memory(attempt, step, taken, console)
        if step is None or not taken:
            _leave_next_plan(attempt, step, console)
            break
        attempts[-1], launch = start_over(attempt, step)
        render_set_aside(attempts[-1], console)
    _print_object(how, launch, probed, attempts)
    return _report(attempts, probed, console)


def _next_plan(launch: Launch, how: Conduct, *, kept: bool = False) -> tuple[StepDown | None, bool]:
    """The plan after one that ran out of memory, and whether it is taken.

    Sequences are cut only with consent: that changes what is learned. --yes answers the question that was asked before
    the training, and none of these.

    Args:
        launch: what ran out of memory.
        how: what was said before.
        kept: whether there is a checkpoint, which another plan cannot go on from.
    """
    from advisor.launch import next_plan

    asks = not how.yes and _somebody_answers(how)
    step = next_plan(launch, shorter=asks)
    if step is not None and step.plan.seq_len < launch.job.plan.seq_len:
        if _may_cut(step, kept=kept):
            return step, True
        step = next_plan(launch)
    if step is None or how.fallback:
        return step, step is not None
    return step, asks and click.confirm(localise(_again(step, kept)), default=not kept, err=True)


def _again(step: StepDown, kept: bool) -> str:
    if kept:
        return f"Out of memory. Start from the beginning with {step.change}? What was trained so far is set aside."
    return f"Out of memory. Start again with {step.change}?"


def _shown_on(how: Conduct) -> IO[Any] | None:
    return sys.stderr if how.as_json else None


def _leave_next_plan(attempt: Attempt, step: StepDown | None, console: Console) -> None:
    """Writes the next plan into the run folder, with the command that trains it."""
    if step is None:
        return
    from shlex import quote

    from advisor.profiles import save_plan_file
    from advisor.report.terminal.text import print_command

    path = os.path.join(attempt.launch.job.out, "next-plan.toml")
    if os.path.exists(path):
        os.remove(path)
    save_plan_file(step.plan, path)
    device = " --device cpu" if attempt.launch.gpu.backend == "cpu" else ""
    data = quote(attempt.launch.job.data)
    print_command(console, f"phi3-advise train --plan {quote(path)} --data {data}{device}")


def _report(attempts: list[Attempt], probed: Probed | None, console: Console) -> int:
    """The last attempt's screen and exit code.

    Raises:
        RunFailedError: it failed.
    """
    from advisor.report.terminal.launch import render_interrupted, render_report

    last = attempts[-1]
    result = last.ended.result
    if result.outcome == "finished":
        render_report(attempts, probed, console)
        return 0
    if result.outcome == "interrupted":
        try:
            render_interrupted(last, console)
        except OSError:  # of a terminal that was closed, which is what stopped it
            silence_stdout()
        return _SIGNALLED + (last.ended.signal or result.signal or 2)
    if result.outcome == "out_of_memory":
        return RunFailedError.exit_code
    raise failure(last)


def failure(attempt: Attempt) -> RunFailedError:
    """What went wrong in a run, why, and what to do."""
    from advisor.launch.attempt import resume_command

    result, job = attempt.ended.result, attempt.launch.job
    titles = {
        "diverged": f"The training diverged at step {result.step:,}: the loss is no number.",
        "disk_full": f"The disk of {job.out} is full, at step {result.step:,}.",
        "failed": f"The training failed at step {result.step:,}." if result.step else "The training did not begin.",
    }
    kept = f" The last checkpoint, {result.checkpoint}, is complete." if result.checkpoint else ""
    log, hints = os.path.join(job.out, "log.txt"), [result.hint] if result.hint else []
    usable = result.exit_code in (None, RunFailedError.exit_code)
    if result.outcome == "failed" and usable and log not in result.hint:
        hints.append(f"The log: {log}")
    if result.checkpoint and result.outcome != "diverged" and usable:
        hints.append(f"Then go on: {resume_command(attempt.launch)}")
    error = RunFailedError(titles[result.outcome], why=f"{result.message}{kept}", hint="\n".join(hints))
    error.exit_code = result.exit_code or RunFailedError.exit_code
    return error


def _nothing_fits(launch: Launch, how: Conduct, console: Console) -> int:
    from advisor.report.terminal import render_advice

    assert launch.advice is not None
    render_advice(launch.advice, console)
    _print_object(how, launch, None, [])
    return 1


def _print_object(how: Conduct, launch: Launch, probed: Probed | None, attempts: list[Attempt]) -> None:
    if how.as_json:
        from advisor.report.run_json import launch_object

        print_json(launch_object(launch, probed, attempts))


def hyperparameters(**given: Any) -> dict[str, Any]:
    """Those of the plan's training table that were given."""
    return {name: value for name, value in given.items() if value is not None}


def resumed(out: str | None, device: str | None, said: Said, **fixed: object) -> Resolve:
    """The resolver of a run that goes on.

    Args:
        out: the run folder.
        device: where it goes on; None where it was.
        said: what may be another than before.
        fixed: options that say what the run's own plan says, by name; None where one was not given.

    Raises:
        InputError: no folder is named, or the run would have to be another.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in fixed.items() if value is not None]
    if given:
        raise InputError(
            f"A run that is resumed goes on by its own plan: {', '.join(given)} cannot be given.",
            why="With other settings its states would mean something else.",
            hint="Leave that out; --epochs and --max-steps may be longer than they were.",
        )
    if out is None:
        raise InputError("--resume needs the run's folder.", hint="Name it: --resume --out runs/…")
    folder = os.path.abspath(os.path.expanduser(out))

    def resolve(_: Callable[[str], None]) -> Launch:
        from advisor.cli.common import detect_gpu
        from advisor.launch import resolve_resumed

        return resolve_resumed(folder, detect_gpu(device) if device else None, require_device, said)

    return resolve


def require_device(device: str | None) -> Gpu:
    """This machine's device to train on.

    Raises:
        EnvironmentLacksError: there is none.
    """
    from advisor.cli.common import detect_gpu
    from advisor.errors import EnvironmentLacksError

    found = detect_gpu(device)
    if found is None:
        raise EnvironmentLacksError(
            "No GPU was found to train on.",
            hint="Train on the processor, which is slow: --device cpu. Or plan for another machine: --gpu t4 "
            "--save-plan plan.toml",
        )
    return found


__all__ = ["Conduct", "conduct", "failure", "hyperparameters", "require_device", "resumed"]
