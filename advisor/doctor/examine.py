"""Everything that training needs, looked at in turn: hardware, packages, and three computations in a process apart.

A computation that crashes its process, or hangs it, is an answer like any other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from advisor.doctor.check import Check
from advisor.hardware import Detection, Gpu, detect, host
from advisor.units import GIB, gib

TRIAL_SECONDS = 180
"""Importing torch and bitsandbytes takes most of it on a slow disk."""

LITTLE_DISK_BYTES = 20 * GIB
"""A download of Phi-3-mini takes 7.1 GiB, and two checkpoints of adapters and the adapter less than the rest."""

LITTLE_RAM_BYTES = 10 * GIB

_SEE_WHY = "To see what it prints: python -m advisor.doctor.trials"
_PACKAGES = ("transformers", "peft", "accelerate", "datasets")
_TRIALS = ("matmul", "4-bit matmul", "attention")


def examine(device: str | None = None) -> Iterator[Check]:
    """The checks, as they are made.

    Args:
        device: where the computations run, as torch spells it; None takes a GPU if there is one, else the CPU.
    """
    found = detect()
    yield from _hardware(found)
    yield from _packages()
    yield from _machine()
    yield from _trials(device)


def _hardware(found: Detection) -> Iterator[Check]:
    for warning in found.warnings:
        yield Check(name="driver", verdict="bad", found=warning, remedy="Reinstall the driver, or restart after it.")
    if not found.gpus:
        yield Check(
            name="GPU",
            verdict="absent",
            found="none",
            remedy="On Colab: Runtime, Change runtime type, T4 GPU. Advice and trace need none.",
        )
    for gpu in found.gpus:
        yield _gpu(gpu)
        yield _free_memory(gpu)


def _gpu(gpu: Gpu) -> Check:
    facts = [gpu.name]
    if gpu.capability:
        facts.append(f"capability {gpu.capability[0]}.{gpu.capability[1]}")
    if gpu.driver:
        facts.append(f"driver {gpu.driver}")
    if gpu.bfloat16 is False:
        facts.append("no bfloat16, so fp16 is used")
    name = "GPU" if gpu.index is None else f"GPU {gpu.index}"
    return Check(name=name, verdict="good", found=", ".join(facts))


def _free_memory(gpu: Gpu) -> Check:
    if gpu.free_bytes is None:
        return Check(name="GPU memory", verdict="doubtful", found=f"{gib(gpu.total_bytes)}, free unknown")
    found = f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"
    if gpu.others_bytes * 4 < gpu.total_bytes:
        return Check(name="GPU memory", verdict="good", found=found)
    holders = ", ".join(f"{one.name or 'process'} ({one.pid})" for one in gpu.processes[:3])
    remedy = f"Close what holds it: {holders}." if holders else "Close what holds it (nvidia-smi lists it)."
    return Check(name="GPU memory", verdict="doubtful", found=found, remedy=remedy)


def _packages() -> Iterator[Check]:
    from advisor.memory.trace.versions import version_warnings

    outside = {warning.split()[0]: warning for warning in version_warnings()}
    for package in ("torch", *_PACKAGES, "bitsandbytes"):
        installed = _installed(package)
        if installed is None and package == "bitsandbytes":
            remedy = "QLoRA and 8-bit optimizer states need it: pip install bitsandbytes"
            yield Check(name=package, verdict="doubtful", found="not installed", remedy=remedy)
        elif installed is None:
            yield Check(name=package, verdict="bad", found="not installed", remedy=f"pip install {package}")
        elif package in outside:
            yield Check(name=package, verdict="doubtful", found=installed, remedy=outside[package])
        else:
            yield Check(name=package, verdict="good", found=installed)
    flash = _installed("flash-attn")
    if flash is None:
        yield Check(name="flash-attn", verdict="absent", found="not installed; torch's own attention is used")
    else:
        yield Check(name="flash-attn", verdict="good", found=flash)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> Iterator[Check]:
    here = host()
    if here.ram_available_bytes is not None and here.ram_bytes is not None:
        little = here.ram_available_bytes < LITTLE_RAM_BYTES
        yield Check(
            name="host RAM",
            verdict="doubtful" if little else "good",
            found=f"{gib(here.ram_available_bytes)} of {gib(here.ram_bytes)} free",
            remedy="Loading a model and paged states need it: close other programs." if little else "",
        )
    if here.disk_free_bytes is not None:
        little = here.disk_free_bytes < LITTLE_DISK_BYTES
        yield Check(
            name="disk",
            verdict="doubtful" if little else "good",
            found=f"{gib(here.disk_free_bytes)} free here",
            remedy="A model's download and checkpoints may not fit: free some, or set HF_HOME." if little else "",
        )


def _trials(device: str | None) -> Iterator[Check]:
    """The computations, each told as it ends; those that a crash kept from running are told too."""
    if _installed("torch") is None:
        yield Check(name=_TRIALS[0], verdict="absent", found="nothing was computed: torch is not installed")
        return
    command = [sys.executable, "-m", "advisor.doctor.trials", *([device] if device else [])]
    # A folder or file in the current folder must not stand in for a library of the same name.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    told = set()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        killer = _after(TRIAL_SECONDS, process)
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    check = Check(**json.loads(line))
                    told.add(check.name.partition(" on ")[0])
                    yield check
            code = process.wait()
        finally:
            killer.cancel()
            if process.poll() is None:
                process.kill()
    if code == 0:
        return
    for name in _TRIALS:
        if name not in told:
            yield Check(name=name, verdict="bad", found=_ended(code), remedy=_SEE_WHY)
            return


def _after(seconds: float, process: subprocess.Popen[str]) -> threading.Timer:
    killer = threading.Timer(seconds, process.kill)
    killer.daemon = True
    killer.start()
    return killer


def _ended(code: int) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        return f"took more than {TRIAL_SECONDS} s, or was killed for its memory"
    if code < 0:
        names = {one.value: one.name for one in signal.Signals}
        return f"crashed: {names.get(-code, f'signal {-code}')}"
    return f"ended with code {code}"


__all__ = ["examine"]
