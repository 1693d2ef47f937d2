"""One attempt at a training, and what follows one that ran out of memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO, Any

from advisor.launch.command import training_command
from advisor.launch.folder import read_settings, set_attempt_aside, write_run, write_settings
from advisor.launch.process import Ended, supervise
from advisor.launch.resolve import Launch
from advisor.launch.stepdown import StepDown, step_down

WORTH_TRYING = 0.97
"""A plan that the closed form gives less than 3 % less memory is not worth another loading of the model; assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A training that was started, and how it ended."""

    launch: Launch
    ended: Ended
    aside: str | None = None
    """Where its files are, if another attempt has the run folder."""


def train(launch: Launch, *, stdout: IO[Any] | None = None) -> Attempt:
    """Writes the run folder, trains, and waits for the end.

    Args:
        launch: what `resolve_advised`, `resolve_plan` or `resolve_resumed` found that it can start.
        stdout: where the training shows itself; None is this process's own.

    Raises:
        InputError: the run folder cannot be written to.
    """
    before = read_settings(launch.job.out) if launch.job.resume else {}
    write_run(launch.job, launch.gpu, launch.preflight.check)
    with _tokens_left(launch):
        ended = supervise(training_command(launch.job, launch.gpu), launch.job.out, stdout=stdout)
    if ended.result.outcome == "failed" and not ended.result.step:
        # It did not begin, so the run is what it was: with other data, say, it could never be resumed again.
        write_settings(launch.job.out, before)
    return Attempt(launch=launch, ended=ended)


@contextmanager
def _tokens_left(launch: Launch) -> Iterator[None]:
    """The rows that were tokenised here are in the run folder until the training has read them."""
    if launch.data is None or launch.data.tokenized is None:
        yield
        return
    from advisor.training.data import drop_tokens, leave_tokens

    leave_tokens(launch.job.out, launch.data.tokenized.rows, launch.data.tokenized.key)
    try:
        yield
    finally:
        drop_tokens(launch.job.out)


def next_plan(launch: Launch, *, shorter: bool = False) -> StepDown | None:
    """The next plan after one that ran out of memory; steps that save next to nothing are taken together.

    Args:
        launch: what ran out of memory.
        shorter: whether sequences may be cut.
    """
    advised = [part.plan for part in launch.advice.methods] if launch.advice is not None else []
    usable = launch.preflight.check.bitsandbytes_error is None
    plan = launch.job.plan
    changes: list[str] = []
    before = launch.memory.reserved_bytes if launch.memory is not None else None
    while True:
        step = step_down(plan, launch.gpu, shorter=shorter, advised=advised, has_bitsandbytes=usable)
        if step is None:
            return None
        plan = step.plan
        if plan.method == launch.job.plan.method:
            changes.append(step.change)
        else:
            # Another method is a saving of its own: what was not enough before it is not given up as well.
            plan, changes = replace(plan, seq_len=launch.job.plan.seq_len), [step.change]
        after = launch.with_plan(plan).memory
        if before is None or after is None or after.reserved_bytes <= WORTH_TRYING * before:
            return StepDown(plan=plan, change=", ".join(changes))


def step_down_until_it_fits(launch: Launch, *, shorter: bool = False) -> tuple[Launch, tuple[StepDown, ...]]:
    """The first smaller plan that fits by the closed form; the same launch where none does, or nothing is wrong.

    Args:
        launch: what may not fit.
        shorter: whether sequences may be cut.
    """
    steps: list[StepDown] = []
    smaller = launch
    while not smaller.fits:
        step = next_plan(smaller, shorter=shorter)
        if step is None:
            return launch, ()
        steps.append(step)
        smaller = smaller.with_plan(step.plan)
    return smaller, tuple(steps)


def start_over(attempt: Attempt, step: StepDown) -> tuple[Attempt, Launch]:
    """The attempt with its files set aside, and the run by its next plan in the same folder."""
    aside = set_attempt_aside(attempt.launch.job.out)
    moved = Attempt(launch=attempt.launch, ended=attempt.ended, aside=aside)
    return moved, attempt.launch.with_plan(step.plan)


def resume_command(launch: Launch) -> str:
    """The command that goes on with an interrupted run."""
    from shlex import quote

    device = " --device cpu" if launch.gpu.backend == "cpu" else ""
    return f"phi3-advise train --resume --out {quote(short_path(launch.job.out))}{device}"


def short_path(path: str) -> str:
    """A path as a person would type it here."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


__all__ = ["Attempt", "next_plan", "resume_command", "short_path", "start_over", "step_down_until_it_fits", "train"]
