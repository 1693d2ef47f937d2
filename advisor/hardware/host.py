"""The machine around the GPU: RAM, processors, disk."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from advisor.hardware.query import attempt
from advisor.units import KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine around the GPU; None where it does not say."""

    ram_bytes: int | None
    ram_available_bytes: int | None
    disk_free_bytes: int | None
    cpu_count: int | None


def host(folder: str = ".") -> Host:
    """RAM, processors, and the free disk under `folder` or its nearest parent that exists."""
    ram_bytes, ram_available_bytes = ram()
    return Host(
        ram_bytes=ram_bytes,
        ram_available_bytes=ram_available_bytes,
        disk_free_bytes=attempt(_disk_free, folder)[0],
        cpu_count=os.cpu_count(),
    )


def ram() -> tuple[int | None, int | None]:
    """Host RAM in bytes: all of it, and what a new program can have without swapping."""
    return attempt(_ram)[0] or (None, None)


def peak_ram_bytes() -> int | None:
    """The most RAM that this process had resident; None where the system does not say."""
    return attempt(_peak_ram)[0]


def _peak_ram() -> int | None:
    """Linux's high-water mark, because getrusage's includes the process that started this one (exec keeps it)."""
    if sys.platform == "win32":
        import psutil

        peak: int = psutil.Process().memory_info().peak_wset
        return peak
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next((int(line.split()[1]) * KIB for line in file if line.startswith("VmHWM:")), None)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else KIB)


def _ram() -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    limit, used = attempt(_container_memory)[0] or (memory.total, 0)
    return min(memory.total, limit), min(memory.available, max(0, limit - used))


def _container_memory(folder: str = "/sys/fs/cgroup") -> tuple[int, int] | None:
    """What a container may use and does use; None where nothing limits it.

    File pages that the kernel can drop do not count as used.
    Source: Linux, Documentation/admin-guide/cgroup-v2.rst, "Memory Interface Files".
    """
    with open(f"{folder}/memory.max", encoding="ascii") as file:
        limit = file.read().strip()
    if not limit.isdecimal():
        return None
    with open(f"{folder}/memory.current", encoding="ascii") as file:
        used = int(file.read())
    with open(f"{folder}/memory.stat", encoding="ascii") as file:
        droppable = sum(int(line.split()[1]) for line in file if line.startswith(("inactive_file ", "active_file ")))
    return int(limit), max(0, used - droppable)


def _disk_free(folder: str) -> int:
    import psutil

    path = os.path.abspath(folder)
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return psutil.disk_usage(path).free
