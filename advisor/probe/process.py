"""A probe in a process of its own: started, waited for, judged; nothing of it is left behind.

The child holds the reading end of a pipe whose writing end is here. However this process ends, `kill -9` included,
the pipe ends with it, and then the child does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from advisor.probe.child import REQUEST, RESULT, STAGE
from advisor.probe.driver import Departure
from advisor.probe.measurement import Measurement, Outcome, ProbeRequest, measurement_of, write_request
from advisor.probe.results import running_folder
from advisor.probe.work import work_folder

TIMEOUT_SECONDS = 1800.0

_POLL_SECONDS = 0.05
_POSIX = os.name == "posix"
_LOG = "log.txt"
_LOG_CHARACTERS = 20_000
_MEMORY_WORDS = ("bad_alloc", "out of memory", "Cannot allocate memory", "can't allocate memory")


def probe(
    request: ProbeRequest,
    environment: Mapping[str, str] | None = None,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    progress: Callable[[str], None] = lambda _: None,
) -> Measurement:
    """Runs a request in a process of its own. Whatever becomes of that process is an outcome; nothing is raised for it.

    Args:
        request: what is tried.
        environment: what the process has beside this one's variables.
        timeout_seconds: after that long it is stopped.
        progress: called with the name of what begins.

    Raises:
        OSError: no process can be started, or nothing can be written.
    """
    began = time.monotonic()
    departure = Departure(request.uuid)
    with _folder(request) as folder:
        killed_before = _kills_for_memory()
        with _child(folder, environment or {}) as process:
            ended = _wait(process, folder, began + timeout_seconds, progress, departure)
        found = _result(folder)
        if found is None:
            found = _without_result(request, process, folder, ended=ended, killed=_kills_for_memory() > killed_before)
        if found.outcome in ("failed", "stopped"):
            found = replace(found, log=_read(os.path.join(folder, _LOG))[-_LOG_CHARACTERS:])
    return replace(
        found,
        seconds=time.monotonic() - began,
        released=departure.is_over(process.pid),
    )


@contextlib.contextmanager
def _folder(request: ProbeRequest) -> Iterator[str]:
    """A folder that holds the request, and is gone afterwards: on a disk, not in RAM, where the user's is writable."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(work_folder(running_folder()))
        try:
            write_request(request, os.path.join(folder, REQUEST))
        except OSError:
            # That disk is full.
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            write_request(request, os.path.join(folder, REQUEST))
        yield folder


@contextlib.contextmanager
def _child(folder: str, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, in a session of its own: Ctrl-C in the terminal reaches only this one, which ends it."""
    with open(os.path.join(folder, _LOG), "wb") as log:
        process = subprocess.Popen(
            (sys.executable, "-m", "advisor.probe.child", folder),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=_POSIX,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of it and waits: afterwards there is nothing."""
    if process.poll() is None:
        if _POSIX:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _wait(
    process: subprocess.Popen[bytes],
    folder: str,
    deadline: float,
    progress: Callable[[str], None],
    departure: Departure,
) -> bool:
    """Until the process has ended or the time is up; whether it ended by itself."""
    said = ""
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        departure.look(process.pid)
        stage = _read(os.path.join(folder, STAGE))
        if stage and stage != said:
            said = stage
            progress(stage)
        time.sleep(_POLL_SECONDS)
    return True


def _result(folder: str) -> Measurement | None:
    try:
        with open(os.path.join(folder, RESULT), encoding="utf-8") as file:
            return measurement_of(json.load(file))
    except (OSError, ValueError):
        return None


def _without_result(
    request: ProbeRequest, process: subprocess.Popen[bytes], folder: str, *, ended: bool, killed: bool
) -> Measurement:
    """What can be said of a process that left no result."""
    stage = _read(os.path.join(folder, STAGE))
    said = [line for line in _read(os.path.join(folder, _LOG)).splitlines() if line.strip()]
    outcome: Outcome = "failed"
    hint = ""
    on_cpu = request.device == "cpu"
    if not ended:
        outcome, message = "stopped", "It took too long and was stopped."
    elif killed and process.returncode == -_SIGKILL:
        outcome = "out_of_memory" if on_cpu else "failed"
        message = "The system killed it because the machine's RAM ran out (SIGKILL)."
        hint = "Close other programs, or take a smaller plan."
    elif process.returncode == -_SIGKILL:
        message = "It was killed from outside (SIGKILL)."
        hint = "Run it again; systems that are short of RAM kill processes too."
    elif on_cpu and request.cap_bytes is not None and any(word in line for line in said for word in _MEMORY_WORDS):
        outcome, message = "out_of_memory", said[-1][:400]
    else:
        how = _ending(process.returncode)
        message = f"{how} Its last words: {' '.join(said[-3:])[-600:]}" if said else how
    return Measurement(outcome=outcome, plan=request.plan, failed_at=stage, message=message, hint=hint)


_SIGKILL = getattr(signal, "SIGKILL", 9)


def _ending(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else f"signal {-code}"
        return f"The process crashed ({name})."
    return f"The process ended with code {code} and no result."


def _kills_for_memory() -> int:
    """How many processes the kernel has killed for want of RAM, on this machine and in this container."""
    total = 0
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events"):
        for line in _read(path).splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill" and number.strip().isdecimal():
                total += int(number)
    return total


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


__all__ = ["TIMEOUT_SECONDS", "probe"]
