"""The training process under supervision: signals reach it, its end is waited for, nothing of it is left behind.

`accelerate launch` runs in a session of its own, so a Ctrl-C in the terminal reaches only this process, which passes
it to the trainer alone. The trainer's stdin is a pipe that this process holds open: if this process dies, the trainer
reads the end of the file, saves, and stops.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from advisor.launch.command import MODULE, Command
from advisor.report.language import localise
from advisor.stopping import hear, heeded_signals
from advisor.training.checkpoints import CHECKPOINTS, last_checkpoint
from advisor.training.log import LOG, log_tail
from advisor.training.metrics import METRICS, last_step
from advisor.training.result import RESULT, Result, read_result, write_result
from advisor.training.run import PID

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""What is left of the training's processes after accelerate's own end gets that long."""

_AT_ONCE_SECONDS = 3.0
"""A trainer that was told to stop at once gets that long to say so."""

_NOTHING_BYTES = 2**16
"""A disk that has less free is full: a log and a result do not fit."""

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
    log = os.path.join(run, LOG)
    since = os.path.getsize(log) if os.path.exists(log) else 0
    training = _Training(command, run, stdout)
    with training.forwarded_signals():
        try:
            training.start()
            training.wait()
        finally:
            training.end()
        return _ended(training, run, since)


class _Training:
    """One `accelerate launch` with the trainer that it starts.

    Args:
        command: accelerate's words.
        run: where the trainer leaves its process id.
        stdout: where the training shows itself.
    """

    def __init__(self, command: Command, run: str, stdout: IO[Any] | None) -> None:
        self.command = command
        self.run = run
        self.stdout = stdout
        self.received: list[int] = []
        self.killed = False
        self.exit_code = 1
        self._process: subprocess.Popen[bytes] | None = None
        self._answered = 0
        self._kill_at = 0.0

    def start(self) -> None:
        """Starts accelerate."""
        with open(os.path.join(self.run, LOG), "ab") as log:
            self._process = subprocess.Popen(
                self.command.words,
                stdin=subprocess.PIPE,
                stdout=self.stdout,
                stderr=log,
                env={**os.environ, **self.command.environment},
                start_new_session=_POSIX,
            )

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
        assert self._process is not None
        while self._process.poll() is None or self._trainer() is not None:
            self._answer()
            time.sleep(_POLL_SECONDS)
            if self._kill_at and time.monotonic() >= self._kill_at:
                self._signal_all(_KILL)

    def end(self) -> None:
        """Ends what is left; a parent that fails for any reason leaves nothing running."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._stop(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
        deadline = time.monotonic() + _GRACE_SECONDS
        while not self.killed and self._is_anything_left() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        self._signal_all(_KILL)
        self.exit_code = self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _receive(self, number: int, _: FrameType | None) -> None:
        """No more than a note: a handler runs in the middle of anything, of an import too."""
        hear()
        self.received.append(number)

    def _answer(self) -> None:
        """Passes on the signals that came since."""
        for number in self.received[self._answered :]:
            self._answered += 1
            if self._answered == 1:
                _say(localise("Stopping after this step, to save it. Ctrl-C once more stops at once."))
                self._stop(number)
            elif number == signal.SIGINT and not self.killed:
                self.killed = True
                self._stop_at_once()

    def _stop_at_once(self) -> None:
        self._kill_at = time.monotonic() + _AT_ONCE_SECONDS
        trainer = self._trainer()
        if trainer is None or not _POSIX:
            self._signal_all(_KILL)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer, signal.SIGINT)

    def _stop(self, number: int) -> None:
        """Asks the trainer to save and stop; before there is a trainer, there is nothing to save."""
        trainer = self._trainer()
        if not _POSIX and self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
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
            if _POSIX and (self._process is None or os.getpgid(number) != self._process.pid):
                return None
        except (OSError, ValueError):
            return None
        return number if _is_running(number) else None

    def _is_anything_left(self) -> bool:
        """Whether accelerate's end left a process of its group: a trainer that writes how it ended, say."""
        import psutil

        if not _POSIX or self._process is None:
            return False
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(process.pid) == self._process.pid and _is_running(process.pid):
                    return True
        return False

    def _signal_all(self, number: int) -> None:
        if self._process is None:
            return
        if _POSIX:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
        elif self._process.poll() is None:
            self._process.terminate()


def running_trainer(run: str) -> int | None:
    """The process that trains in a run folder now, on this machine; None where none does."""
    import psutil

    try:
        with open(os.path.join(run, PID), encoding="ascii") as file:
            number = int(file.read())
        # Another program may have the number by now.
        return number if MODULE in psutil.Process(number).cmdline() and _is_running(number) else None
    except (OSError, ValueError, psutil.Error):
        return None


def _is_running(number: int) -> bool:
    """Whether a process runs; one that ended and was never waited for does not."""
    import psutil

    try:
        status: str = psutil.Process(number).status()
    except psutil.NoSuchProcess:
        return False
    return status != psutil.STATUS_ZOMBIE


def _ended(training: _Training, run: str, since: int) -> Ended:
    result = read_result(Path(run))
    if result is None:
        result = _missing_result(training, run, since)
        with contextlib.suppress(OSError):
            write_result(Path(run), result)
    return Ended(
        result=result,
        signal=training.received[0] if training.received else None,
        exit_code=training.exit_code,
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
    if shutil.disk_usage(run).free < _NOTHING_BYTES:
        return Result(
            outcome="disk_full",
            step=step,
            checkpoint=checkpoint,
            message="Nothing more could be written.",
            hint="Free some space.",
        )
    return Result(
        outcome="failed",
        step=step,
        checkpoint=checkpoint,
        message="The training process ended without a word. Its log ends so:\n" + "\n".join(said[-8:]),
        hint=f"The whole log is {os.path.join(run, LOG)}.",
    )


def _say(text: str) -> None:
    """Writes a line of its own; a terminal that was closed takes none."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def restore_cursor() -> None:
    """Shows the cursor that a killed training's screen hid."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()


__all__ = ["Ended", "restore_cursor", "running_trainer", "supervise"]
