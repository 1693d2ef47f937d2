"""What several commands do: find the GPU that is meant, read a plan, show progress, print JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from advisor.errors import EnvironmentLacksError, InputError
from advisor.hardware import Detection, Gpu
from advisor.plan import Plan
from advisor.profiles import Backend, GpuProfile, load_gpu, plan_with_defaults, read_toml
from advisor.report.language import localise, localise_label
from advisor.units import parse_size

if TYPE_CHECKING:  # rich is for the screens
    from rich.console import Console
    from rich.status import Status

TYPICAL_GPU = "t4"
"""Answered for where there is no GPU and none is named: what Colab gives away."""


ASSUMED_CAPABILITY = (8, 0)
"""Whose kernels are assumed where no GPU is named and none is here."""


def find_gpu(*, gpu: str | None, vram: str | None, free: str | None, device: str | None) -> Gpu:
    """The GPU that an answer is for: named, described, detected, or else a typical one.

    Raises:
        InputError: options that contradict each other, or an amount that is none.
        UnknownNameError: no such GPU.
        EnvironmentLacksError: the device that was asked for is not here.
    """
    from advisor.hardware import what_if

    if gpu is not None and device is not None:
        raise InputError(
            "--gpu and --device contradict each other.",
            why="One names a GPU that may be anywhere, the other one of this machine's.",
            hint="Leave one of them out.",
        )
    vram_bytes = parse_size(vram) if vram is not None else None
    free_bytes = parse_size(free) if free is not None else None
    if gpu is not None:
        return what_if(load_gpu(gpu), vram_bytes=vram_bytes, free_bytes=free_bytes)
    base = detect_gpu(device)
    if base is None and vram_bytes is None:
        note = "No GPU was found: this is the answer for a T4, as Colab gives away. Name yours with --gpu or --vram."
        typical = what_if(load_gpu(TYPICAL_GPU), free_bytes=free_bytes)
        return replace(typical, notes=(note, *typical.notes))
    return what_if(None, vram_bytes=vram_bytes, free_bytes=free_bytes, base=base)


def detect_gpu(device: str | None) -> Gpu | None:
    """This machine's GPU; None where there is none and none was asked for.

    Args:
        device: a number as nvidia-smi counts; or as torch spells it, cuda:1 being the second that CUDA offers; or cpu.

    Raises:
        InputError: no device is called that, or a number that is not there.
        EnvironmentLacksError: there is none of the kind that was asked for.
    """
    found = _find_device(device)
    if found is None:
        return None
    from advisor.probe.results import calibrated

    return calibrated(found)


def _find_device(device: str | None) -> Gpu | None:
    from advisor.hardware import choose, detect, read_cpu

    if device is not None and device.strip().lower() == "cpu":
        return read_cpu()
    found = detect()
    if device is not None and not device.strip().isdecimal():
        return _device_of_kind(device, found)
    number = int(device) if device is not None else None
    if not found.gpus and number is None:
        for warning in found.warnings:
            click.echo(f"phi3-advise: {localise(warning)}", err=True)
        return None
    chosen = choose(found.gpus, number)
    notes = [*chosen.notes, *found.warnings]
    if len(found.gpus) > 1 and number is None:
        notes.append(f"{len(found.gpus)} GPUs are here; this is the one with the most free memory (--device N).")
    return replace(chosen, notes=tuple(notes))


_KINDS: dict[str, tuple[Backend, ...]] = {"cuda": ("cuda", "rocm"), "xpu": ("xpu",), "mps": ("mps",)}
"""torch's names of devices; ROCm answers to CUDA's."""


def _device_of_kind(device: str, found: Detection) -> Gpu:
    """`cuda`: the one with the most free memory; `cuda:1`: the second that CUDA offers."""
    from advisor.hardware import choose

    kind, colon, place = device.strip().lower().partition(":")
    if kind not in _KINDS or (colon and not (place.isdecimal() and len(place) < 5)):
        raise InputError(
            f"{device[:40]!r} is no device.",
            hint="Write cuda, cuda:1, cpu, mps, xpu, or a number as nvidia-smi counts.",
        )
    there = [gpu for gpu in found.gpus if gpu.backend in _KINDS[kind]]
    if not there or (place and int(place) >= len(there)):
        number = f"{len(there)} of that kind" if there else "none of that kind"
        raise EnvironmentLacksError(
            f"There is no {device[:40]} here.",
            why=" ".join((f"Found: {number}.", *found.warnings)),
            hint="Train on the processor (--device cpu), or ask about a GPU by name: --gpu t4",
        )
    return there[int(place)] if place else choose(there)


def read_plan(
    path: str, gpu: str | None = None, *, vram: str | None = None, free: str | None = None
) -> tuple[Plan, Gpu]:
    """A plan file's plan, and the GPU that it is for: named, detected, or none.

    Args:
        path: the file.
        gpu: a GPU in place of the plan's, as a what-if: nothing of it is in use.
        vram: its memory, in place of what is known.
        free: how much of that is free.

    Raises:
        InputError: the file, a field, the GPU or an amount cannot be used.
    """
    fields: dict[str, Any] = read_toml(path)
    if gpu is not None:
        fields["gpu"] = gpu
    target = _plan_gpu(fields.get("gpu"), what_if_only=gpu is not None, vram=vram, free=free)
    plan = plan_with_defaults(fields, folder=os.path.dirname(path), dtype=target.dtype)
    return plan, target


def _plan_gpu(name: object, *, what_if_only: bool, vram: str | None, free: str | None) -> Gpu:
    """The plan's GPU, as it is in this machine if it is; a detected one; or an assumed capability and no judgement."""
    from advisor.hardware import what_if

    vram_bytes = parse_size(vram) if vram is not None else None
    free_bytes = parse_size(free) if free is not None else None
    if isinstance(name, str):
        profile = load_gpu(name)
        here = None if what_if_only else _detected_as(profile)
        return what_if(None if here else profile, vram_bytes=vram_bytes, free_bytes=free_bytes, base=here)
    detected = detect_gpu(None)
    if detected is not None or vram_bytes is not None or free_bytes is not None:
        return what_if(None, vram_bytes=vram_bytes, free_bytes=free_bytes, base=detected)
    note = "No GPU is named and none was found: kernels of compute capability 8.0 are assumed, and fit is not judged."
    return Gpu(
        name="no GPU",
        backend="cuda",
        total_bytes=0,
        driver_bytes=0,
        detected=False,
        capability=ASSUMED_CAPABILITY,
        bfloat16=True,
        notes=(note,),
    )


