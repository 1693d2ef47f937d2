"""While a model trains: one live block on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from advisor.report.language import localise, localise_label
from advisor.report.terminal.text import line_width, print_paragraph
from advisor.report.terminal.wrapping import pad
from advisor.report.words import clean
from advisor.units import duration, size

SHORTEST_PAUSE = 10.0
"""Seconds between two plain lines at first."""

LONGEST_PAUSE = 60.0
"""Seconds between two plain lines of a long run."""

_REFRESHES_PER_SECOND = 4
_NARROWEST_BAR = 10
_LABEL_WIDTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a training is."""

    step: int
    """Optimizer steps taken."""

    steps: int
    """Optimizer steps in all."""

    loss: float | None
    """Mean loss of the last step; None before the first."""

    learning_rate: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    allocated_bytes: int | None = None
    """Peak of the tensors so far; None where the device does not say."""

    reserved_bytes: int | None = None
    """Peak of what torch holds so far; None where the device does not say."""


class TrainingDisplay:
    """Shows a training as it goes; used as a context manager.

    A reader that has gone, or a terminal that was closed, ends the showing and not the training.

    Args:
        console: where to; a terminal gets a block that is redrawn, everything else a line now and then.
        steps: optimizer steps in all.
        predicted_bytes: peak reserved as predicted.
        capacity_bytes: what this process can have of the device's memory.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        predicted_bytes: int | None = None,
        capacity_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._predicted_bytes = predicted_bytes
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._progress = Progress(
            step=0, steps=steps, loss=None, learning_rate=None, tokens_per_second=None, seconds_left=None
        )
        self._live: Live | None = None
        self._began = self._said_at = clock()
        self._said: int | None = None

    def __enter__(self) -> Self:
        self._began = self._said_at = self._clock()
        if is_redrawable(self._console):
            self._live = Live(
                self,
                console=self._console,
                refresh_per_second=_REFRESHES_PER_SECOND,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            if self._live is not None:
                self._live.stop()
            elif self._progress.loss is not None and self._said != self._progress.step:
                self._say_progress()
        self._live = None

    def update(self, progress: Progress) -> None:
        """Shows that much progress; a line is printed only where it is due."""
        self._progress = progress
        if self._live is None and self._is_due():
            with suppress(OSError):
                self._say_progress()

    def say(self, text: str) -> None:
        """Prints a paragraph above the progress."""
        with suppress(OSError):
            print_paragraph(self._console, text, indent="  ")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The block as it stands: two lines, three where memory is known."""
        width = min(line_width(console), options.max_width) - 1
        done, steps = self._progress.step, self._progress.steps
        yield _bar_line("training", done / steps if steps else 0.0, f"step {done:,}/{steps:,}", width, style="green")
        held, ceiling = self._progress.reserved_bytes, self._ceiling_bytes
        if held is not None and ceiling:
            over = self._predicted_bytes is not None and held > self._predicted_bytes
            style = "yellow" if over else "green"
            yield _bar_line("memory", held / ceiling, self._memory(), width, style=style)
        facts = " · ".join(map(localise, self._facts()))
        yield Text(set_cell_size(" " * (_LABEL_WIDTH + 1) + facts, width).rstrip())

    @property
    def _ceiling_bytes(self) -> int | None:
        return self._capacity_bytes or self._predicted_bytes

    def _facts(self) -> list[str]:
        now = self._progress
        facts = ["loss –" if now.loss is None else f"loss {now.loss:.4f}"]
        if now.learning_rate is not None:
            facts.append(f"rate {now.learning_rate:.2e}")
        if now.tokens_per_second is not None:
            facts.append(f"{now.tokens_per_second:,.0f} tokens/s")
        if now.seconds_left is not None:
            facts.append(f"{duration(now.seconds_left)} left")
        return facts

    def _memory(self) -> str:
        """Live against predicted."""
        held = self._progress.reserved_bytes
        if held is None:
            return ""
        return size(held) if self._predicted_bytes is None else f"{size(held)}, {size(self._predicted_bytes)} predicted"

    def _is_due(self) -> bool:
        """A line for the first step, the last, and then the more seldom the longer the run has been going."""
        now = self._progress
        if now.loss is None or now.step == self._said:
            return False
        elapsed = self._clock() - self._began
        pause = min(LONGEST_PAUSE, max(SHORTEST_PAUSE, elapsed / 20))
        return self._said is None or now.step >= now.steps or self._clock() - self._said_at >= pause

    def _say_progress(self) -> None:
        self._said, self._said_at = self._progress.step, self._clock()
        said = [f"step {self._progress.step:,}/{self._progress.steps:,}", *self._facts()]
        said += [self._memory()] if self._memory() else []
        self._console.print(Text(clean(" · ".join(map(localise, said)))), soft_wrap=True)


def is_redrawable(console: Console) -> bool:
    """Whether lines already printed can be drawn again: a terminal, and not a notebook's output cell.

    A notebook gives `!commands` a pseudo-terminal, and shows what they print line by line.
    """
    in_notebook = any(name in os.environ for name in ("JPY_PARENT_PID", "COLAB_RELEASE_TAG"))
    return console.is_terminal and not console.is_dumb_terminal and not in_notebook


def _bar_line(label: str, share: float, said: str, width: int, *, style: str) -> Text:
    """A name, a bar, and what the bar means in words; the words win where there is no room."""
    label, said = localise_label(label), localise(said)
    room = width - _LABEL_WIDTH - 1 - cell_len(said) - 2
    line = Text(f"{pad(label, _LABEL_WIDTH)} ", style="bold")
    if room >= _NARROWEST_BAR:
        filled = round(max(0.0, min(1.0, share)) * room)
        line.append("█" * filled, style=style).append("░" * (room - filled), style="dim").append("  ")
    return line.append(said, style="")


__all__ = ["Progress", "TrainingDisplay", "is_redrawable"]
