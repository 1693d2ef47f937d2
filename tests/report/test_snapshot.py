"""The snapshot is held against torch's own reader, and its numbers against the trace."""

from __future__ import annotations

import pickle
import pickletools
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch.cuda import _memory_viz as untyped

from advisor.memory.allocator import rounded, segment_bytes
from advisor.memory.trace import Allocation, Event, Trace
from advisor.report.snapshot import build_snapshot, write_snapshot
from advisor.units import MIB

viz: Any = untyped

VIEWER_OPCODES = (
    "PROTO APPEND APPENDS LIST TUPLE NEWFALSE NEWTRUE NONE BINGET BININT BININT1 BININT2 EMPTY_DICT EMPTY_LIST FRAME "
    "LONG1 LONG_BINGET MARK MEMOIZE BINPUT LONG_BINPUT SETITEMS SETITEM DICT SHORT_BINUNICODE BINUNICODE STOP "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 BINFLOAT"
)
"""What the viewer's unpickle reads. Source: pytorch torch/utils/viz/MemoryViz.js."""


@pytest.fixture(scope="module")
def path(small_trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "small.pickle"
    write_snapshot(small_trace, path)
    return path


@pytest.fixture
def snapshot(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = pickle.loads(path.read_bytes())
    return loaded


def made(nbytes: int, moment: str = "forward") -> Allocation:
    return Allocation(nbytes, (nbytes,), "uint8", "model.layers.0.mlp", "aten.mm.default", moment, "activations")


def actions(snapshot: dict[str, Any]) -> list[str]:
    return [entry["action"] for entry in snapshot["device_traces"][0]]


def test_the_device_trace_peaks_where_the_trace_does(small_trace: Trace, snapshot: dict[str, Any]) -> None:
    alive = peak = 0
    for entry in snapshot["device_traces"][0]:
        alive += {"alloc": 1, "free_completed": -1}.get(entry["action"], 0) * rounded(entry["size"])
        peak = max(peak, alive)
    # The trace's peak leaves loading out; this model's loading needs less than its step.
    assert small_trace.loading_bytes < small_trace.allocated_bytes
    assert peak == small_trace.allocated_bytes


def test_the_segments_of_the_trace_peak_at_what_is_reserved(small_trace: Trace, snapshot: dict[str, Any]) -> None:
    reserved = peak = 0
    for entry in snapshot["device_traces"][0]:
        reserved += {"segment_alloc": 1, "segment_free": -1}.get(entry["action"], 0) * entry["size"]
        peak = max(peak, reserved)
    assert peak == small_trace.reserved_bytes
    assert reserved == sum(segment["total_size"] for segment in snapshot["segments"])


def test_what_is_alive_at_the_end_is_in_the_segments(small_trace: Trace, snapshot: dict[str, Any]) -> None:
    alive = {id(event.allocation): event.allocation for event in small_trace.events if not event.freed}
    for event in small_trace.events:
        if event.freed:
            del alive[id(event.allocation)]
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    held = [block["requested_size"] for block in blocks if block["state"] == "active_allocated"]
    assert sorted(held) == sorted(allocation.nbytes for allocation in alive.values())


def test_blocks_tile_their_segments(snapshot: dict[str, Any]) -> None:
    for segment in snapshot["segments"]:
        address = segment["address"]
        for block in segment["blocks"]:
            assert block["address"] == address
            assert block["requested_size"] <= block["size"]
            address += block["size"]
        assert address == segment["address"] + segment["total_size"]
        assert segment["allocated_size"] == viz.calc_active(segment)


def test_no_two_living_allocations_overlap(snapshot: dict[str, Any]) -> None:
    alive: dict[int, int] = {}
    for entry in snapshot["device_traces"][0]:
        if entry["action"] == "alloc":
            alive[entry["addr"]] = entry["addr"] + entry["size"]
            neighbours = sorted(alive.items())
            assert all(end <= start for (_, end), (start, _) in pairwise(neighbours))
        elif entry["action"] == "free_completed":
            del alive[entry["addr"]]


def test_torch_reads_it(snapshot: dict[str, Any]) -> None:
    total = sum(segment["total_size"] for segment in snapshot["segments"])
    summary = viz.segsum(snapshot)
    assert f"segments: {len(snapshot['segments'])}\n" in summary
    assert f"total_reserved: {viz.Bytes(total)!r}\n" in summary
    entries = viz.trace(snapshot)
    assert entries.startswith("Device 0 ----------------\n")
    assert f"{len(snapshot['device_traces'][0])} entries\n" in entries
    assert "cudaMalloc" in entries
    assert "None" not in entries
    for page in (
        viz.trace_plot(snapshot),
        viz.trace_plot(snapshot, plot_segments=True),
        viz.segment_plot(snapshot),
    ):
        assert "snapshot.pickle" in page


def test_flame_graphs_add_up_and_name_modules(snapshot: dict[str, Any]) -> None:
    lines = viz.memory(snapshot, format_flamegraph=lambda text: text).splitlines()
    total = sum(segment["total_size"] for segment in snapshot["segments"])
    assert sum(int(line.rpartition(" ")[2]) for line in lines) == total
    embedding = [line for line in lines if "embed_tokens" in line]
    assert embedding
    # From the outside in: the moment, the modules, the module with its operation, the tensor.
    stack = embedding[0].rpartition(" ")[0].split(";")
    assert stack[2].startswith("loading:0:weights")
    assert stack[-1] == "bfloat16:0:[4096, 256]"
    by_segment = viz.segments(snapshot, format_flamegraph=lambda text: text).splitlines()
    assert len(by_segment) == len(lines)


def test_freed_pairs_can_be_filtered(snapshot: dict[str, Any]) -> None:
    kept = viz.filter_alloc_free_pairs(snapshot)["device_traces"][0]
    held = [block for segment in snapshot["segments"] for block in segment["blocks"] if block["requested_size"]]
    assert sum(entry["action"] == "alloc" for entry in kept) == len(held)
    assert not any(entry["action"].startswith("free") for entry in kept)


def test_the_command_line_of_torch_opens_it(path: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    command = [sys.executable, "-W", "ignore", "-m", "torch.cuda._memory_viz", "trace_plot", str(path), "-o", str(page)]
    subprocess.run(command, check=True, timeout=120)
    assert "MemoryViz.js" in page.read_text()


def test_the_pickle_has_only_what_the_viewer_can_read(path: Path, snapshot: dict[str, Any]) -> None:
    codes = {opcode.name for opcode, _, _ in pickletools.genops(path.read_bytes())}
    assert codes <= set(VIEWER_OPCODES.split())
    # JavaScript's numbers are exact up to 2^53.
    assert all(entry["addr"] + entry["size"] < 2**53 for entry in snapshot["device_traces"][0])
    assert all(type(entry["frames"]) is list for entry in snapshot["device_traces"][0])


def test_categories_include_unknown_which_the_viewer_asks_for(snapshot: dict[str, Any]) -> None:
    categories = {entry["category"] for entry in snapshot["device_traces"][0] if "category" in entry}
    assert {"weights", "adapters", "activations", "logits", "unknown"} <= categories


def test_moments_are_annotated_in_order(snapshot: dict[str, Any]) -> None:
    notes = snapshot["external_annotations"]
    names = [note["name"] for note in notes if note["stage"] == "START"]
    assert names[:4] == ["loading", "forward", "loss", "loss backward"]
    assert [note["name"] for note in notes[::2]] == [note["name"] for note in notes[1::2]] == names
    times = [note["time_us"] for note in notes]
    assert times == sorted(times)


def test_a_full_gpu_ends_in_out_of_memory() -> None:
    first, second = made(30 * MIB), made(40 * MIB)
    events = [Event(first, False, "forward"), Event(second, False, "forward")]
    snapshot = build_snapshot(events, gpu_total_bytes=64 * MIB, empties_cache=False)
    assert actions(snapshot) == ["segment_alloc", "alloc", "oom", "snapshot"]
    entry = snapshot["device_traces"][0][2]
    assert "addr" not in entry
    assert (entry["size"], entry["device_free"]) == (40 * MIB, 34 * MIB)
    assert "raise OutOfMemoryError # 40.0MiB requested, 34.0MiB free" in viz.trace(snapshot)


def test_a_full_gpu_releases_cached_segments_first() -> None:
    first, second = made(30 * MIB), made(40 * MIB)
    events = [Event(first, False, "forward"), Event(first, True, "forward"), Event(second, False, "forward")]
    snapshot = build_snapshot(events, gpu_total_bytes=64 * MIB, empties_cache=False)
    freed = ["free_requested", "free_completed"]
    assert actions(snapshot) == ["segment_alloc", "alloc", *freed, "segment_free", "segment_alloc", "alloc", "snapshot"]
    assert [segment["total_size"] for segment in snapshot["segments"]] == [segment_bytes(40 * MIB)]


@pytest.mark.parametrize("empties_cache", [True, False])
def test_the_cache_is_emptied_after_loading_or_not(empties_cache: bool) -> None:
    loaded, later = made(30 * MIB, "loading"), made(4 * MIB)
    events = [Event(loaded, False, "loading"), Event(loaded, True, "loading"), Event(later, False, "forward")]
    snapshot = build_snapshot(events, gpu_total_bytes=None, empties_cache=empties_cache)
    assert ("segment_free" in actions(snapshot)) is empties_cache


def test_a_segment_says_which_pool_it_is_of() -> None:
    events = [Event(made(1000), False, "forward"), Event(made(3 * MIB), False, "forward")]
    segments = build_snapshot(events, gpu_total_bytes=None, empties_cache=True)["segments"]
    assert [(segment["segment_type"], segment["total_size"]) for segment in segments] == [
        ("small", 2 * MIB),
        ("large", 20 * MIB),
    ]
    assert segments[0]["requested_size"] == 1000
    assert segments[0]["allocated_size"] == 1024
