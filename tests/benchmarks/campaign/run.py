"""Measures cases one after the other in processes that are thrown away when they fail, and keeps every result."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from advisor.hardware import Gpu
from advisor.launch.command import torch_device, training_environment
from advisor.plan import plan_to_fields
from advisor.probe.measurement import Measurement, measurement_of
from advisor.probe.results import running_folder
from advisor.probe.work import sweep
from advisor.profiles import find_model
from campaign.order import SNAPSHOT_STEPS, STEPS, Turn, needs_own_process
from campaign.records import Record
from campaign.worker import ANSWER, LARGEST_REST_BYTES

LONGEST_SECONDS = 240.0
"""After that long a plan is stopped."""

_SCRIPT = Path(__file__).parents[1] / "gpu_campaign.py"
_ALLOCATOR = "PYTORCH_ALLOC_CONF"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What all measurements of a campaign share."""

    gpu: Gpu
    """The process that measures sees no other."""

    expandable: bool
    """As this project's training has it, wherever the platform does."""


def environment_of(gpu: Gpu, *, expandable: bool) -> dict[str, str]:
    """What a process that measures has beside this one's variables: the training's, which show it that GPU alone."""
    added = {**training_environment(gpu), _ALLOCATOR: f"expandable_segments:{expandable}"}
    # It is a script, and imports what is beside it.
    del added["PYTHONSAFEPATH"]
    return added


class Worker:
    """A process that measures, and everything that it may still say."""

    def __init__(self, gpu: Gpu, *, expandable: bool) -> None:
        self._process = subprocess.Popen(
            (sys.executable, "-W", "ignore", str(_SCRIPT), "--worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **environment_of(gpu, expandable=expandable)},
            # Ctrl-C is for the campaign, which ends this.
            start_new_session=True,
        )
        self._lines: Queue[str | None] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any] | None, str]:
        """The answer; without one, why there is none. The process has ended then."""
        assert self._process.stdin is not None
        last, until = "", time.monotonic() + seconds
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            while (line := self._lines.get(timeout=max(0.0, until - time.monotonic()))) is not None:
                if line.startswith(ANSWER):
                    return json.loads(line.removeprefix(ANSWER)), ""
                last = line.strip() or last
        except Empty:
            self.end()
            return None, f"not done after {seconds:.0f} s"
        except OSError as error:
            last = str(error)
        self.end()
        return None, f"the process ended with code {self._process.returncode}: {last[-300:]}"

    def end(self) -> None:
        """Kill it, wait until it is gone, and remove what it was writing."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        with contextlib.suppress(OSError):
            sweep(running_folder())

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        # It has ended.
        self._lines.put(None)


class Workers:
    """One process at a time; another where the last one failed, or where a plan needs one of its own.

    Args:
        setup: what it measures on.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._worker: Worker | None = None

    def measure(
        self,
        turn: Turn,
        *,
        cap_bytes: int | None = None,
        context_bytes: int = 0,
        snapshot: Path | None = None,
        expandable: bool | None = None,
        longest_seconds: float = LONGEST_SECONDS,
    ) -> Record:
        """One plan, under the total of a smaller card where `cap_bytes` says so.

        Args:
            turn: the plan.
            cap_bytes: that card's total.
            context_bytes: what of it the context takes.
            snapshot: where the allocator's history is kept.
            expandable: the allocator's mode where it is not the training's.
            longest_seconds: after that long it is stopped.
        """
        alone = needs_own_process(turn.plan) or snapshot is not None
        if alone:
            self.end()
        if self._worker is None:
            mode = self._setup.expandable if expandable is None else expandable
            self._worker = Worker(self._setup.gpu, expandable=mode)
        request = {
            "plan": plan_to_fields(turn.plan),
            "architecture": dict(find_model(turn.plan.model).config),
            "device": torch_device(self._setup.gpu),
            "uuid": self._setup.gpu.uuid,
            "sdpa": turn.case.sdpa,
            "steps": STEPS if snapshot is None else SNAPSHOT_STEPS,
            "cap_bytes": None if cap_bytes is None else max(0, cap_bytes - context_bytes),
            # A checkpoint of every weight and its states is tens of GB, and saving makes nothing on the GPU.
            "saves": turn.plan.method != "full" and snapshot is None,
            "snapshot": None if snapshot is None else str(snapshot),
        }
        began = time.monotonic()
        answer, reason = self._worker.ask(request, longest_seconds)
        seconds = time.monotonic() - began
        if answer is None or alone or answer["left_bytes"] > LARGEST_REST_BYTES:
            self.end()
        return _record(turn, answer, reason, cap_bytes, seconds)

    def end(self) -> None:
        """No process is left."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None


def _record(turn: Turn, answer: dict[str, Any] | None, reason: str, cap_bytes: int | None, seconds: float) -> Record:
    from dataclasses import replace

    measurement = None if answer is None else measurement_of(answer["measurement"])
    if answer is None or measurement is None:
        outcome = "stopped" if reason.startswith("not done") else "failed"
        lost = Measurement(outcome=outcome, plan=turn.plan, seconds=seconds, message=reason)
        return Record(name=turn.case.name, cap_bytes=cap_bytes, fresh=False, measurement=lost)
    return Record(
        name=turn.case.name,
        cap_bytes=cap_bytes,
        fresh=answer["fresh"],
        left_bytes=answer["left_bytes"],
        measurement=replace(measurement, seconds=seconds),
    )
