"""Tokens a second and peak memory: our trainer, a plain transformers.Trainer script, and TRL's SFTTrainer.

    python tests/benchmarks/throughput.py [--rounds 3] [--rows 128] [--methods lora qlora] [--minutes 60] [--write FILE]
    python tests/benchmarks/throughput.py --device cpu

Phi-3-mini's shape with random weights, written once to a temporary folder and loaded by each as it loads a model;
nothing is downloaded. Rows of 64 to 2,048 tokens, the same for all: each trains two epochs of them, and the second is
timed. Each run is a process of its own, and they take turns: a noisy minute falls on all alike. A ratio is of two runs
of one round. Tokens are those of rows; padding that is computed is not counted. A trainer whose package is not
installed is left out and named. When the time is up, or at Ctrl-C, the table is of what there is.

--device cpu: a small model, to see that all of this runs; those numbers say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from campaign.records import environment
from contest.entries import ENTRIES, NEEDS, Clock, Contest

from advisor.stopping import stopped_once
from advisor.units import size

ANSWER = "MEASURED "
SETTINGS = ("defaults", "best")
LONGEST_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One entry in one round; without tokens a second, what went wrong."""

    method: str
    entry: str
    settings: str
    round: int
    tokens_per_second: float | None = None
    computed_per_second: float | None = None
    """Padding counted too."""

    peak_bytes: int | None = None
    """Allocated on the GPU; on the CPU, the process's RAM."""

    reserved_bytes: int | None = None
    error: str = ""


def main() -> None:
    """The command."""
    options = _options()
    if options.one:
        _print_one(json.loads(options.one))
        return
    cpu = options.device == "cpu"
    seq_len = 64 if cpu else options.seq_len
    absent = {name: [one for one in NEEDS.get(name, ()) if find_spec(one) is None] for name in ENTRIES}
    entries = [name for name in ENTRIES if not absent[name]]
    for name, packages in absent.items():
        if packages:
            print(f"left out: {name}; not installed: {', '.join(packages)}")
    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        model = make_model(Path(folder) / "model", options.model, options.device)
        rows = make_rows(options.rows, seq_len)
        contest = {
            "model": str(model),
            "rows": rows,
            "seq_len": seq_len,
            "micro_batch": options.micro_batch,
            "accumulation": options.accumulation,
            "device": options.device,
            "dtype": dtype_of(options.device),
        }
        turns = take_turns(contest, options.methods, entries, options.rounds, Path(folder))
        runs = collect(turns, time.monotonic() + 60 * options.minutes)
    text = table(runs, options)
    print(f"\n{text}")
    if options.write:
        options.write.write_text(f"{text}\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--model", default="phi-3-mini-4k", help="a profile's name; on the CPU a small one")
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora"], choices=["lora", "qlora"])
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="begin no run after that")
    parser.add_argument("--rows", type=int, default=128, help="of an epoch; the second of two is timed")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there as well")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def dtype_of(device: str) -> str:
    """What all compute in: fp16 where bfloat16 is only emulated, fp32 on a processor."""
    if device == "cpu":
        return "float32"
    import torch

    return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"


