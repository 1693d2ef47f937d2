"""What `accelerate launch` runs: a job file → a trained model, or the reason why there is none.

The parent process learns how it ended from result.json: accelerate folds every exit code into 1.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from advisor.errors import AdvisorError, RunFailedError
from advisor.hardware import peak_ram_bytes
from advisor.training.checkpoints import CHECKPOINTS, last_checkpoint
from advisor.training.interruption import Interrupted, Interruption
from advisor.training.job import Job, read_job
from advisor.training.log import LOG, log_to_file
from advisor.training.outcome import asked_for, outcome_of
from advisor.training.result import Outcome, Result, keep_room, write_result

if TYPE_CHECKING:
    from advisor.training.session import Session

PID = "trainer.pid"

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name since torch 2.9, and the one before, which is still read where the other is not set."""


def main(job_path: str) -> int:
    """Run a job to its end, whatever that is; returns the exit code."""
    job = read_job(job_path)
    folder = Path(job.out)
    folder.mkdir(parents=True, exist_ok=True)
    _prepare_environment(job)
    keep_room(folder)
    log_to_file(folder)
    try:
        return _run(job, folder)
    finally:
        (folder / PID).unlink(missing_ok=True)


def _prepare_environment(job: Job) -> None:
    """What torch reads when it starts. Expandable segments exist on Linux with CUDA alone."""
    if job.device.startswith("cuda") and sys.platform == "linux" and not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _run(job: Job, folder: Path) -> int:
    session: Session | None = None

    def stop_now(number: int) -> None:
        message = "Stopped at once; the step in progress is lost."
        try:
            _write(session, folder, "interrupted", signal=number, message=message)
            (folder / PID).unlink(missing_ok=True)
        finally:
            os._exit(128 + number)

    interruption = Interruption(stop_now)
    try:
        interruption.listen()
        _say_which_process(folder)
        from advisor.training.session import Session

        session = Session(job, interruption)
        session.run()
    except BaseException as error:
        interruption.ignore()
        number = interruption.number
        # A library that was interrupted in an import, say, makes its own error of it.
        if number is not None and (isinstance(error, Interrupted) or not interruption.can_wait):
            _write(session, folder, "interrupted", signal=number, message=f"Stopped by signal {number}.")
            return 128 + number
        logging.getLogger(__name__).exception("The training ended with an error.")
        return _fail(session, folder, error)
    interruption.ignore()
    if interruption.number is not None and not session.finished:
        message = f"Stopped by signal {interruption.number} after a step, and saved."
        _write(session, folder, "interrupted", signal=interruption.number, message=message)
        return 128 + interruption.number
    _write(session, folder, "finished", message="Trained to the end.")
    return 0


def _say_which_process(folder: Path) -> None:
    """Whoever reads it may send a signal, so it is there with its number or not at all."""
    aside = folder / f"{PID}.part"
    aside.write_text(f"{os.getpid()}\n", encoding="ascii")
    aside.replace(folder / PID)


def _fail(session: Session | None, folder: Path, error: BaseException) -> int:
    """Say what an error was; returns the exit code."""
    outcome = outcome_of(error)
    hint = error.hint if isinstance(error, AdvisorError) else ""
    if isinstance(error, AdvisorError):
        message = f"{error.what.rstrip('.')}. {error.why}".strip()
    elif outcome == "out_of_memory":
        asked = asked_for(error)
        message = "Memory ran out" + (f": {asked} more was asked for." if asked else ".")
        hint = "Take a smaller plan: a smaller micro_batch or seq_len, checkpointing, a chunked loss, or QLoRA."
    elif outcome == "disk_full":
        message, hint = "Nothing more could be written.", "Free some space."
    else:
        message = f"{type(error).__name__}: {str(error)[:500]}"
        hint = f"{folder / LOG} has the whole story."
    code = error.exit_code if isinstance(error, AdvisorError) else RunFailedError.exit_code
    _write(session, folder, outcome, message=message, hint=hint, exit_code=code)
    return code


def _write(
    session: Session | None,
    folder: Path,
    outcome: Outcome,
    *,
    message: str,
    hint: str = "",
    signal: int | None = None,
    exit_code: int | None = None,
) -> None:
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    known = session.facts() if session is not None else {}
    write_result(
        folder,
        Result(
            outcome=outcome,
            signal=signal,
            message=message,
            hint=hint,
            exit_code=exit_code,
            checkpoint=str(checkpoint.path) if checkpoint else None,
            host_peak_bytes=peak_ram_bytes(),
            **known,
        ),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
