"""What is allocated, in order: terms are sizes with a formula, a ledger adds them up moment by moment."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Literal, get_args

from advisor.memory.allocator import LARGE_REQUEST, SEGMENT_UNIT, SMALL_REQUEST

Component = Literal[
    "weights", "quantization", "adapters", "gradients", "optimizer", "activations", "logits", "workspace"
]
COMPONENTS: tuple[Component, ...] = get_args(Component)

BLOCK_BYTES = 512
"""The allocator hands out multiples of this (kMinBlockSize, c10/cuda/CUDACachingAllocator.cpp)."""

_LOADED = ("weights", "quantization")
"""What lies in the one segment that loading begins with (transformers modeling_utils.py, caching_allocator_warmup)."""


def rest_of_segment(size_bytes: int) -> int:
    """What a tensor's block has beyond it where segments are not expandable.

    From 10 MiB on it has a segment of its own, of a multiple of 2 MiB, and a rest of at most 1 MiB is not split off.
    Of smaller ones only the order of all requests tells (traced: 0.3 % of the peak at most).
    Source: c10/cuda/CUDACachingAllocator.cpp (get_allocation_size, should_split).
    """
    rest = -size_bytes % SEGMENT_UNIT if size_bytes >= LARGE_REQUEST else 0
    return rest if rest <= SMALL_REQUEST else 0


class Term:
    """A named size: a function from shapes to bytes whose docstring is formula, units and source."""

    __slots__ = ("component", "function")

    def __init__(self, function: Callable[..., int], component: Component) -> None:
        self.function = function
        self.component = component

    @property
    def name(self) -> str:
        """`norm_input_copy` → "norm input copy"."""
        return self.function.__name__.replace("_", " ")

    @property
    def formula(self) -> str:
        """The formula, from the docstring's second paragraph."""
        paragraphs = (self.function.__doc__ or "").split("\n\n")
        return " ".join(paragraphs[1].split("Source:")[0].split()).rstrip(".") if len(paragraphs) > 1 else ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the formula's inputs."""
        return self.function.__code__.co_varnames[: self.function.__code__.co_argcount]

    def __call__(self, *sizes: int) -> int:
        """The size in bytes, not rounded."""
        return self.function(*sizes)


