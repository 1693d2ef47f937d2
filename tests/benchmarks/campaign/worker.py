"""The process that measures: one case after another, its memory given back between them.

It reads a request a line from stdin and answers with a line on stdout. When stdin ends, so does it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ANSWER = "MEASURED "
"""Begins the line of an answer: libraries print too."""

LARGEST_REST_BYTES = 8 * 2**20
"""What may stay allocated between two plans: bitsandbytes keeps its codebooks, a few KiB."""


def main() -> int:
    """Answers until stdin ends, or until memory is not given back."""
    from advisor.probe.driver import OwnShare

    variables, share = dict(os.environ), None
    for number, line in enumerate(_requests()):
        asked = json.loads(line)
        # Before anything of this process is on the GPU.
        share = share or OwnShare(asked["uuid"])
        with _snapshot(asked["snapshot"]):
            measurement = _measure(asked, share)
        rest = _release(asked["device"])
        _forget(variables)
        answer = {"measurement": measurement, "left_bytes": rest, "fresh": number == 0}
        sys.stdout.write(f"{ANSWER}{json.dumps(answer)}\n")
        sys.stdout.flush()
        if rest > LARGEST_REST_BYTES:
            return 1
    return 0


def _requests() -> Iterator[str]:
    """Lines of stdin; a thread reads them, so that a parent's death ends a measurement too."""
    from queue import Queue

    lines: Queue[str | None] = Queue()
    busy = threading.Event()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        if busy.is_set():
            os._exit(1)
        lines.put(None)

    threading.Thread(target=read, name="parent", daemon=True).start()
    while (line := lines.get()) is not None:
        busy.set()
        yield line
        busy.clear()


def _measure(asked: dict[str, Any], share: Any) -> dict[str, Any]:
    """One request, as values of a Measurement: the probe's own run, in this process."""
    from advisor.plan import plan_from_fields
    from advisor.probe.child import Stage, probe_here
    from advisor.probe.measurement import ProbeRequest, measurement_values
    from advisor.probe.results import running_folder
    from advisor.probe.work import work_folder

    request = ProbeRequest(
        plan=plan_from_fields(asked["plan"]),
        architecture=asked["architecture"],
        device=asked["device"],
        uuid=asked["uuid"],
        steps=asked["steps"],
        cap_bytes=asked["cap_bytes"],
        without_flash=asked["sdpa"] == "efficient",
        saves=asked["saves"],
    )
    with work_folder(running_folder()) as name, _cudnn_attention(asked["sdpa"] is None):
        return measurement_values(probe_here(request, name, share, Stage(os.path.join(name, "stage.txt"))))


@contextmanager
def _cudnn_attention(allowed: bool) -> Iterator[None]:
    """Whether torch may choose cuDNN's attention, which it does first on Hopper."""
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed and before)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def _snapshot(path: str | None) -> Iterator[None]:
    """Record what the allocator is asked for, and what it does, into a file."""
    if path is None:
        yield
        return
    import torch

    from campaign.snapshots import MOST_EVENTS, write_snapshot

    torch.cuda.init()
    torch.cuda.memory._record_memory_history("all", context=None, stacks="python", max_entries=MOST_EVENTS)
    try:
        yield
        write_snapshot(Path(path), torch.cuda.memory._snapshot())
    finally:
        torch.cuda.memory._record_memory_history(None)


def _release(device: str) -> int:
    """Give everything back; returns what is still allocated, and lifts the limit and resets the peaks."""
    import torch

    gc.collect()
    if not device.startswith("cuda"):
        return 0
    torch.cuda.synchronize()
    # A workspace that an earlier plan left would be missing from the next one's peak.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    return int(torch.cuda.memory_allocated())


def _forget(variables: dict[str, str]) -> None:
    """What a plan left for the next one in this process: TrainingArguments keeps its autocast in a variable."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update(variables)
