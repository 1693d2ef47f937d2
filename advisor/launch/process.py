"""The training process under supervision: signals reach it, its end is waited for, nothing of it is left behind.

`accelerate launch` runs in a session of its own, so a Ctrl-C in the terminal reaches only this process, which passes
it to the trainer alone. The trainer's stdin is a pipe that this process holds open: if this process dies, the trainer
reads the end of the file, saves, and stops.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from advisor.launch.command import Command
from advisor.report.language import localise
from advisor.training.checkpoints import CHECKPOINTS, last_checkpoint
from advisor.training.interruption import heeded_signals
from advisor.training.log import LOG, log_tail
from advisor.training.metrics import METRICS, last_step
from advisor.training.result import RESULT, Result, read_result
from advisor.training.run import PID

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""What is left of the training's processes after accelerate's own end gets that long."""

_AT_ONCE_SECONDS = 3.0
"""A trainer that was told to stop at once gets that long to say so."""

_POSIX = os.name == "posix"
_KILL = signal.SIGKILL if _POSIX else signal.SIGTERM


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a supervised training ended."""

    result: Result
    signal: int | None
    """The signal that this process was sent meanwhile."""

    exit_code: int
    """accelerate's: 1 for every failure."""

    killed: bool
    """Stopped at once, by a second Ctrl-C."""


def supervise(command: Command, run: str, *, stdout: IO[Any] | None = None) -> Ended:
    """Starts a training, waits for its end, and leaves no process of it behind.

    Args:
        command: what `training_command` made of the job.
        run: the run folder; what libraries print goes into its log.
        stdout: where the training shows itself; None is this process's own stdout.
    """
    for stale in (RESULT, PID):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(run, stale))
    with open(os.path.join(run, LOG), "ab") as log:
        since = log.tell()
        process = subprocess.Popen(
            command.words,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=log,
            env={**os.environ, **command.environment},
            start_new_session=_POSIX,
        )
    training = _Training(process, run)
    try:
        with training.forwarded_signals():
            training.wait()
    finally:
        training.end()
    return _ended(training, run, since)


class _Training:
    """One `accelerate launch` with the trainer that it starts.

    Args:
        process: accelerate's own process, the first of its session.
        run: where the trainer leaves its process id.
    """

    def __init__(self, process: subprocess.Popen[bytes], run: str) -> None:
        self.process = process
        self.run = run
        self.received: list[int] = []
        self.killed = False
        self._kill_at = 0.0

    @contextlib.contextmanager
    def forwarded_signals(self) -> Iterator[None]:
        """Signals to this process are the trainer's; the second Ctrl-C ends it at once."""
        before = {number: signal.signal(number, self._receive) for number in heeded_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self) -> None:
        """Until accelerate and the trainer have both ended, however long saving takes."""
        while self.process.poll() is None or self._trainer() is not None:
            time.sleep(_POLL_SECONDS)
            if self._kill_at and time.monotonic() >= self._kill_at:
                self._signal_all(_KILL)

    def end(self) -> None:
        """Ends what is left; a parent that fails for any reason leaves nothing running."""
        if self.process.poll() is None:
            self._stop(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE_SECONDS)
        self._signal_all(_KILL)
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)
        if len(self.received) == 1:
            _say(localise("Stopping after this step, to save it. Ctrl-C once more stops at once."))
            self._stop(number)
        elif number == signal.SIGINT:
            self.killed = True
            self._kill_at = self._kill_at or time.monotonic() + _AT_ONCE_SECONDS
            trainer = self._trainer()
            if trainer is None or not _POSIX:
                self._signal_all(_KILL)
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(trainer, number)

    def _stop(self, number: int) -> None:
        """Asks the trainer to save and stop; before there is a trainer, there is nothing to save."""
        trainer = self._trainer()
        if not _POSIX and self.process.stdin is not None:
            self.process.stdin.close()
        elif trainer is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer, number)
        else:
            self._signal_all(signal.SIGTERM)

    def _trainer(self) -> int | None:
        """The trainer's process id, where it runs and belongs to this session."""
        try:
            with open(os.path.join(self.run, PID), encoding="ascii") as file:
                number = int(file.read())
            if _POSIX and os.getpgid(number) != self.process.pid:
                return None
        except (OSError, ValueError):
            return None
        return number if _is_running(number) else None

    def _signal_all(self, number: int) -> None:
        if _POSIX:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
        elif self.process.poll() is None:
            self.process.terminate()


def _is_running(number: int) -> bool:
    """Whether a process runs; one that ended and was never waited for does not."""
    import psutil

    try:
        status: str = psutil.Process(number).status()
    except psutil.NoSuchProcess:
        return False
    return status != psutil.STATUS_ZOMBIE


def _ended(training: _Training, run: str, since: int) -> Ended:
    exit_code = training.process.returncode
    stopped_by = training.received[0] if training.received else None
    result = read_result(Path(run)) or _missing_result(training, run, since)
    return Ended(
        result=result,
        signal=stopped_by,
        exit_code=exit_code,
        killed=training.killed,
    )


def _missing_result(training: _Training, run: str, since: int) -> Result:
    """What can be said of a training that left no result: it was killed, or fell over before it could."""
    folder = Path(run)
    step, kept = last_step(folder / METRICS), last_checkpoint(folder / CHECKPOINTS)
    checkpoint = str(kept.path) if kept is not None else None
    if training.received:
        what = "It was stopped at once." if training.killed else "It was stopped before the first step."
        return Result(
            outcome="interrupted", signal=training.received[0], step=step, checkpoint=checkpoint, message=what
        )
    said = log_tail(folder, since)
    if any("SIGKILL" in line for line in said[-3:]):
        return Result(
            outcome="failed",
            step=step,
            checkpoint=checkpoint,
            message="The training process was killed from outside (SIGKILL).",
            hint="The system does that when host RAM runs out: close other programs, or take a smaller plan.",
        )
    return Result(
        outcome="failed",
        step=step,
        checkpoint=checkpoint,
        message="The training process ended without a word. Its log ends so:\n" + "\n".join(said[-8:]),
        hint=f"The whole log is {os.path.join(run, LOG)}.",
    )


def _say(text: str) -> None:
    """Writes a line of its own, from a signal handler: no buffer and no lock is waited for."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def restore_cursor() -> None:
    """Shows the cursor that a killed training's screen hid."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()


__all__ = ["Ended", "restore_cursor", "supervise"]
