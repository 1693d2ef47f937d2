"""What CUDA's caching allocator was asked for and what it did: recorded on a GPU, replayed through ours.

A file is gzipped JSON of three columns, an event a place: `actions`, a letter each (see `_LETTERS`); `blocks`, the
address by the order in which addresses appeared; `sizes` in bytes. Beside them `expandable`, the allocator's mode.
Actions are those of torch.cuda.memory._snapshot, without those that the allocator does not act on.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advisor.memory.allocator import Block, CachingAllocator

MOST_EVENTS = 400_000
"""Of one recording: a step of Phi-3-mini makes some 20,000."""

SUFFIX = ".snapshot.json.gz"

_ASKED = ("alloc", "free_completed")
_TAKEN = ("segment_alloc", "segment_map")
_GIVEN_BACK = ("segment_free", "segment_unmap")
_LETTERS = dict(zip((*_ASKED, *_TAKEN, *_GIVEN_BACK), "afsmxu", strict=True))
_ACTIONS = {letter: action for action, letter in _LETTERS.items()}

Event = tuple[str, int, int]
"""An action, the number of an address, and bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One recording."""

    expandable: bool
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What CUDA's allocator held, and what ours did on the same requests."""

    requests: int
    reserved_bytes: int
    """Peak of what was taken from the GPU."""

    replayed_bytes: int
    """The same of the replay."""

    differs_at: int | None
    """The first request after which the two hold different amounts; None where they never do."""

    difference_bytes: int
    """Replayed less held, where they differ most."""


def write_snapshot(path: Path, recorded: Mapping[str, Any]) -> None:
    """Keeps what a replay needs of torch's snapshot.

    Raises:
        ValueError: the recording is cut off.
    """
    (trace, *_) = recorded["device_traces"]
    if len(trace) >= MOST_EVENTS:
        raise ValueError(f"the allocator did more than {MOST_EVENTS:,} things")
    kept = [one for one in trace if one["action"] in _LETTERS]
    numbers: dict[int, int] = {}
    columns = {
        "expandable": any(one["action"] == "segment_map" for one in kept),
        "actions": "".join(_LETTERS[one["action"]] for one in kept),
        "blocks": [numbers.setdefault(one["addr"], len(numbers)) for one in kept],
        "sizes": [one["size"] for one in kept],
    }
    aside = path.with_suffix(".part")
    with gzip.open(aside, "wt", encoding="ascii") as file:
        json.dump(columns, file, separators=(",", ":"))
    os.replace(aside, path)


def read_snapshot(path: Path) -> Snapshot:
    """A recording in a file that `write_snapshot` wrote."""
    with gzip.open(path, "rt", encoding="ascii") as file:
        values = json.load(file)
    columns = zip(values["actions"], values["blocks"], values["sizes"], strict=True)
    events = tuple((_ACTIONS[letter], block, size) for letter, block, size in columns)
    return Snapshot(expandable=values["expandable"], events=events)


def replay_snapshot(snapshot: Snapshot) -> Replayed:
    """Our allocator on the recorded requests.

    What was given back in a row is one release of everything cached: torch.cuda.empty_cache, or a GPU that was full.
    """
    allocator = CachingAllocator(expandable=snapshot.expandable)
    blocks: dict[int, Block] = {}
    held = peak = requests = worst = 0
    differs_at = None
    emptied = False
    for action, address, size in snapshot.events:
        if action in _TAKEN:
            held, emptied = held + size, False
        elif action in _GIVEN_BACK:
            held -= size
            if not emptied:
                allocator.release_cached()
                emptied = True
        elif action == "alloc":
            block = allocator.allocate(size)
            assert block is not None
            blocks[address] = block
        elif address in blocks:
            allocator.free(blocks.pop(address))
        peak = max(peak, held)
        if action not in _ASKED:
            continue
        emptied = False
        requests += 1
        difference = allocator.reserved_bytes - held
        if difference and differs_at is None:
            differs_at = requests
        worst = max(worst, difference, key=abs)
    return Replayed(
        requests=requests,
        reserved_bytes=peak,
        replayed_bytes=allocator.peak_reserved_bytes,
        differs_at=differs_at,
        difference_bytes=worst,
    )


__all__ = ["SUFFIX", "Replayed", "Snapshot", "read_snapshot", "replay_snapshot", "write_snapshot"]
