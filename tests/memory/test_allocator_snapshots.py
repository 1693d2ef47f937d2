"""The replayed allocator against what CUDA's did on a GPU: every recording in profiles/measurements."""

from __future__ import annotations

from pathlib import Path

import pytest
from campaign.snapshots import MOST_EVENTS, SUFFIX, Snapshot, read_snapshot, replay_snapshot, write_snapshot

from advisor.units import MIB

_FOLDER = Path(__file__).parents[2] / "profiles" / "measurements"
_RECORDED = [pytest.param(path, id=path.name.removesuffix(SUFFIX)) for path in sorted(_FOLDER.glob(f"*{SUFFIX}"))]
_WAITING = pytest.param(
    None,
    id="none",
    marks=pytest.mark.skip(reason="nothing is recorded yet: tests/benchmarks/gpu_campaign.py --snapshots, on a GPU"),
)


@pytest.mark.parametrize("path", _RECORDED or [_WAITING])
def test_the_replay_holds_what_cuda_held_after_every_request(path: Path) -> None:
    replayed = replay_snapshot(read_snapshot(path))
    assert replayed.requests > 1000
    assert (replayed.differs_at, replayed.difference_bytes) == (None, 0)
    assert replayed.replayed_bytes == replayed.reserved_bytes


# What CUDA's allocator does with 12 MiB, 8 MiB, both freed and 20 MiB, by the rules in advisor/memory/allocator.py.
_DEFAULT = Snapshot(
    expandable=False,
    events=(
        ("segment_alloc", 1000, 12 * MIB),
        ("alloc", 1000, 12 * MIB),
        ("segment_alloc", 2000, 20 * MIB),
        ("alloc", 2000, 8 * MIB),
        ("free_completed", 1000, 12 * MIB),
        ("free_completed", 2000, 8 * MIB),
        ("alloc", 2000, 20 * MIB),
        ("segment_free", 1000, 12 * MIB),
        ("segment_alloc", 3000, 14 * MIB),
        ("alloc", 3000, 14 * MIB - 100),
    ),
)
_EXPANDABLE = Snapshot(
    expandable=True,
    events=(
        ("segment_map", 0, 20 * MIB),
        ("alloc", 0, 12 * MIB),
        ("alloc", 12 * MIB, 8 * MIB),
        ("free_completed", 0, 12 * MIB),
        ("free_completed", 12 * MIB, 8 * MIB),
        ("segment_unmap", 0, 20 * MIB),
        ("segment_map", 0, 40 * MIB),
        ("alloc", 0, 30 * MIB),
    ),
)


@pytest.mark.parametrize("snapshot", [_DEFAULT, _EXPANDABLE], ids=["default", "expandable"])
def test_a_recording_is_replayed_with_its_releases(snapshot: Snapshot) -> None:
    replayed = replay_snapshot(snapshot)
    assert replayed.differs_at is None
    assert replayed.replayed_bytes == replayed.reserved_bytes == (34 if not snapshot.expandable else 40) * MIB


def test_a_replay_that_holds_something_else_is_seen() -> None:
    # A segment of 14 MiB where the rules make one of 12.
    events = (("segment_alloc", 1000, 14 * MIB), *_DEFAULT.events[1:])
    replayed = replay_snapshot(Snapshot(expandable=False, events=events))
    assert replayed.differs_at == 1
    assert replayed.difference_bytes == -2 * MIB


def test_a_snapshot_of_torch_is_kept_as_far_as_a_replay_needs_it(tmp_path: Path) -> None:
    def entry(action: str, address: int, size: int) -> dict[str, object]:
        return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": 1}

    trace = [entry(*event) for event in _EXPANDABLE.events]
    trace.insert(2, entry("free_requested", 0, 12 * MIB))
    trace.append({"action": "snapshot"})
    write_snapshot(tmp_path / f"lora{SUFFIX}", {"device_traces": [trace], "segments": []})
    found = read_snapshot(tmp_path / f"lora{SUFFIX}")
    assert [(action, size) for action, _, size in found.events] == [(a, size) for a, _, size in _EXPANDABLE.events]
    assert replay_snapshot(found) == replay_snapshot(_EXPANDABLE)
    assert [path.name for path in tmp_path.iterdir()] == [f"lora{SUFFIX}"]


def test_a_recording_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    trace = [{"action": "alloc", "addr": 0, "size": 512}] * MOST_EVENTS
    with pytest.raises(ValueError, match="400,000"):
        write_snapshot(tmp_path / f"lora{SUFFIX}", {"device_traces": [trace]})
    assert list(tmp_path.iterdir()) == []
