"""Being asked to stop: a signal, or the end of the pipe that the parent process holds open."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from types import FrameType

from advisor.stopping import heeded_signals


class Interrupted(BaseException):
    """The run was asked to stop where it can stop at once; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Interruption:
    """Remembers that a signal came, so that a training can save and stop at the end of a step.

    Args:
        stop_now: called at the second SIGINT, which waits for nothing; it should not return.
    """

    def __init__(self, stop_now: Callable[[int], None]) -> None:
        self.number: int | None = None
        """The first signal that came."""

        self.can_wait = False
        """Whether somebody looks at `number` soon; otherwise the first signal raises `Interrupted`."""

        self._stop_now = stop_now
        self._over = False

    def listen(self) -> None:
        """From now on, in the main thread; and to the end of stdin, if that is a pipe."""
        for number in heeded_signals():
            signal.signal(number, self._receive)
        if _is_pipe(0):
            threading.Thread(target=_wait_for_end_of_stdin, name="stdin", daemon=True).start()

    def ignore(self) -> None:
        """From now on no signal changes anything: how the run ended is being written, once and wholly."""
        self._over = True

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._over:
            return
        if self.number is None:
            self.number = number
            if not self.can_wait:
                raise Interrupted(number)
        elif number == signal.SIGINT:
            self.ignore()
            self._stop_now(number)


def _is_pipe(descriptor: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _wait_for_end_of_stdin() -> None:
    """The parent writes nothing: a pipe that ends means that the parent is gone."""
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        return
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGTERM)
    else:
        os.kill(os.getpid(), signal.SIGTERM)
