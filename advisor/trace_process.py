"""A trace in a process of its own, for callers that must stay responsive and be able to give it up.

    python -m advisor.trace_process < (a pickled plan, model and GPU)

Each line on stdout is one JSON object: {"progress": what begins} any number of times, then {"traced": the answer of
`phi3-advise trace --json`} or {"error": {what, why, hint}}.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from typing import Any

from advisor.errors import AdvisorError, RunFailedError
from advisor.hardware import Gpu
from advisor.plan import Plan
from advisor.profiles import ModelSource

_LONGEST_LINE = 16 * 2**20
"""The answer is one line of some tens of KiB."""


async def trace_apart(plan: Plan, model: ModelSource, gpu: Gpu, progress: Callable[[str], None]) -> dict[str, Any]:
    """The answer of `phi3-advise trace --json`; cancelling it ends the process.

    Raises:
        AdvisorError: what the trace raised, or that its process ended without an answer.
    """
    command = (sys.executable, "-m", "advisor.trace_process")
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=errors, limit=_LONGEST_LINE
        )
        try:
            answer = await _answer_of(process, pickle.dumps((plan, model, gpu)), progress)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
        if answer is None:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").splitlines() or [f"It ended with code {process.returncode}."]
            raise RunFailedError(
                "The trace ended without an answer.",
                why=lines[-1][:200],
                hint="Save the plan and run phi3-advise trace.",
            )
        return answer


async def _answer_of(process: Process, asked: bytes, progress: Callable[[str], None]) -> dict[str, Any] | None:
    """What the process says; None where it ends without."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(asked)
    process.stdin.close()
    async for line in process.stdout:
        said = json.loads(line)
        if "progress" in said:
            progress(said["progress"])
        elif "error" in said:
            raise AdvisorError(said["error"]["what"], why=said["error"]["why"], hint=said["error"]["hint"])
        else:
            answer: dict[str, Any] = said["traced"]
            return answer
    return None


def main() -> None:
    """The process: reads what to trace from stdin."""
    import logging
    import os
    import warnings

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer

    def say(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # From the process that started this one, over a pipe that nobody else has.
    plan, model, gpu = pickle.load(sys.stdin.buffer)
    from advisor.report.json import trace_object
    from advisor.traced import trace_plan

    try:
        traced = trace_plan(plan, model, gpu, progress=lambda what: say(progress=what))
    except AdvisorError as error:
        say(error={"what": error.what, "why": error.why, "hint": error.hint})
    else:
        say(traced=trace_object(traced))


if __name__ == "__main__":
    main()
