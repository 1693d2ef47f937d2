"""How long an answer takes as a whole process, against a process that only imports what draws the screen.

    python tests/benchmarks/cold_start.py [--runs N]

The two alternate, so that a slow moment of the machine falls on both. The goal is a ratio of at most 2. Then the search
behind the answer, timed in a fresh process each time: the goal is at most 40 ms.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shlex
import statistics
import subprocess
import sys
import sysconfig
import time

import advisor

IMPORTS = [sys.executable, "-c", "import click, rich.console, rich.table"]


SEARCH = """
import time
from advisor.advise import Request, advise
from advisor.hardware import what_if
from advisor.profiles import load_gpu, load_model
model, gpu = load_model("phi-3-mini-4k"), what_if(load_gpu("t4"))
start = time.perf_counter()
advise(model, gpu, Request())
print(time.perf_counter() - start)
"""


def advise_command() -> list[str]:
    """The console script beside this Python, or the module where the package was never installed."""
    script = os.path.join(sysconfig.get_path("scripts"), "phi3-advise")
    program = [script] if os.path.isfile(script) else [sys.executable, "-m", "advisor"]
    return [*program, "--gpu", "t4", "--json"]


def seconds(command: list[str]) -> float:
    """How long the command takes, from start to exit.

    Raises:
        subprocess.CalledProcessError: it failed, so its time says nothing.
    """
    start = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def search_seconds() -> float:
    """The search of one answer, in a process where nothing ran before."""
    done = subprocess.run([sys.executable, "-c", SEARCH], check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="phi3-advise's whole process against importing click and rich.")
    parser.add_argument("--runs", type=int, default=15, help="pairs to time (default: 15)")
    runs = parser.parse_args().runs
    advise = advise_command()
    compileall.compile_dir(os.path.dirname(advisor.__file__), quiet=1)  # as pip does when it installs a wheel
    for command in (advise, IMPORTS):  # once unmeasured: compiles the bytecode and fills the file cache
        seconds(command)
    pairs = [(seconds(advise), seconds(IMPORTS)) for _ in range(runs)]
    answer, imports = (statistics.median(times) for times in zip(*pairs, strict=True))
    for command, median in ((advise, answer), (IMPORTS, imports)):
        print(f"{median * 1000:6.0f} ms  {shlex.join([os.path.basename(command[0]), *command[1:]])}")
    print(f"{answer / imports:6.2f}     ratio of the medians of {runs} alternating runs")
    search = statistics.median(search_seconds() for _ in range(runs))
    print(f"{search * 1000:6.1f} ms  the search behind the answer: three methods, all knobs")


if __name__ == "__main__":
    main()