def _detected_as(profile: GpuProfile) -> Gpu | None:
    """This machine's GPU of that profile, the one with the most free memory of several; None if there is none."""
    from advisor.hardware import choose, detect

    same = [gpu for gpu in detect().gpus if gpu.profile == profile]
    if not same:
        return None
    chosen = choose(same)
    note = f"The plan's {profile.product} is in this machine: what is free of it now counts."
    return replace(chosen, notes=(*chosen.notes, note))


def print_json(value: dict[str, Any]) -> None:
    """One object on stdout."""
    import json

    click.echo(json.dumps(value, indent=1))


class ProgressLine:
    """Says what is being done.

    Args:
        say: shows the name of what begins.
        status: what is drawn again and again, if anything is.
    """

    def __init__(self, say: Callable[[str], None], status: Status | None = None) -> None:
        self._say = say
        self._status = status

    def __call__(self, part: str) -> None:
        """It begins."""
        self._say(part)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Without it on the screen, where something is asked."""
        if self._status is None:
            yield
            return
        self._status.stop()
        try:
            yield
        finally:
            self._status.start()


@contextmanager
def progress_line(debug: bool = False, what: str = "Tracing") -> Iterator[ProgressLine]:
    """A line on stderr that says what is being done; in a notebook a line for each part, and none in a pipe.

    The libraries that are run say things that are not about this run; they are kept quiet unless --debug is given.
    """
    from advisor.report.terminal import make_console

    console = make_console(stderr=True)
    with _quiet(debug):
        if not console.is_terminal:
            yield ProgressLine(lambda _: None)
            return
        from advisor.report.terminal.training import is_redrawable

        if not is_redrawable(console):
            yield ProgressLine(_say_each(console, what))
            return
        # The plain spinner: every encoding has its characters.
        with console.status(localise_label(what), spinner="line") as status:
            yield ProgressLine(lambda part: status.update(f"{localise_label(what)}: {localise_label(part)}"), status)


def _say_each(console: Console, what: str) -> Callable[[str], None]:
    """Prints a line whenever another part begins."""
    said = ""

    def say(part: str) -> None:
        nonlocal said
        if part != said:
            said = part
            console.print(f"{localise_label(what)}: {localise_label(part)}", style="dim", soft_wrap=True)

    return say


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    import logging
    import warnings

    if debug:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
