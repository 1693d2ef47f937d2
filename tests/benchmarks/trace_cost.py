"""What a trace costs: seconds and memory of a whole process, from start to answer.

    python tests/benchmarks/trace_cost.py [--runs 3]

Each case runs in a process of its own, all cases in turn, so that a noisy minute falls on all of them alike. The limits
on two cores: Phi-3-mini within 10 s and 1 GiB, Phi-3-medium within 15 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "mini LoRA": {"model": "phi-3-mini-4k", "method": "lora", "lora": {"rank": 16}},
    "mini QLoRA": {"model": "phi-3-mini-4k", "method": "qlora", "lora": {"rank": 16}, "quantization": {}},
    "medium LoRA": {"model": "phi-3-medium-4k", "method": "lora", "lora": {"rank": 16}},
    "medium QLoRA": {"model": "phi-3-medium-4k", "method": "qlora", "lora": {"rank": 16}, "quantization": {}},
}
SHAPE = {"micro_batch": 2, "seq_len": 2048}

ONE_CASE = """
import json, resource, sys, time
from advisor.memory.trace import trace
from advisor.plan import plan_from_fields
from advisor.profiles import load_model
fields = json.loads(sys.argv[1])
turns = []
result = trace(plan_from_fields(fields), load_model(fields["model"]).architecture.config,
               progress=lambda turn: turns.append((turn, time.perf_counter())))
turns.append(("end", time.perf_counter()))
spent = {turn: later - begun for (turn, begun), (_, later) in zip(turns, turns[1:])}
print(json.dumps({"events": len(result.events), "turns": spent,
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""
"""ru_maxrss is in KiB on Linux."""


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a fresh process: its seconds on the clock, its largest resident size, its parts."""
    import time

    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ONE_CASE, json.dumps({**fields, **SHAPE})],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "seconds": time.perf_counter() - begun}


def main() -> None:
    """Print one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(runs):
        for name, fields in CASES.items():
            measured[name].append(measure(fields))
    for name, found in measured.items():
        seconds = statistics.median(run["seconds"] for run in found)
        gib = statistics.median(run["peak"] for run in found) / 2**20
        parts = ", ".join(
            f"{turn} {statistics.median(run['turns'][turn] for run in found):.1f}" for turn in found[0]["turns"]
        )
        print(f"{name:13} {seconds:5.1f} s  {gib:5.2f} GiB  {found[0]['events']:,} events  ({parts})")


if __name__ == "__main__":
    main()
