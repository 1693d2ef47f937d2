"""What the driver says of a GPU and of one process on it: NVML, asked by the GPU's UUID. Needs no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from advisor.hardware.query import ask, attempt

RELEASE_SECONDS = 10.0
"""How long a driver may take to let go of a process that has ended."""

_LOOK_SECONDS = 0.5


class DriverView:
    """One GPU as NVML sees it. Whatever it does not answer is None.

    Args:
        uuid: the GPU's, with its prefix; None sees nothing.
    """

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid

    def used_bytes(self) -> int | None:
        """What all processes together hold."""
        with self._device() as found:
            if found is None:
                return None
            nvml, device = found
            memory = ask(nvml, "nvmlDeviceGetMemoryInfo", device)
            return int(memory.used) if memory is not None else None

    def process_bytes(self) -> dict[int, int | None] | None:
        """What each process holds, by its id; in a container the ids may be another namespace's."""
        with self._device() as found:
            if found is None:
                return None
            nvml, device = found
            listed = ask(nvml, "nvmlDeviceGetComputeRunningProcesses", device)
            return None if listed is None else {one.pid: one.usedGpuMemory for one in listed}

    @contextmanager
    def _device(self) -> Iterator[tuple[Any, Any] | None]:
        nvml = attempt(import_module, "pynvml")[0] if self._uuid else None
        if nvml is None or attempt(nvml.nvmlInit)[1] is not None:
            yield None
            return
        try:
            device = ask(nvml, "nvmlDeviceGetHandleByUUID", self._uuid)
            yield None if device is None else (nvml, device)
        finally:
            ask(nvml, "nvmlShutdown")


class Departure:
    """Whether a process that has ended is off a GPU; made before it starts.

    A driver that listed the process while it ran says so by listing it no more. One that never did, as in a container,
    whose process ids are others, says nothing by that: then no more memory may be in use than before. An id that was
    listed before the process started is somebody else's there.
    """

    def __init__(self, uuid: str | None) -> None:
        self._view = DriverView(uuid)
        self._before = self._view.used_bytes()
        self._others = frozenset(self._view.process_bytes() or ())
        self._was_listed = False
        self._next_look = 0.0

    def look(self, process: int) -> None:
        """While it runs, as often as one likes."""
        now = time.monotonic()
        if self._before is None or self._was_listed or now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        self._was_listed = process not in self._others and process in (self._view.process_bytes() or ())

    def is_over(self, process: int) -> bool | None:
        """Once it has ended, after as long as a driver may take; None where nobody can tell."""
        until = time.monotonic() + RELEASE_SECONDS
        while (gone := self._is_gone(process)) is False and time.monotonic() < until:
            time.sleep(0.05)
        # More than before may be another process's.
        return gone if gone or self._was_listed else None

    def _is_gone(self, process: int) -> bool | None:
        if self._was_listed:
            listed = self._view.process_bytes()
            return None if listed is None else process not in listed
        now = self._view.used_bytes()
        return None if now is None or self._before is None else now <= self._before


class OwnShare:
    """What this process holds of a GPU: by its own id, or by what was there before it came.

    In a container the driver's list may know this process by no id of ours; then the difference is what it took,
    as long as no other process changed its own. An id of ours that was listed before is somebody else's.
    """

    def __init__(self, uuid: str | None) -> None:
        self._view = DriverView(uuid)
        self._before = self._view.used_bytes()
        self._is_anothers = os.getpid() in (self._view.process_bytes() or ())

    def held_bytes(self) -> int | None:
        """Now."""
        listed = {} if self._is_anothers else self._view.process_bytes() or {}
        own = listed.get(os.getpid())
        if own is not None:
            return own
        now = self._view.used_bytes()
        return None if now is None or self._before is None else max(0, now - self._before)


__all__ = ["Departure", "DriverView", "OwnShare"]