def make_rows(count: int, seq_len: int) -> list[list[int]]:
    """Rows as instruction data has them, many short and a few long: a log-normal distribution of lengths."""
    rng = random.Random(0)
    lengths = [min(seq_len, max(seq_len // 32, int(rng.lognormvariate(0, 0.9) * seq_len / 5))) for _ in range(count)]
    lengths[0] = seq_len
    return [[rng.randrange(3, 2000) for _ in range(length)] for length in lengths]


def make_model(folder: Path, name: str, device: str) -> Path:
    """A model folder with random weights and Phi-3's tokenizer."""
    sys.path.append(str(Path(__file__).parents[1]))
    from small_model import make_small_model, phi3_tokenizer

    if device == "cpu":
        return make_small_model(folder)
    import torch
    from transformers import AutoModelForCausalLM

    from advisor.profiles import find_model
    from advisor.training.build import build_config

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(build_config(find_model(name).config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    phi3_tokenizer().save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def take_turns(
    contest: Mapping[str, Any], methods: Sequence[str], entries: Sequence[str], rounds: int, folder: Path
) -> Iterator[Run]:
    """Every entry once a round; each round begins with another."""
    field = [(entry, settings) for entry in entries for settings in SETTINGS]
    for number in range(1, rounds + 1):
        first = (number - 1) % len(field)
        for method in methods:
            for entry, settings in field[first:] + field[:first]:
                yield run_one(contest, method, entry, settings, number, folder)


def collect(turns: Iterator[Run], end: float) -> list[Run]:
    """What has run when all have, the time is up, or somebody stops it."""
    runs: list[Run] = []
    try:
        while time.monotonic() < end and (run := next(turns, None)) is not None:
            runs.append(run)
            print(f"round {run.round}  {run.method:5}  {run.entry}, {run.settings}: {_line(run)}", flush=True)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
    return runs


def run_one(contest: Mapping[str, Any], method: str, entry: str, settings: str, number: int, folder: Path) -> Run:
    """One entry in a process of its own."""
    facts = {"method": method, "entry": entry, "settings": settings, "round": number}
    asked = folder / "asked.json"
    with tempfile.TemporaryDirectory(dir=folder) as out:
        values = {**contest, "method": method, "folder": out}
        asked.write_text(json.dumps({"entry": entry, "settings": settings, "contest": values}), encoding="utf-8")
        command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(str(asked))]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=LONGEST_SECONDS,
                check=False,
                env={**os.environ, **_environment(entry, contest["device"])},
                # Ctrl-C is for this process, which ends that one.
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return Run(**facts, error=f"not done after {LONGEST_SECONDS} s")
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if not answers:
        last = [line for line in done.stderr.splitlines() if line.strip()]
        return Run(**facts, error=last[-1][:300] if last else f"exit code {done.returncode}")
    return Run(**facts, **json.loads(answers[-1].removeprefix(ANSWER)))


def _environment(entry: str, device: str) -> dict[str, str]:
    """What a launch of ours sets; the others' scripts leave the allocator as it is."""
    return {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if entry == "ours" and device != "cpu" else {}


def _print_one(path: str) -> None:
    """In a process of its own: train, and say how fast."""
    asked = json.loads(Path(path).read_text(encoding="utf-8"))
    contest = Contest(**asked["contest"])
    clock = Clock(device=contest.device)
    ENTRIES[asked["entry"]](contest, asked["settings"], clock)
    peak, reserved = _peaks(contest.device)
    found = {
        "tokens_per_second": clock.tokens / clock.seconds,
        "computed_per_second": clock.computed / clock.seconds,
        "peak_bytes": peak,
        "reserved_bytes": reserved,
    }
    print(f"{ANSWER}{json.dumps(found)}")


def _peaks(device: str) -> tuple[int | None, int | None]:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    from advisor.hardware import peak_ram_bytes

    return peak_ram_bytes(), None


def _line(run: Run) -> str:
    if run.tokens_per_second is None:
        return run.error
    return f"{run.tokens_per_second:,.0f} tokens/s, peak {size(run.peak_bytes or 0)}"


def ratios(runs: Sequence[Run], one: Run, other: tuple[str, str]) -> list[float]:
    """Tokens a second of an entry over another's, round by round."""
    speeds = {(r.method, r.entry, r.settings, r.round): r.tokens_per_second for r in runs}
    found = []
    for number in sorted({run.round for run in runs}):
        mine = speeds.get((one.method, one.entry, one.settings, number))
        theirs = speeds.get((one.method, *other, number))
        if mine and theirs:
            found.append(mine / theirs)
    return found


def table(runs: Sequence[Run], options: argparse.Namespace) -> str:
    """Medians with the spread of the rounds, in Markdown."""
    baseline = ("transformers.Trainer", "defaults")
    batch = f"micro-batch {options.micro_batch} × accumulation {options.accumulation}"
    shape = f"{options.rows} rows, {batch}, {options.rounds} rounds"
    versions = ", ".join(f"{name} {found}" for name, found in environment().items())
    lines = [
        f"{_device_name(options.device)}; {versions}. {shape}; ratio: to {', '.join(baseline)}, same round.",
        "",
        "| method | trainer | settings | tokens/s, median (lowest to highest) | ratio | peak | reserved |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    seen = {(run.method, run.entry, run.settings): run for run in runs}
    for key, run in sorted(seen.items(), key=lambda item: item[0][0]):
        same = [one for one in runs if (one.method, one.entry, one.settings) == key]
        speeds = [one.tokens_per_second for one in same if one.tokens_per_second is not None]
        if not speeds:
            lines.append(f"| {' | '.join(key)} | {same[-1].error.replace('|', ' ')} | | | |")
            continue
        ratio = ratios(runs, run, baseline)
        peaks = [one.peak_bytes for one in same if one.peak_bytes is not None]
        held = [one.reserved_bytes for one in same if one.reserved_bytes is not None]
        compared = f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})" if ratio else ""
        lines.append(
            f"| {' | '.join(key)} | {statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) "
            f"| {compared} | {size(max(peaks)) if peaks else ''} | {size(max(held)) if held else ''} |"
        )
    return "\n".join(lines)


def _device_name(device: str) -> str:
    if device == "cpu":
        return "CPU, a small model: that it runs, and no more"
    import torch

    return str(torch.cuda.get_device_name())


if __name__ == "__main__":
    with stopped_once(ends_process=True):
        main()
