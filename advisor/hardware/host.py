"""The machine around the GPU: RAM, processors, disk."""

from __future__ import annotations

import os
from dataclasses import dataclass

from advisor.hardware.query import attempt


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


def _ram() -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _disk_free(folder: str) -> int:
    import psutil

    path = os.path.abspath(folder)
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return psutil.disk_usage(path).free
