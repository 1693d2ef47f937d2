"""The run folder: its name, and what is written into it before a training starts."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from advisor.errors import InputError
from advisor.hardware import Gpu
from advisor.launch.command import CONFIG_FILE, JOB_FILE, accelerate_config
from advisor.launch.device_check import DeviceCheck
from advisor.plan import Plan
from advisor.profiles import save_plan_file
from advisor.training.job import Job, read_job, write_job
from advisor.training.result import RESULT

RUNS = "runs"
PLAN_FILE = "plan.toml"
ENVIRONMENT_FILE = "environment.json"

_WRITTEN = frozenset({PLAN_FILE, ENVIRONMENT_FILE, CONFIG_FILE, JOB_FILE})
"""What `write_run` writes. A training that began has a log beside it."""

PACKAGES = ("phi3-advise", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "flash-attn")
"""Whose versions a run depends on."""


def default_folder(label: str, method: str) -> str:
    """A folder under ./runs that is not there yet: `runs/phi-3-mini-4k-lora-20260801-142233`."""
    stem = re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.") or "model"
    path = os.path.join(os.path.abspath(RUNS), f"{stem}-{method}-{time.strftime('%Y%m%d-%H%M%S')}")
    number, free = 2, path
    while os.path.exists(free):
        free, number = f"{path}-{number}", number + 1
    return free


def occupied_by(folder: str) -> str | None:
    """What is in the way of a new run in a folder; None where nothing is, or what a dry run left."""
    if not os.path.lexists(folder):
        return None
    if not os.path.isdir(folder):
        return "it is a file"
    names = os.listdir(folder)
    if not names or (JOB_FILE in names and set(names) <= _WRITTEN):
        return None
    if JOB_FILE in names:
        return "it holds a run"
    return "it holds another file" if len(names) == 1 else f"it holds {len(names)} other files"


def read_run(folder: str) -> Job:
    """The job of a run folder, wherever the folder is now.

    Raises:
        InputError: there is no run in it.
    """
    from dataclasses import replace

    path = os.path.join(folder, JOB_FILE)
    if not os.path.isfile(path):
        raise InputError(f"{folder} holds no run.", why=f"There is no {JOB_FILE} in it.", hint="Check the path.")
    return replace(read_job(path), out=os.path.abspath(folder))


def write_run(job: Job, gpu: Gpu, check: DeviceCheck) -> None:
    """Makes the folder, and everything in it that the training process reads or a person may ask for later.

    Raises:
        InputError: the folder cannot be written to.
    """
    try:
        os.makedirs(job.out, exist_ok=True)
        write_plan(job.plan, job.out)
        now = _with_history(environment(gpu, check), read_environment(job.out) if job.resume else {})
        _write(os.path.join(job.out, ENVIRONMENT_FILE), json.dumps(now, indent=1) + "\n")
        _write(os.path.join(job.out, CONFIG_FILE), accelerate_config(job.plan, gpu))
        write_job(job, os.path.join(job.out, JOB_FILE))
    except OSError as error:
        raise InputError(
            f"{job.out} cannot be written to.", why=f"{error.strerror}.", hint="Name another: --out DIR"
        ) from error


def read_settings(folder: str) -> dict[str, bytes]:
    """The files that say what a run is and how it ended, as they are."""
    found = {}
    for name in (JOB_FILE, PLAN_FILE, ENVIRONMENT_FILE, CONFIG_FILE, RESULT):
        with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, name), "rb") as file:
            found[name] = file.read()
    return found


def write_settings(folder: str, files: Mapping[str, bytes]) -> None:
    """Puts back what `read_settings` read."""
    for name, content in files.items():
        _write(os.path.join(folder, name), content.decode())


def write_plan(plan: Plan, folder: str) -> None:
    """The plan as a file that runs again as it stands."""
    path = os.path.join(folder, PLAN_FILE)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    save_plan_file(plan, path)


def set_attempt_aside(folder: str) -> str:
    """Moves what an attempt left into a folder of its own inside the run folder; nothing is deleted."""
    number = 1
    while os.path.exists(os.path.join(folder, f"attempt-{number}")):
        number += 1
    aside = os.path.join(folder, f"attempt-{number}")
    names = [name for name in os.listdir(folder) if not re.fullmatch(r"attempt-\d+", name)]
    os.mkdir(aside)
    for name in names:
        os.rename(os.path.join(folder, name), os.path.join(aside, name))
    return aside


def environment(gpu: Gpu, check: DeviceCheck) -> dict[str, Any]:
    """Versions, device and driver. No environment variables: they hold secrets."""
    return {
        "schema": 1,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cuda": check.cuda,
        "gpu": {
            "name": gpu.name,
            "backend": gpu.backend,
            "driver": gpu.driver,
            "capability": ".".join(map(str, gpu.capability)) if gpu.capability else None,
            "total_bytes": gpu.total_bytes,
        },
    }


def read_environment(folder: str) -> dict[str, Any]:
    """What a run folder's environment.json says; nothing where there is none that can be read."""
    try:
        with open(os.path.join(folder, ENVIRONMENT_FILE), encoding="utf-8") as file:
            values = json.load(file)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _with_history(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The environment of a run that goes on, with those that it had before under `before`, the latest first."""
    earlier = before.pop("before", [])
    if before and before != now:
        earlier = [before, *earlier]
    return {**now, "before": earlier} if earlier else now


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        if name == "phi3-advise" and "advisor" in sys.modules:  # a checkout that nobody installed
            return str(sys.modules["advisor"].__version__)
        return None


def _write(path: str, text: str) -> None:
    aside = f"{path}.{os.getpid()}.part"
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(aside, path)


__all__ = [
    "default_folder",
    "environment",
    "occupied_by",
    "read_environment",
    "read_run",
    "read_settings",
    "set_attempt_aside",
    "write_run",
    "write_settings",
]