def term(component: Component) -> Callable[[Callable[..., int]], Term]:
    """Makes a `Term` of a function; the component is the one that the JSON output counts it under."""
    return lambda function: Term(function, component)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor, or `count` alike, that is alive at a moment."""

    term: Term
    sizes: tuple[int, ...]
    count: int
    size_bytes: int
    component: Component


class Ledger:
    """Allocations and releases in the order in which a training step makes them.

    `new` returns a handle, `free` takes it back. Sizes are rounded as the allocator rounds them.

    Args:
        whole_segments: segments are not expandable: what would be too small a rest of one counts as allocated.
    """

    __slots__ = (
        "_entries",
        "_events",
        "_moments",
        "_peak_event",
        "_peaks",
        "_since",
        "live_bytes",
        "peak_bytes",
        "whole_segments",
    )

    def __init__(self, *, whole_segments: bool = False) -> None:
        self.whole_segments = whole_segments
        self._entries: list[tuple[Term, tuple[int, ...], int, int, Component]] = []
        self._events: list[int] = []
        self._moments: list[tuple[int, str]] = []
        self._peaks: dict[str, int] = {}
        self._peak_event = 0
        self._since = 0
        self.live_bytes = 0
        self.peak_bytes = 0

    def at(self, moment: str) -> None:
        """Names what happens from here on."""
        self._close_moment()
        self._moments.append((len(self._events), moment))
        self._since = self.live_bytes

    def new(self, term: Term, *sizes: int, count: int = 1, component: Component | None = None) -> int:
        """Allocates a tensor (or `count` alike) and returns its handle.

        Args:
            term: what it is.
            sizes: the term's inputs.
            count: how many alike.
            component: what it counts under, where that is not the term's own.
        """
        size_bytes = (term.function(*sizes) + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
        if self.whole_segments and term.component not in _LOADED:
            size_bytes += rest_of_segment(size_bytes)
        size_bytes *= count
        entries = self._entries
        handle = len(entries)
        entries.append((term, sizes, count, size_bytes, component or term.component))
        self._events.append(handle)
        self.live_bytes = live = self.live_bytes + size_bytes
        if live > self._since:
            self._since = live
            if live > self.peak_bytes:
                self.peak_bytes = live
                self._peak_event = len(self._events)
        return handle

    def free(self, *handles: int) -> None:
        """Releases tensors."""
        for handle in handles:
            self.live_bytes -= self._entries[handle][3]
            self._events.append(~handle)

    def like(self, handle: int) -> int:
        """Allocates a tensor of the same kind and size as another, which may be gone."""
        term, sizes, count, _, component = self._entries[handle]
        return self.new(term, *sizes, count=count, component=component)

    @property
    def position(self) -> int:
        """How many events there have been, for `replay`."""
        return len(self._events)

    def replay(self, source: Ledger, start: int, stop: int, moment: str, now: dict[int, int]) -> None:
        """Repeats another ledger's events between two positions.

        Args:
            source: the other ledger.
            start: the first event.
            stop: the first event that is not repeated.
            moment: the name of the repetition.
            now: handles there and what stands for them here; what is allocated is added.
        """
        self.at(moment)
        entries, events = self._entries, self._events
        live, highest = self.live_bytes, self._since
        for event in source._events[start:stop]:
            if event >= 0:
                now[event] = handle = len(entries)
                entry = source._entries[event]
                entries.append(entry)
                events.append(handle)
                live += entry[3]
                if live > highest:
                    highest = live
                    if live > self.peak_bytes:
                        self.peak_bytes = live
                        self._peak_event = len(events)
            else:
                handle = now[~event]
                events.append(~handle)
                live -= entries[handle][3]
        self.live_bytes, self._since = live, highest

    @property
    def peak_moment(self) -> str:
        """The moment at which most was allocated."""
        name = ""
        for start, moment in self._moments:
            if start < self._peak_event:
                name = moment
        return name

    def moment_peaks(self) -> dict[str, int]:
        """The highest total within each moment, in the order in which they come."""
        self._close_moment()
        return dict(self._peaks)

    def alive_at_peak(self) -> tuple[Entry, ...]:
        """Everything allocated when the total stood highest, alike ones merged, the largest first."""
        return self._alive_after(self._peak_event)

    def handles_after(self, events: int) -> set[int]:
        """The handles of everything allocated after so many events."""
        alive: set[int] = set()
        for event in self._events[:events]:
            alive.discard(~event) if event < 0 else alive.add(event)
        return alive

    def repeat(self, source: Ledger, handles: Set[int], count: int) -> list[int]:
        """Allocates `count` of each of another ledger's tensors, and returns their handles."""
        made = []
        for handle in sorted(handles):
            term, sizes, one, _, component = source._entries[handle]
            made.append(self.new(term, *sizes, count=one * count, component=component))
        return made

    def _alive_after(self, events: int) -> tuple[Entry, ...]:
        alive = self.handles_after(events)
        merged: dict[tuple[int, tuple[int, ...], Component], Entry] = {}
        for handle in sorted(alive):
            term, sizes, count, size_bytes, component = self._entries[handle]
            key = (id(term), sizes, component)
            seen = merged.get(key)
            if seen is not None:
                count, size_bytes = count + seen.count, size_bytes + seen.size_bytes
            merged[key] = Entry(term, sizes, count, size_bytes, component)
        return tuple(sorted(merged.values(), key=lambda entry: -entry.size_bytes))

    def _close_moment(self) -> None:
        if self._moments:
            name = self._moments[-1][1]
            self._peaks[name] = max(self._peaks.get(name, 0), self._since)
