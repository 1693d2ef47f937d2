"""The folder that a probe works in, held by a lock; one that nobody holds was left by a killed process, and goes.

A lock and no process id: containers that share a home folder count their processes each for itself.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_LOCK = ".lock"


@contextmanager
def work_folder(base: str) -> Iterator[str]:
    """A new folder under `base`, gone afterwards; so are those whose process never came so far.

    The lock is a file beside the folder, there before it and until after it. Where `base` takes nothing, the folder is
    among the system's temporary files.

    Raises:
        OSError: nothing can be written there either.
    """
    try:
        os.makedirs(base, exist_ok=True)
        sweep(base)
        folder, descriptor = _hold(base)
    except OSError:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            yield temporary
        return
    try:
        os.mkdir(folder, 0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)
        with suppress(OSError):
            os.remove(folder + _LOCK)


def discard(folder: str) -> None:
    """Removes the folder of a process that is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        os.remove(folder + _LOCK)


def sweep(base: str) -> None:
    """Removes every folder under `base` that nobody holds."""
    for stem in {name.removesuffix(_LOCK) for name in os.listdir(base)}:
        folder = os.path.join(base, stem)
        if os.path.lexists(folder + _LOCK):
            _discard_if_free(folder)
        else:
            discard(folder)


def _hold(base: str) -> tuple[str, int]:
    """The name of a folder that is this process's, and the descriptor that says so while it is open."""
    while True:
        folder = os.path.join(base, secrets.token_hex(8))
        descriptor = os.open(folder + _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _lock(descriptor)
        if os.path.lexists(folder + _LOCK):
            return folder, descriptor
        # Somebody who swept came between making it and holding it.
        os.close(descriptor)


if sys.platform == "win32":

    def _lock(descriptor: int) -> None:
        """There a file that is open is held: it cannot be removed."""

    def _discard_if_free(folder: str) -> None:
        with suppress(OSError):
            os.remove(folder + _LOCK)
            discard(folder)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        """Waits for one who sweeps. A file system that has no locks keeps what killed processes leave."""
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)

    def _discard_if_free(folder: str) -> None:
        with suppress(OSError):
            descriptor = os.open(folder + _LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                discard(folder)
            finally:
                os.close(descriptor)


__all__ = ["discard", "sweep", "work_folder"]
