"""Being asked to stop: by Ctrl-C, by the system, by a terminal that closes.

The first signal ends a command as an exception that unwinds it: screens are put right, processes that it started are
ended, what is half-written goes. On that way out, and while it says what became of the work, nothing interrupts it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ONE_STOP_SECONDS = 2.0
"""Signals that follow one another faster are one: a key that is held down repeats some thirty times a second, after a
first pause of less than this."""


class Stopped(KeyboardInterrupt):
    """The command was asked to stop; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class _Heard:
    """The last signal that came, and the first that stopped the command."""

    at = -ONE_STOP_SECONDS
    stopped_by: int | None = None


def heeded_signals() -> tuple[int, ...]:
    """What stops a training. Whoever began it under nohup wants no closed terminal to."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return tuple(signals)


def hear() -> bool:
    """Notes that a signal came; whether it is another one than the last, and not the same key's."""
    now = time.monotonic()
    new = now - _Heard.at >= ONE_STOP_SECONDS
    _Heard.at = now
    return new


def stopped_by() -> int | None:
    """The signal that `Stopped` was raised for first; libraries may have made another error of it."""
    return _Heard.stopped_by


def heed_signals() -> None:
    """From now on a signal raises `Stopped`, but one that is ignored, as in a shell's background, or has a handler."""
    for number in _SIGNALS if _can_be_asked() else ():
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _receive)


def heed_no_more() -> None:
    """From now on no signal changes anything: the exit code is known."""
    for number in _SIGNALS if _can_be_asked() else ():
        if signal.getsignal(number) is _receive:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def stopped_once(*, ends_process: bool) -> Iterator[None]:
    """A signal raises `Stopped`, and the same key held down does not do so again.

    Args:
        ends_process: nothing comes after it but the end of the interpreter, which no signal interrupts.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _Heard.stopped_by = None
    heed_signals()
    try:
        yield
    finally:
        if ends_process:
            heed_no_more()
        elif _can_be_asked():
            for number, handler in before.items():
                if signal.getsignal(number) is _receive:
                    signal.signal(number, handler)


def _can_be_asked() -> bool:
    return threading.current_thread() is threading.main_thread()


def _receive(number: int, _: FrameType | None) -> None:
    if hear():
        _Heard.stopped_by = _Heard.stopped_by or number
        raise Stopped(number)


def silence_stdout() -> None:
    """Keeps the interpreter from complaining about a reader that has gone, or a terminal that was closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


__all__ = [
    "Stopped",
    "hear",
    "heed_no_more",
    "heed_signals",
    "heeded_signals",
    "silence_stdout",
    "stopped_by",
    "stopped_once",
]
