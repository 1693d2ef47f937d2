"""What several commands do: find the GPU that is meant, print JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from advisor.errors import InputError
from advisor.hardware import Gpu
from advisor.profiles import load_gpu
from advisor.units import parse_size

TYPICAL_GPU = "t4"
"""Answered for where there is no GPU and none is named: what Colab gives away."""


def find_gpu(*, gpu: str | None, vram: str | None, free: str | None, device: int | None) -> Gpu:
    """The GPU that an answer is for: named, described, detected, or else a typical one.

    Raises:
        InputError: options that contradict each other, or an amount that is none.
        UnknownNameError: no such GPU.
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


def detect_gpu(device: int | None) -> Gpu | None:
    """This machine's GPU; None where there is none.

    Raises:
        InputError: `device` is not there.
    """
    from advisor.hardware import choose, detect

    found = detect()
    if not found.gpus and device is None:
        for warning in found.warnings:
            click.echo(f"phi3-advise: {warning}", err=True)
        return None
    chosen = choose(found.gpus, device)
    notes = [*chosen.notes, *found.warnings]
    if len(found.gpus) > 1 and device is None:
        notes.append(f"{len(found.gpus)} GPUs are here; this is the one with the most free memory (--device N).")
    return replace(chosen, notes=tuple(notes))


def print_json(value: dict[str, Any]) -> None:
    """One object on stdout."""
    import json

    click.echo(json.dumps(value, indent=1))
