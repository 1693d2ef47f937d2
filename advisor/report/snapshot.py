"""A trace as a PyTorch memory snapshot, for the viewer that people already know.

`python -m torch.cuda._memory_viz trace_plot run.pickle -o run.html` and https://pytorch.org/memory_viz open it.

The structure is that of torch.cuda.memory._snapshot() (its docstring; torch/csrc/cuda/memory_snapshot.cpp). What a
real snapshot takes from the program's stack, a trace has by name: the frames of an allocation are, innermost first, its
dtype and shape, its module and operation, the modules around it, and its moment and component. There is no clock, so
`time_us` counts events.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from advisor.memory.allocator import SMALL_REQUEST, CachingAllocator, rounded
from advisor.memory.trace.replayed import walk
from advisor.report.output import create_file
from advisor.units import MIB

if TYPE_CHECKING:
    from advisor.memory.allocator import Block
    from advisor.memory.trace import Allocation, Event, Trace

PROTOCOL = 4
"""The newest pickle protocol that the viewer reads. Source: torch/utils/viz/MemoryViz.js, unpickle."""

_FIRST_ADDRESS = 0x7F00_0000_0000
"""Where CUDA puts memory on Linux; the viewer reads addresses as doubles, so they must stay below 2⁵³."""

_GAP = 2 * MIB
"""Between segments, so that none looks like another's continuation."""

_DEFAULT_POOL = (0, 0)

Record = dict[str, Any]
"""One dict of the snapshot; its keys are PyTorch's."""


def write_snapshot(trace: Trace, path: str | os.PathLike[str], *, gpu_total_bytes: int | None = None) -> None:
    """Write the snapshot that the traced run would leave with the default allocator.

    Args:
        trace: what is written.
        path: the pickle; a file that is there is never overwritten.
        gpu_total_bytes: what segments may add up to, as it was for the trace; None is no limit.

    Raises:
        InputError: the file exists, or cannot be written.
    """
    snapshot = build_snapshot(trace.events, gpu_total_bytes=gpu_total_bytes, empties_cache=trace.regime.empties_cache)
    create_file(path, pickle.dumps(snapshot, protocol=PROTOCOL))


def build_snapshot(events: Sequence[Event], *, gpu_total_bytes: int | None, empties_cache: bool) -> Record:
    """The snapshot as plain values."""
    allocator = CachingAllocator(total_bytes=gpu_total_bytes)
    recorder = _Recorder()
    moment = ""
    for event, block in walk(events, allocator, empties_cache=empties_cache):
        if event.moment != moment:
            recorder.annotate(moment, "END")
            moment = event.moment
            recorder.annotate(moment, "START")
        recorder.follow_releases(allocator)
        if event.freed:
            recorder.free(event.allocation)
        elif block is not None:
            recorder.allocate(event.allocation, block)
        else:
            recorder.fail(event.allocation, (gpu_total_bytes or 0) - allocator.reserved_bytes)
    recorder.annotate(moment, "END")
    return {
        "segments": recorder.segments(),
        "device_traces": [recorder.finish()],
        "allocator_settings": _settings(),
        "external_annotations": recorder.annotations,
    }


@dataclass(slots=True, eq=False)
class _Segment:
    """A segment and where it is, in the allocator's addresses and in the snapshot's."""

    start: int
    address: int
    size: int
    cause: Allocation
    live: dict[int, Allocation] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)


