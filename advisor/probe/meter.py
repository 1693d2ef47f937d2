"""What counts memory while training code runs: torch's allocator where the device has one, the profiler on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from advisor.probe.measurement import Meter
from advisor.probe.scratch import PRODUCTS, find_scratch

if TYPE_CHECKING:
    import torch


class MemoryMeter(Protocol):
    """Knows the peak within each moment. A moment lasts until the next one begins."""

    kind: Meter

    def enter(self, moment: str) -> None:
        """A moment begins."""

    def pause(self) -> None:
        """Count nothing from here on: what is timed should not be slowed down by it."""

    def peaks(self) -> Mapping[str, int]:
        """The highest allocation within each moment so far."""

    def reserved_peaks(self) -> Mapping[str, int]:
        """Likewise of what the allocator holds; empty where there is none."""


def make_meter(device: torch.device) -> MemoryMeter:
    """The meter of a device; counting begins at the first moment."""
    if device.type in ("cuda", "xpu"):
        return AllocatorMeter(device)
    return ProfilerMeter() if device.type == "cpu" else NoMeter()


class AllocatorMeter:
    """torch's caching allocator: its peaks are read and reset wherever a moment ends.

    It counts on the host, where tensors are made and let go of, so nothing has to be waited for.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.kind: Meter = "cuda allocator" if device.type == "cuda" else "xpu allocator"
        self._device = device
        self._module: Any = getattr(torch, device.type)
        self._module.init()
        self._moment: str | None = None
        self._allocated: dict[str, int] = {}
        self._reserved: dict[str, int] = {}

    def enter(self, moment: str) -> None:
        """The peaks so far belong to the moment before; of one layer's backward after the other, to the same."""
        if moment == self._moment:
            return
        self._read()
        self._moment = moment
        self._module.reset_peak_memory_stats(self._device)

    def pause(self) -> None:
        """Reading two numbers at the few edges of a step slows nothing down."""

    def peaks(self) -> Mapping[str, int]:
        """Including the moment that lasts."""
        self._read()
        return self._allocated

    def reserved_peaks(self) -> Mapping[str, int]:
        """Including the moment that lasts."""
        self._read()
        return self._reserved

    def _read(self) -> None:
        if self._moment is None:
            return
        stats = self._module.memory_stats_as_nested_dict(self._device)
        for peaks, name in ((self._allocated, "allocated_bytes"), (self._reserved, "reserved_bytes")):
            peak = stats.get(name, {}).get("all", {}).get("peak", 0)
            peaks[self._moment] = max(peaks.get(self._moment, 0), peak)


class ProfilerMeter:
    """torch.profiler's record of every allocation on the CPU, cut into moments by marks in the same record.

    Without the scratch of matrix products: the same plan has the same peaks on every processor.
    """

    kind: Meter = "profiler"

    def __init__(self) -> None:
        self._profile: Any = None
        self._moment = ""
        self._alive = 0
        self._peaks: dict[str, int] = {}

    def enter(self, moment: str) -> None:
        """Leaves a mark; starts the record where there is none."""
        from torch.profiler import ProfilerActivity, profile, record_function

        if self._profile is None:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
            self._moment = moment
        with record_function(f"{_MARK}{moment}"):
            pass

    def pause(self) -> None:
        """Ends the record; the next moment begins another where this one ended."""
        if self._profile is None:
            return
        ended, self._profile = self._profile, None
        ended.__exit__(None, None, None)
        self._digest(ended.profiler.kineto_results.events())

    def peaks(self) -> Mapping[str, int]:
        """Ends the record."""
        self.pause()
        return self._peaks

    def reserved_peaks(self) -> Mapping[str, int]:
        """The CPU's allocator gives everything back."""
        return {}

    def _digest(self, events: Any) -> None:
        seen: list[tuple[int, int, str]] = []
        products: list[tuple[int, int]] = []
        for event in events:
            name = event.name()
            if name == "[memory]":
                seen.append((event.start_ns(), event.nbytes(), ""))
            elif name in PRODUCTS:
                products.append((event.start_ns(), event.end_ns()))
            elif name.startswith(_MARK):
                seen.append((event.start_ns(), 0, name.removeprefix(_MARK)))
        seen.sort(key=lambda one: one[0])
        scratch = find_scratch([(time, change) for time, change, _ in seen], sorted(products))
        self._note()
        for index, (_, change, moment) in enumerate(seen):
            self._moment = moment or self._moment
            self._alive += 0 if index in scratch else change
            self._note()

    def _note(self) -> None:
        self._peaks[self._moment] = max(self._peaks.get(self._moment, 0), self._alive)


class NoMeter:
    """A device that tells nothing of peaks."""

    kind: Meter = "none"

    def enter(self, moment: str) -> None:
        """Nothing to read."""

    def pause(self) -> None:
        """Nothing to stop."""

    def peaks(self) -> Mapping[str, int]:
        """Nothing was read."""
        return {}

    def reserved_peaks(self) -> Mapping[str, int]:
        """Nothing was read."""
        return {}


_MARK = "phi3-advise moment: "

__all__ = ["AllocatorMeter", "MemoryMeter", "NoMeter", "ProfilerMeter", "make_meter"]
