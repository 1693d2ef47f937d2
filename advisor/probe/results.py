"""What probes measured on this machine, kept for later answers: a file each in the user's state folder."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Any

from advisor.hardware import Gpu
from advisor.plan import Plan, plan_to_fields
from advisor.probe.measurement import Measurement, measurement_of, measurement_values, model_fingerprint, write_whole

STATE_VARIABLE = "PHI3_ADVISE_STATE"
"""Names another folder."""

KEPT = ("ran", "out_of_memory")
"""Only what ran, or ran out of memory, says anything about the GPU."""

_ABANDONED_SECONDS = 3600.0
"""A result is written in milliseconds, and the clock of a file server may differ by minutes."""

_COUNTED = ("torch", "bitsandbytes", "transformers", "peft")
"""Whose version may change speed or memory; another version's measurement is another program's."""


def state_folder() -> str:
    """Where results are kept: the user's, by the platform's custom."""
    named = os.environ.get(STATE_VARIABLE)
    if named:
        return os.path.abspath(named)
    from platformdirs import user_state_dir

    return user_state_dir("phi3-advise", appauthor=False)


def running_folder() -> str:
    """Where probes write while they run: beside the results, because /tmp may be RAM."""
    return os.path.join(state_folder(), "running")


def keep(measurement: Measurement) -> str | None:
    """Writes a result, in the place of an older one of the same plan, device and versions; returns its path.

    A measurement that failed is not kept, and a folder that cannot be written keeps nothing: None. One without a speed,
    as a search's on a processor, does not take the place of one that has it.
    """
    if measurement.outcome not in KEPT:
        return None
    folder = os.path.join(state_folder(), "probes")
    path = os.path.join(folder, f"{_slug(measurement.device_name)}-{_key(measurement)}.json")
    try:
        os.makedirs(folder, exist_ok=True)
        _sweep(folder)
        older = _read(path)
        if older is not None and older.outcome == measurement.outcome and _says_more(older, measurement):
            return path
        write_whole(path, measurement_values(measurement))
    except OSError:
        return None
    return path


def _says_more(older: Measurement, newer: Measurement) -> bool:
    return older.micro_step_seconds is not None and newer.micro_step_seconds is None


def kept() -> Iterator[Measurement]:
    """Every result that can be read, the oldest first; broken files are passed over."""
    folder = os.path.join(state_folder(), "probes")
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    except OSError:
        return
    found = (_read(os.path.join(folder, name)) for name in names)
    yield from sorted((one for one in found if one is not None), key=lambda one: one.date)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What probes on this GPU under the installed versions say."""

    context_bytes: int | None
    context_date: str
    measurements: tuple[Measurement, ...]
    """Those that ran, the newest first."""

    def speed_of(self, plan: Plan, architecture: Mapping[str, Any]) -> Measurement | None:
        """The newest measurement of a plan's speed, if one of the same method, model and settings was taken."""
        model = model_fingerprint(architecture)
        settings = _settings(plan)
        for one in self.measurements:
            same = one.model == model and _settings(one.plan) == settings and one.micro_step_seconds is not None
            if same and _has_full_batches(one):
                return replace(one, plan=plan)
        return None


def calibration(gpu: Gpu) -> Calibration | None:
    """What was measured on a GPU of this machine; None where nothing was.

    Measurements under an imitation, another driver or other versions do not count.
    """
    if not gpu.detected:
        return None
    versions = installed_versions()
    counted = [one for one in kept() if _is_of(one, gpu, versions)]
    newest = tuple(reversed(counted))
    if not newest:
        return None
    context = next((one for one in newest if one.context_bytes is not None), None)
    return Calibration(
        context_bytes=context.context_bytes if context is not None else None,
        context_date=day(context) if context is not None else "",
        measurements=newest,
    )


def calibrated(gpu: Gpu) -> Gpu:
    """A GPU with the context that a probe measured on it, and a note that says so."""
    found = calibration(gpu)
    if found is None or found.context_bytes is None:
        return gpu
    from advisor.units import size

    note = f"The context of {size(found.context_bytes)} was measured here by a probe on {found.context_date}."
    return replace(gpu, context_bytes=found.context_bytes, context_provenance="measured", notes=(*gpu.notes, note))


def day(measurement: Measurement) -> str:
    """The day of a measurement."""
    return measurement.date.partition("T")[0]


@cache
def installed_versions() -> Mapping[str, str]:
    """Of the packages that count."""
    found = {}
    for name in _COUNTED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _is_of(measurement: Measurement, gpu: Gpu, versions: Mapping[str, str]) -> bool:
    measured = {name: measurement.versions.get(name) for name in _COUNTED}
    return (
        measurement.outcome == "ran"
        and measurement.as_gpu is None
        and measurement.device_name == gpu.name
        and measurement.versions.get("driver") == gpu.driver
        and measured == {name: versions.get(name) for name in _COUNTED}
    )


def _settings(plan: Plan) -> dict[str, Any]:
    """What speed depends on beside the model: all of the plan but how it is called and how long it trains."""
    values = plan_to_fields(plan)
    compiled = plan.training.compile
    for name in ("model", "gpu", "training", "gradient_accumulation"):
        del values[name]
    # With one micro-batch to a step no gradient of an earlier one is added to.
    return {**values, "compile": compiled, "accumulates": plan.gradient_accumulation > 1}


def _has_full_batches(measurement: Measurement) -> bool:
    """Whether batches were as wide as the plan's: where a probe is given data, rows are as long as its longest."""
    plan, tokens = measurement.plan, measurement.tokens_a_micro_step
    if tokens is None or tokens == plan.micro_batch * plan.seq_len:
        return True
    from advisor.training.data.lengths import bucket_length

    return bucket_length(tokens // plan.micro_batch, plan.seq_len) == plan.seq_len


def _key(measurement: Measurement) -> str:
    from hashlib import sha256

    values = {
        "tokens": None if _has_full_batches(measurement) else measurement.tokens_a_micro_step,
        "plan": plan_to_fields(measurement.plan),
        "model": measurement.model,
        "as_gpu": measurement.as_gpu,
        "versions": dict(measurement.versions),
    }
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:20]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "device"


def _read(path: str) -> Measurement | None:
    try:
        with open(path, encoding="utf-8") as file:
            return measurement_of(json.load(file))
    except (OSError, ValueError, RecursionError):
        return None


def _sweep(folder: str) -> None:
    """Removes what a process that was killed while writing left aside; a living one is done in a moment."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        # Its writer may be done with it just now.
        with suppress(OSError):
            if name.endswith(".part") and time.time() - os.stat(path).st_mtime > _ABANDONED_SECONDS:
                os.remove(path)


__all__ = [
    "KEPT",
    "STATE_VARIABLE",
    "Calibration",
    "calibrated",
    "calibration",
    "day",
    "keep",
    "kept",
    "running_folder",
    "state_folder",
]
