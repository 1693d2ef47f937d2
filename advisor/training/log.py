"""log.txt: what the libraries say, and what went wrong."""

from __future__ import annotations

import faulthandler
import logging
from pathlib import Path

LOG = "log.txt"

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
