"""What a probe's process runs: `python -m advisor.probe.child FOLDER`.

Its stdin is a pipe that the parent holds open. When that ends the parent is gone, and so is this process a moment
later, with its folder. What it found goes into result.json, written aside and renamed: the parent knows nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from advisor.units import GIB

if TYPE_CHECKING:
    from advisor.probe.driver import OwnShare
    from advisor.probe.dry_run import DryRun
    from advisor.probe.measurement import Measurement, Outcome, ProbeRequest

REQUEST = "request.json"
RESULT = "result.json"
STAGE = "stage.txt"

LARGEST_CONTEXT_BYTES = 2 * GIB
"""Of a CUDA context with its libraries; assumed. More is another process's, which came while this one ran: where the
driver does not know ours by its id, the difference is all that there is, and later advice would believe it."""

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


def main(folder: str) -> int:
    """Runs the folder's request to its end, whatever that is; returns the exit code."""
    watch_parent(folder)
    from advisor.probe.driver import OwnShare
    from advisor.probe.limits import die_first
    from advisor.probe.measurement import measurement_values, read_request, write_whole

    die_first()
    request = read_request(os.path.join(folder, REQUEST))
    # Before anything of this process is on the GPU.
    share = OwnShare(request.uuid)
    found = probe_here(request, folder, share, Stage(os.path.join(folder, STAGE)))
    write_whole(os.path.join(folder, RESULT), measurement_values(found))
    return 0 if found.outcome == "ran" else 1


def watch_parent(folder: str) -> None:
    """From now on this process ends with its parent, and takes its folder along."""
    from advisor.probe.work import discard

    def wait() -> None:
        try:
            while os.read(0, 4096):
                pass
        except OSError:
            pass
        discard(folder)
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def probe_here(request: ProbeRequest, folder: str, share: OwnShare, tell: Stage) -> Measurement:
    """Runs a request in this process; whatever goes wrong is an outcome."""
    from advisor.probe.limits import limited
    from advisor.probe.measurement import Measurement

    run: DryRun | None = None
    verdict: dict[str, Any] = {"outcome": "ran"}
    tell("importing")
    try:
        from pathlib import Path

        from advisor.probe.dry_run import DryRun

        run = DryRun(request, Path(folder), tell)
        with limited(request):
            run.run()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent is told
        import traceback

        traceback.print_exc()
        phase = run.phase if run is not None else ""
        verdict = _verdict(error, f"{tell.moment}, {phase}" if phase not in ("", tell.moment) else tell.moment)
    facts = {**(run.facts() if run is not None else {}), **_process_facts(share, request), **verdict}
    facts["notes"] = tuple(facts.get("notes", ()))
    return _held_against_cap(Measurement(plan=request.plan, **facts), request)


class Stage:
    """Leaves the name of what begins in a file.

    Args:
        path: the file; one short write, so that a reader finds the old name, the new one or nothing.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.moment = ""
        """What was said last."""

    def __call__(self, moment: str) -> None:
        """It begins."""
        self.moment = moment
        # A name that cannot be written is no reason to measure nothing.
        with contextlib.suppress(OSError), open(self._path, "w", encoding="utf-8") as file:
            file.write(moment)


def _verdict(error: BaseException, moment: str) -> dict[str, Any]:
    """What an error was, and what to do."""
    from advisor.errors import AdvisorError
    from advisor.training.outcome import asked_for, outcome_of

    if outcome_of(error) == "out_of_memory":
        asked = asked_for(error)
        return _failure("out_of_memory", f"{asked} more was asked for." if asked else "", moment)
    if outcome_of(error) == "disk_full":
        hint = "Free some disk, or name a folder on another one: PHI3_ADVISE_STATE."
        return {**_failure("failed", "The disk that the probe writes to is full.", moment), "hint": hint}
    if isinstance(error, AdvisorError):
        said = f"{error.what.rstrip('.')}.\n{error.why}".strip()
        return {**_failure("failed", said, moment), "hint": error.hint, "exit_code": error.exit_code}
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0][:400] if lines else "no reason given"
    return _failure("failed", f"{type(error).__name__}: {said}", moment)


def _failure(outcome: Outcome, message: str, moment: str) -> dict[str, Any]:
    return {"outcome": outcome, "message": message, "failed_at": moment}


def _held_against_cap(found: Measurement, request: ProbeRequest) -> Measurement:
    """A run that ended, but took more than there is: the CPU has no allocator that refuses at the exact byte."""
    from dataclasses import replace

    from advisor.units import size

    taken, cap = found.reserved_bytes or 0, request.cap_bytes
    if found.outcome != "ran" or cap is None or taken <= cap:
        return found
    message = f"The peak of {size(taken)} is above the {size(cap)} that there is."
    return replace(found, outcome="out_of_memory", message=message, failed_at=found.at)


def _process_facts(share: OwnShare, request: ProbeRequest) -> dict[str, Any]:
    from importlib import metadata

    from advisor.hardware import peak_ram_bytes

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    held = share.held_bytes()
    # Of paged states the driver may count what is on the GPU, and torch's allocator does not.
    has_managed = request.plan.optimizer.startswith("paged")
    return {
        "versions": versions,
        "host_peak_bytes": peak_ram_bytes(),
        "driver_bytes": held,
        "context_bytes": None if held is None or has_managed else _beside_the_allocator(held),
    }


def _beside_the_allocator(held_bytes: int) -> int | None:
    """What the driver counts and torch's allocator does not: the context; None where it cannot be that."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    beside: int = held_bytes - torch.cuda.memory_reserved()
    return beside if 0 < beside <= LARGEST_CONTEXT_BYTES else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
