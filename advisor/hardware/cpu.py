"""The processor as a device to train on: its memory is the host's RAM."""

from __future__ import annotations

import platform

from advisor.errors import EnvironmentLacksError
from advisor.hardware.gpu import Gpu
from advisor.hardware.host import ram
from advisor.hardware.query import attempt
from advisor.units import MIB

LIBRARIES_BYTES = 512 * MIB
"""What Python, torch and the training libraries take before a model is loaded: 473 MiB resident after importing torch
2.13 (CPU build), transformers 5.23, PEFT 0.21, accelerate 1.15 and datasets 5.2 on Linux."""


def read_cpu() -> Gpu:
    """This machine's processor and RAM, in the words in which every device is described.

    Raises:
        EnvironmentLacksError: the system does not say how much RAM there is.
    """
    total_bytes, available_bytes = ram()
    if total_bytes is None:
        raise EnvironmentLacksError(
            "How much RAM this machine has could not be found out.", hint="Say it: --device cpu --vram 16GiB"
        )
    return Gpu(
        name=attempt(_processor_name)[0] or platform.machine() or "CPU",
        backend="cpu",
        total_bytes=total_bytes,
        driver_bytes=total_bytes,
        free_bytes=available_bytes,
        bfloat16=True,
        unified=True,
        detected=True,
        context_bytes=LIBRARIES_BYTES,
        context_provenance="measured",
        notes=("The processor trains: slow, and meant for small models and for trying things out.",),
    )


def _processor_name() -> str | None:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return None
