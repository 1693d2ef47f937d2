"""log.txt: what the libraries say, and what went wrong."""

from __future__ import annotations

import faulthandler
import logging
import os
from pathlib import Path

LOG = "log.txt"

_TAIL_LINES = 12
_TAIL_BYTES = 16_384

_TOO_TALKATIVE = ("httpx", "httpcore", "urllib3", "filelock", "fsspec", "asyncio")
"""Some of them log addresses that carry a signature."""


def log_to_file(folder: Path) -> None:
    """From now on warnings and the libraries' messages go to the run folder's log, and nowhere else."""
    file = open(folder / LOG, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the process
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _TOO_TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    faulthandler.enable(file)


def quiet_libraries() -> None:
    """The libraries' own handlers and bars give way to the log and to our progress."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()
    try:
        import datasets
    except ImportError:
        # A dry run makes its own rows and needs none.
        return
    datasets.utils.logging.enable_propagation()
    datasets.disable_progress_bars()


def log_tail(folder: Path, since: int = 0) -> list[str]:
    """The log's last lines, from a byte on: what there is to say where a training left no result."""
    try:
        with open(folder / LOG, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since, size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-_TAIL_LINES:]
