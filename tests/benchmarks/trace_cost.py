"""What a trace costs: seconds and memory of `phi3-advise trace`, the whole process, from start to its end.

    python tests/benchmarks/trace_cost.py [--runs 3] [--against FOLDER]

All cases run in turn, so that a noisy minute falls on all alike. The goals on two cores: Phi-3-mini within
10 s and 1 GiB, Phi-3-medium within 15 s. With a checkout of another version, every run is followed by one of
that version, and the ratio of the processor times is printed: a noisy machine's seconds say little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

METHODS = {"LoRA": 'method = "lora"\n', "QLoRA": 'method = "qlora"\n[quantization]\n'}
CASES = {
    f"{model} {name}": f'model = "phi-3-{model}-4k"\nmicro_batch = 2\nseq_len = 2048\n{method}[lora]\nrank = 16\n'
    for model in ("mini", "medium")
    for name, method in METHODS.items()
}


@dataclass(frozen=True)
class Cost:
    """Of one process: on the clock, on the processor, and its largest resident size."""

    seconds: float
    cpu_seconds: float
    gib: float


def measure(plan: Path, checkout: Path) -> Cost:
    """Run one case in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore"}
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "advisor", "trace", "--plan", str(plan), "--json"],
        cwd=checkout,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        raise SystemExit(f"{plan.read_text()}ended with {os.waitstatus_to_exitcode(status)}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)  # KiB on Linux


def main() -> None:
    """Print one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another version's checkout")
    options = parser.parse_args()
    ours = Path(__file__).parents[2]
    checkouts = [ours] + ([options.against.resolve()] if options.against else [])
    found: dict[tuple[str, Path], list[Cost]] = {(case, checkout): [] for case in CASES for checkout in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.runs):
            for case, text in CASES.items():
                plan = Path(folder) / "plan.toml"
                plan.write_text(text)
                for checkout in checkouts:
                    found[case, checkout].append(measure(plan, checkout))
    for case in CASES:
        costs = found[case, ours]
        seconds, slowest = statistics.median(c.seconds for c in costs), max(c.seconds for c in costs)
        line = f"{case:13} {seconds:5.1f} s (slowest {slowest:.1f})  {max(c.gib for c in costs):5.2f} GiB"
        if options.against:
            ratios = [a.cpu_seconds / b.cpu_seconds for a, b in zip(costs, found[case, checkouts[1]], strict=True)]
            line += f"  {statistics.median(ratios):.2f} of the other's processor time"
        print(line)


if __name__ == "__main__":
    main()
