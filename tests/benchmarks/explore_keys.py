"""How long the explorer takes from a key to the painted screen, key by key.

    python tests/benchmarks/explore_keys.py [--runs N] [--size 120x40]

Each key is sent as the terminal would send it; what is timed ends when the screen's change has been handed to the
terminal. The goal is 50 ms for every key, which includes the up to 17 ms that textual waits to gather changes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from textual import events
from textual.pilot import Pilot
from textual.screen import Screen

from advisor.cli.explore import first_view
from advisor.explore import KNOBS
from advisor.report.explorer.app import Explorer

GOAL_MS = 50
_LONGEST_S = 2.0


class TimedExplorer(Explorer):
    """Says when it has painted."""

    painted: asyncio.Event
    painted_at = (0.0, 0.0)

    def _display(self, screen: Screen[Any], renderable: Any) -> None:
        super()._display(screen, renderable)
        self.painted_at = (time.perf_counter(), time.process_time())
        self.painted.set()


async def milliseconds(app: TimedExplorer, pilot: Pilot[Any], key: str) -> tuple[float, float] | None:
    """From the key to the last painting that follows it, on the clock and on the processor; None without a painting."""
    await pilot.pause()
    app.painted.clear()
    event = events.Key(key, key if len(key) == 1 else None)
    event.set_sender(app)
    assert app._driver is not None
    clock, processor = time.perf_counter(), time.process_time()
    app._driver.send_message(event)
    try:
        await asyncio.wait_for(app.painted.wait(), _LONGEST_S)
    except TimeoutError:
        return None
    await pilot.pause()  # a second painting, where the change came in two
    return (app.painted_at[0] - clock) * 1000, (app.painted_at[1] - processor) * 1000


async def measure(runs: int, size: tuple[int, int], model: str, gpu: str) -> dict[str, list[tuple[float, float]]]:
    """Times by key; dialogs are opened and left again."""
    app = TimedExplorer(first_view(model, gpu, None))
    app.painted = asyncio.Event()
    letters = [letter for knob in KNOBS for letter in (knob.key, knob.key.upper())]
    keys = ["down", "up", "right", "left", *letters, "w", "s", "escape", "l", "escape"]
    times: dict[str, list[tuple[float, float]]] = {}
    async with app.run_test(size=size) as pilot:
        for _ in range(runs):
            for key in keys:
                took = await milliseconds(app, pilot, key)
                if took is not None:
                    times.setdefault(key, []).append(took)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="The explorer's answer to each key, in milliseconds.")
    parser.add_argument("--runs", type=int, default=5, help="times that every key is pressed (default: 5)")
    parser.add_argument("--size", default="80x24", help="columns x rows (default: 80x24)")
    parser.add_argument("--model", default="phi-3-mini-4k")
    parser.add_argument("--gpu", default="t4")
    given = parser.parse_args()
    columns, _, rows = given.size.partition("x")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        times = asyncio.run(measure(given.runs, (int(columns), int(rows)), given.model, given.gpu))
        os.chdir("/")
    print("key        clock: worst, median    processor: worst, median (ms)")
    for key, took in sorted(times.items(), key=lambda item: max(item[1]), reverse=True):
        print(f"{key:<8} {'  '.join(worst_and_median(column) for column in zip(*took, strict=True))}")
    clocks, processors = zip(*(pair for took in times.values() for pair in took), strict=True)
    print(f"all      {worst_and_median(clocks)}  {worst_and_median(processors)}")
    print(f"{len(clocks)} presses, {sum(clock > GOAL_MS for clock in clocks)} of them above {GOAL_MS} ms on the clock")


def worst_and_median(times: Sequence[float]) -> str:
    """Two columns."""
    return f"{max(times):14.1f} {statistics.median(times):8.1f}"


if __name__ == "__main__":
    main()
