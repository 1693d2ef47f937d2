"""A run that goes on: as it was, longer where that is said, and what is different from before said first."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from advisor.errors import InputError
from advisor.hardware import Gpu
from advisor.hyperparameters import Hyperparameters
from advisor.launch.command import torch_device
from advisor.launch.folder import PLAN_FILE, environment, read_environment, read_run
from advisor.launch.preflight import preflight, raise_problems
from advisor.launch.process import running_trainer
from advisor.launch.resolve import Launch, architecture_of, data_path, judge, with_memory, with_said
from advisor.plan import Plan, plan_to_fields
from advisor.profiles import find_model, load_plan
from advisor.training.checkpoints import CHECKPOINTS, complete_checkpoints, last_sound_checkpoint, newer_than
from advisor.training.job import Job
from advisor.training.result import Result, read_result

_LENGTH = ("epochs", "max_steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What may be said of a run that goes on."""

    data: str | None = None
    """Where the data is now; None where it was."""

    length: Mapping[str, Any] = field(default_factory=dict)
    """`epochs` or `max_steps`, counted from the run's beginning."""

    skip_bad_rows: bool = False
    report_to: tuple[str, ...] = ()
    """Empty reports where the run did."""

    trust_remote_code: bool = False


def resolve_resumed(out: str, gpu: Gpu | None, find_gpu: Callable[[str], Gpu], said: Said) -> Launch:
    """A run that was interrupted, or a finished one that is to be longer.

    Args:
        out: the run folder.
        gpu: the device; None takes the one that it ran on.
        find_gpu: finds that one by its name.
        said: what may have changed.

    Raises:
        InputError: no run there, one that is under way or has finished, or a plan.toml that is another one now.
        EnvironmentLacksError: this machine lacks something.
    """
    job = read_run(out)
    _refuse_what_is_running(out)
    training = with_said(_training_as_edited(job.plan, out), said.length)
    folder = Path(out, CHECKPOINTS)
    sound = last_sound_checkpoint(folder)
    done = sound.step if sound is not None else 0
    _refuse_what_is_done(out, job.plan.training, training, read_result(Path(out)), done)
    device = gpu if gpu is not None else find_gpu(job.device)
    job = replace(
        job,
        plan=replace(job.plan, training=training),
        resume=bool(complete_checkpoints(folder)),
        device=torch_device(device),
        data=data_path(said.data) if said.data is not None else job.data,
        skip_bad_rows=job.skip_bad_rows or said.skip_bad_rows,
        report_to=said.report_to or job.report_to,
        trust_remote_code=job.trust_remote_code or said.trust_remote_code,
    )
    source = find_model(job.plan.model)
    architecture = architecture_of(source)
    memory, fit = judge(job.plan, architecture, device)
    spilled = memory.host_bytes if memory is not None else 0
    found = preflight(replace(job, resume=True), device, architecture, spilled_bytes=spilled)
    raise_problems(found)
    torn = newer_than(folder, done)
    return Launch(
        job=with_memory(job, memory, device),
        gpu=device,
        model=source,
        architecture=architecture,
        preflight=found,
        memory=memory,
        fit=fit,
        notes=(
            *_where_it_goes_on(done, torn),
            *_what_is_newer(read_environment(out), environment(device, found.check)),
        ),
    )


def go_on_command(job: Job) -> str:
    """The command that goes on as `job` says; what it says anew is part of it.

    Args:
        job: what was resolved for the run in its folder, which still is what it was.
    """
    from advisor.launch.attempt import short_path

    before = read_run(job.out)
    was, now = _training_as_edited(before.plan, job.out), job.plan.training
    words = ["phi3-advise", "train", "--resume", "--out", short_path(job.out)]
    if job.device == "cpu":
        words += ["--device", "cpu"]
    if job.data != before.data:
        words += ["--data", job.data]
    if now.max_steps is not None and now.max_steps != was.max_steps:
        words += ["--max-steps", str(now.max_steps)]
    elif now.max_steps is None and (now.epochs, now.max_steps) != (was.epochs, was.max_steps):
        words += ["--epochs", f"{now.epochs:g}"]
    for name in ("skip_bad_rows", "trust_remote_code"):
        if getattr(job, name) and not getattr(before, name):
            words.append(f"--{name.replace('_', '-')}")
    if job.report_to != before.report_to:
        words += [word for name in job.report_to for word in ("--report-to", name)]
    return shlex.join(words)