class _Recorder:
    """Writes down what CUDA's allocator would have recorded."""

    def __init__(self) -> None:
        self.annotations: list[Record] = []
        self._entries: list[Record] = []
        self._segments: dict[object, _Segment] = {}
        self._placed: dict[int, tuple[_Segment, int]] = {}
        self._next_address = _FIRST_ADDRESS
        self._released_bytes = 0

    def annotate(self, moment: str, stage: str) -> None:
        if moment:
            time = len(self._entries)
            self.annotations.append({"name": moment, "stage": stage, "device": 0, "time_us": time})

    def follow_releases(self, allocator: CachingAllocator) -> None:
        """The allocator releases all that is wholly free, or nothing."""
        if allocator.released_bytes == self._released_bytes:
            return
        self._released_bytes = allocator.released_bytes
        for key, segment in list(self._segments.items()):
            if not segment.live:
                self._add("segment_free", segment.address, segment.size, segment.cause)
                del self._segments[key]

    def allocate(self, allocation: Allocation, block: Block) -> None:
        segment = self._segments.get(block.segment)
        if segment is None:
            segment = _Segment(block.address, self._next_address, _whole_size(block), allocation)
            self._segments[block.segment] = segment
            self._next_address += segment.size + _GAP
            self._add("segment_alloc", segment.address, segment.size, allocation)
        address = segment.address + block.address - segment.start
        segment.live[address] = allocation
        segment.sizes[address] = block.size
        self._placed[id(allocation)] = segment, address
        self._add("alloc", address, allocation.nbytes, allocation)

    def free(self, allocation: Allocation) -> None:
        segment, address = self._placed.pop(id(allocation))
        del segment.live[address], segment.sizes[address]
        for action in ("free_requested", "free_completed"):
            self._add(action, address, allocation.nbytes, allocation)

    def fail(self, allocation: Allocation, free_bytes: int) -> None:
        """Out of memory: the one entry that has no address."""
        self._add("oom", 0, allocation.nbytes, allocation)
        entry = self._entries[-1]
        del entry["addr"]
        entry["device_free"] = free_bytes

    def finish(self) -> list[Record]:
        """The entries, closed as a call to _snapshot() closes them.

        Some versions of the viewer fail on categories without "unknown", so the last entry brings it.
        """
        last = {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "pool_id": _DEFAULT_POOL}
        return [*self._entries, {**last, "time_us": len(self._entries), "frames": [], "category": "unknown"}]

    def segments(self) -> list[Record]:
        return [_segment_record(segment) for segment in self._segments.values()]

    def _add(self, action: str, address: int, size: int, cause: Allocation) -> None:
        entry: Record = {
            "action": action,
            "addr": address,
            "size": size,
            "stream": 0,
            "pool_id": _DEFAULT_POOL,
            "time_us": len(self._entries),
            "frames": _frames(cause),
            "user_metadata": _description(cause),
        }
        if action == "alloc":
            entry["category"] = cause.component
        self._entries.append(entry)


def _whole_size(block: Block) -> int:
    """The size of a segment, from its first block."""
    size = 0
    part: Block | None = block
    while part is not None:
        size += part.size
        part = part.after
    return size


def _segment_record(segment: _Segment) -> Record:
    in_use = sum(segment.sizes.values())
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.size,
        "allocated_size": in_use,
        "active_size": in_use,
        "requested_size": sum(allocation.nbytes for allocation in segment.live.values()),
        "stream": 0,
        "segment_type": "small" if rounded(segment.cause.nbytes) <= SMALL_REQUEST else "large",
        "segment_pool_id": _DEFAULT_POOL,
        "is_expandable": False,
        "frames": _frames(segment.cause),
        "blocks": _block_records(segment),
    }


def _block_records(segment: _Segment) -> list[Record]:
    """Blocks by address; what lies between two in use is one free block, since free neighbours merge."""
    records: list[Record] = []
    end = segment.address
    for address, allocation in sorted(segment.live.items(), key=lambda item: item[0]):
        if address > end:
            records.append(_free_record(end, address - end))
        size = segment.sizes[address]
        records.append(
            {
                "address": address,
                "size": size,
                "requested_size": allocation.nbytes,
                "state": "active_allocated",
                "frames": _frames(allocation),
            }
        )
        end = address + size
    if end < segment.address + segment.size:
        records.append(_free_record(end, segment.address + segment.size - end))
    return records


def _free_record(address: int, size: int) -> Record:
    return {"address": address, "size": size, "requested_size": 0, "state": "inactive", "frames": []}


def _frames(allocation: Allocation) -> list[Record]:
    return _stack(
        allocation.dtype,
        tuple(allocation.shape),
        allocation.module,
        allocation.operation,
        allocation.moment,
        allocation.component,
    )


@lru_cache(maxsize=4096)
def _stack(
    dtype: str, shape: tuple[int, ...], module: str, operation: str, moment: str, component: str
) -> list[Record]:
    """One list for all that are alike, which the pickle then holds once."""
    around = module.split(".")[:-1]
    modules = [(".".join(around[: depth + 1]), name) for depth, name in enumerate(around)]
    places = [
        (dtype, _shape(shape)),
        (module or "outside any module", operation),
        *reversed(modules),
        (moment, component),
    ]
    return [_frame(filename, name) for filename, name in places]


@lru_cache(maxsize=4096)
def _frame(filename: str, name: str) -> Record:
    return {"filename": filename, "line": 0, "name": name}


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _description(allocation: Allocation) -> str:
    """What the viewer shows of an allocation beside its frames."""
    shape = _shape(allocation.shape)
    return f"{allocation.component}: {allocation.dtype} {shape}, made in {allocation.moment}"


def _settings() -> Record:
    """The default allocator's, as memory_snapshot.cpp names them."""
    return {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "max_split_size": -1,
        "garbage_collection_threshold": 0.0,
        "expandable_segments": False,
        "pinned_num_register_threads": 1,
        "release_lock_on_cudamalloc": False,
        "pinned_use_cuda_host_register": False,
        "graph_capture_record_stream_reuse": False,
        "roundup_power2_divisions": {str(2**power): 0 for power in range(16)},
    }
