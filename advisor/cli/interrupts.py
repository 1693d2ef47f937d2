"""Ctrl-C: the first one stops a command, and what a key that is held down sends after it is the same one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

QUIET_SECONDS = 1.0
"""A SIGINT that comes sooner after the last one is no new one; keys that are held down repeat many times a second."""


class _Interrupts:
    def __init__(self) -> None:
        self._last: float | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Raises KeyboardInterrupt, unless the same key has just done so: nothing interrupts what is put away then."""
        last, self._last = self._last, time.monotonic()
        if last is None or self._last - last > QUIET_SECONDS:
            signal.default_int_handler(number, frame)


@contextmanager
def one_interrupt(*, ends_process: bool) -> Iterator[None]:
    """A Ctrl-C that is held down raises KeyboardInterrupt once.

    Where SIGINT is ignored or has a handler of somebody else's, as in a shell's background, it stays so.

    Args:
        ends_process: nothing comes after it but the end of the interpreter, which no Ctrl-C interrupts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _Interrupts().receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN if ends_process else before)


__all__ = ["one_interrupt"]