def _training_as_edited(plan: Plan, out: str) -> Hyperparameters:
    """The run's hyperparameters, with the length that its plan.toml has now.

    Raises:
        InputError: anything else in it is not what the run began with.
    """
    path = os.path.join(out, PLAN_FILE)
    if not os.path.isfile(path):
        return plan.training
    now = load_plan(path)
    was = replace(plan, training=replace(plan.training, epochs=now.training.epochs, max_steps=now.training.max_steps))
    changed = sorted(_flat(now).items() ^ _flat(was).items())
    if changed:
        names = ", ".join(dict.fromkeys(name for name, _ in changed))
        raise InputError(
            f"{path} was changed since the run began: {names}.",
            why="A run goes on by the plan that it began with: its states would mean something else under another.",
            hint="Write it back, or train the other plan from the start in a folder of its own: --plan, --out",
        )
    return now.training


def _flat(plan: Plan) -> dict[str, str]:
    """Each field of a plan and of its tables as text, by its name in the file."""
    flat: dict[str, str] = {}
    for name, value in plan_to_fields(plan).items():
        inner = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        flat.update({key: json.dumps(part) for key, part in inner.items()})
    return flat


def _refuse_what_is_running(out: str) -> None:
    """Two trainings in one folder would write over each other's checkpoints.

    Raises:
        InputError: one is under way.
    """
    number = running_trainer(out)
    if number is not None:
        raise InputError(
            f"The run in {out} is being trained now, by process {number}.",
            hint=f"Wait for it, or let it save and stop: kill {number}",
        )


def _refuse_what_is_done(
    out: str, before: Hyperparameters, now: Hyperparameters, result: Result | None, done: int
) -> None:
    """A finished run goes on where it is to be longer, and no run goes back.

    Raises:
        InputError: there is nothing left to train, or nothing to go on from.
    """
    finished = result is not None and result.outcome == "finished"
    steps, epochs = now.max_steps, now.epochs
    if steps is not None and (steps < done or (finished and steps == done and steps != before.max_steps)):
        raise InputError(
            f"The run in {out} has taken {done:,} steps already, and is to have {steps:,}.",
            hint=f"--max-steps counts from the run's beginning: give more than {done:,}.",
        )
    if not finished:
        return
    assert result is not None
    same = all(getattr(before, name) == getattr(now, name) for name in _LENGTH)
    if same or (steps is None and before.max_steps is None and epochs <= before.epochs):
        raise InputError(
            f"The run in {out} has finished, at step {result.step:,} of {result.steps:,}.",
            why="Its artefacts are there.",
            hint=f"To train it longer: --resume --out {out} with --max-steps (more than {result.step:,}) or --epochs. "
            "To start another: a folder of its own, --out DIR",
        )
    if not done:
        raise InputError(
            f"The run in {out} has finished, and its checkpoints are gone: there is nothing to go on from.",
            hint="Start another run with a folder of its own: --out DIR",
        )


def _where_it_goes_on(done: int, torn: tuple[str, ...]) -> list[str]:
    """From which step, and which checkpoints cannot be used."""
    said = [f"The run goes on from its checkpoint of step {done:,}."]
    if not done:
        said = ["The run has no checkpoint to go on from, and starts again from the beginning."]
    return [*said, f"Not whole, and passed over: {', '.join(torn)}."] if torn else said


def _what_is_newer(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Versions and a device that are not those that the run began with; the last bits of its losses depend on them."""
    was, installed = before.get("packages"), now["packages"]
    changed = []
    if isinstance(was, Mapping):
        changed = [
            f"{name} {was[name]} → {installed.get(name, 'none')}"
            for name in was
            if name != "phi3-advise" and was[name] != installed.get(name)
        ]
    gpu = before.get("gpu")
    if isinstance(gpu, Mapping) and gpu.get("name") != now["gpu"]["name"]:
        changed.append(f"{gpu.get('name')} → {now['gpu']['name']}")
    if not changed:
        return []
    return [f"Changed since the run began, so that losses may differ in their last digits: {', '.join(changed)}."]


__all__ = ["Said", "go_on_command", "resolve_resumed"]
