"""What is seen of a training that runs: in a pipe, on a terminal, in a notebook."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from advisor.report.terminal.training import Progress, TrainingDisplay, is_redrawable
from advisor.units import GIB


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JPY_PARENT_PID", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def console(*, terminal: bool = False, width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=terminal, color_system=None, highlight=False), file


def at(step: int, steps: int = 100, **values: float) -> Progress:
    told = {"loss": 2.5, "learning_rate": 2e-4, "tokens_per_second": 1234.5, "seconds_left": 600.0} | values
    return Progress(step=step, steps=steps, allocated_bytes=4 * GIB, reserved_bytes=5 * GIB, **told)


def run(seconds_a_step: float, steps: int) -> list[str]:
    out, file = console()
    clock = Clock()
    with TrainingDisplay(out, steps=steps, predicted_bytes=6 * GIB, capacity_bytes=14 * GIB, clock=clock) as display:
        for step in range(1, steps + 1):
            clock.now += seconds_a_step
            display.update(at(step, steps))
    return file.getvalue().splitlines()


def test_a_pipe_gets_plain_lines_with_the_first_and_the_last_step() -> None:
    lines = run(0.5, 100)
    assert lines[0].startswith("step 1/100 ")
    assert lines[-1].startswith("step 100/100 ")
    assert len(lines) == 6  # the first, one every ten seconds of fifty, the last
    for line in lines:
        assert not re.search(r"[\r\x1b]", line)
    assert lines[0] == (
        "step 1/100 · loss 2.5000 · rate 2.00e-04 · 1,234 tokens/s · 10 min left · 5.00 GiB, 6.00 GiB predicted"
    )


def test_a_day_of_training_does_not_fill_the_log() -> None:
    assert len(run(8.0, 3 * 60 * 60 // 8)) < 250


def test_a_step_is_not_said_twice_and_the_last_one_of_a_stopped_run_is_said() -> None:
    out, file = console()
    with TrainingDisplay(out, steps=100) as display:
        display.update(at(1))
        display.update(at(1))
        display.update(at(2))
    assert [line.split(" · ")[0] for line in file.getvalue().splitlines()] == ["step 1/100", "step 2/100"]


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_block_on_a_terminal_stays_within_its_width(width: int) -> None:
    out, file = console(width=width)
    display = TrainingDisplay(out, steps=1000, predicted_bytes=6 * GIB, capacity_bytes=14 * GIB)
    display._progress = at(999, 1000)
    out.print(display)
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= width
    assert "step 999/1,000" in lines[0]
    assert "5.00 GiB, 6.00 GiB predicted" in lines[1]
    assert "loss 2.5" in lines[2]


def test_memory_that_no_device_reports_is_not_shown() -> None:
    out, file = console()
    display = TrainingDisplay(out, steps=10)
    out.print(display)
    assert file.getvalue().splitlines()[-1].strip() == "loss –"
    assert "memory" not in file.getvalue()


def test_words_said_stand_above_the_block() -> None:
    out, file = console(terminal=True)
    with TrainingDisplay(out, steps=2) as display:
        display.update(at(1, 2))
        display.say("A checkpoint was written.")
    text = file.getvalue()
    assert text.index("A checkpoint was written.") < text.rindex("step 1/2")


@pytest.mark.parametrize("name", ["JPY_PARENT_PID", "COLAB_RELEASE_TAG"])
def test_a_notebook_s_pseudo_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    out, _ = console(terminal=True)
    monkeypatch.setenv("TERM", "xterm-color")
    assert is_redrawable(out)
    monkeypatch.setenv(name, "1")
    assert not is_redrawable(out)
