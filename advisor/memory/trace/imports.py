"""Imports that take the greater part of a trace's time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[Callable[[], None]]:
    """No garbage collection while libraries are imported, until what is yielded is called; then none among them.

    They make objects by the million, and an eighth of the time would go into looking for cycles among those. Where
    a program has set collection up in its own way, nothing is changed.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        yield lambda: None
        return

    def resume() -> None:
        gc.freeze()  # before collection is on: it would begin with all that is new
        gc.enable()

    gc.disable()
    try:
        yield resume
    finally:
        gc.enable()
        gc.unfreeze()
