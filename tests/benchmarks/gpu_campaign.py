"""Measures a fixed grid of plans on the GPU that is here, and says how far the estimate and the trace are from it.

    python tests/benchmarks/gpu_campaign.py [--minutes 25] [--snapshots profiles/measurements] [--out FILE]
    python tests/benchmarks/gpu_campaign.py --report profiles/measurements/h100-2026-12-01.json
    python tests/benchmarks/gpu_campaign.py --list [--gpu t4]
    python tests/benchmarks/gpu_campaign.py --device cpu --only 12

Weights are random: nothing is downloaded. Every result is written as it comes; run it again to go on. The order is the
one that covers most pairs of settings a second. What the estimate says cannot fit the card is skipped and listed.

After the grid come runs under the total of smaller cards (8 to 80 GiB), for the plans of which the whole card cannot
say whether they would fit there. With --snapshots DIR the allocator's history of one plan a method is kept, in both of
its modes; tests/memory/test_allocator_snapshots.py replays every one that is in profiles/measurements.

--device cpu measures the same plans with a small model, to see that all of this runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from campaign.accuracy import CAPS_GIB, report, settled, truth_at, whole_card
from campaign.grid import Case, case_of, grid
from campaign.order import Turn, covered, for_gpu, turns
from campaign.predict import predict_all
from campaign.records import (
    Campaign,
    Record,
    default_path,
    gpu_of,
    new_campaign,
    read_campaign,
    versions_differ,
    write_campaign,
)
from campaign.run import Setup, Workers
from campaign.snapshots import SUFFIX

from advisor.errors import AdvisorError, InputError
from advisor.fit import check_fit
from advisor.hardware import Gpu, choose, detect, read_cpu, what_if
from advisor.memory.regime import training_regime
from advisor.profiles import load_gpu
from advisor.stopping import stopped_by, stopped_once
from advisor.units import GIB, gib, size

SNAPSHOT_CASES = ("full mini-4k 2×1024", "lora mini-4k 2×1024", "qlora mini-4k 2×1024")

FIRST_MINUTES = 15


def main() -> int:
    """The command."""
    options = _options()
    with stopped_once(ends_process=True):
        try:
            return _run(options)
        except AdvisorError as error:
            print(f"{error.what}\n{error.why}\n{error.hint}".strip(), file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("\nStopped. What was measured is kept: run it again to go on.", file=sys.stderr)
            return 128 + (stopped_by() or 2)


def _run(options: argparse.Namespace) -> int:
    if options.worker:
        from campaign.worker import main as work

        return work()
    if options.report:
        _report_on(read_campaign(options.report), options)
        return 0
    gpu = what_if(load_gpu(options.gpu)) if options.gpu else _gpu_here(options.device)
    with tempfile.TemporaryDirectory() as folder:
        cases = grid() if gpu.backend != "cpu" else small_cases(grid(), Path(folder))
        ordered, skipped = turns(cases, gpu)
        if options.list:
            _list(ordered)
        for one in skipped:
            print(f"skipped  {one.name}: {one.reason}")
        if options.list or options.gpu:
            return 0
        out = options.out or (_cpu_path() if gpu.backend == "cpu" else default_path(gpu))
        campaign = _begin(out, gpu)
        campaign.skipped = skipped
        workers = Workers(Setup(gpu=gpu, expandable=campaign.gpu["expandable_segments"]))
        try:
            _measure(campaign, ordered[: options.only], workers, out, options)
        finally:
            workers.end()
        _print_report(campaign, options, {turn.case.name: turn.case for turn in ordered})
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=60, help="measure no longer than this, and report")
    parser.add_argument("--out", type=Path, help="the file; by default profiles/measurements/GPU-DATE.json")
    parser.add_argument("--snapshots", type=Path, metavar="DIR", help="keep the allocator's history of three plans")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--only", type=int, metavar="N", help="no more than the first N plans")
    parser.add_argument("--report", type=Path, metavar="FILE", help="measure nothing; compare with that file")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="traces side by side")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the comparison there as well")
    parser.add_argument("--no-report", action="store_true", help="measure, and leave the comparison for --report")
    parser.add_argument("--list", action="store_true", help="the order, and nothing else")
    parser.add_argument("--gpu", metavar="NAME", help="with --list: the order on that GPU")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _gpu_here(device: str) -> Gpu:
    if device == "cpu":
        return replace(read_cpu(), free_bytes=None)
    index = device.partition(":")[2]
    return choose(detect().gpus, int(index) if index else None)


def small_cases(cases: Sequence[Case], folder: Path) -> list[Case]:
    """The same plans of small models, as a processor runs them: no scaling of fp16, no kernels of a GPU."""
    sys.path.append(str(Path(__file__).parents[1]))
    from small_model import small_config

    shapes = {"mini": small_config(), "medium": small_config(kv_heads=2, hidden=96), "phi-4": small_config(kv_heads=2)}
    shapes["phi-4"]["tie_word_embeddings"] = True
    tokens = {"vocab_size": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    paths = {}
    for name, config in shapes.items():
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps({**config, **tokens}))
    small = []
    for case in cases:
        kind = next(name for name in paths if f"phi-3-{name}" in case.fields["model"] or name in case.fields["model"])
        fields = {**case.fields, "model": str(paths[kind]), "seq_len": max(16, case.fields["seq_len"] // 32)}
        fields["micro_batch"] = min(4, fields["micro_batch"])
        if "float16" in (fields.get("dtype"), fields.get("autocast")):
            half = {"dtype": "bfloat16"} if fields.get("dtype") == "float16" else {}
            fields |= {**half, "autocast": "bfloat16"}
        small.append(replace(case, fields=fields, sdpa=None))
    return small


def _cpu_path() -> Path:
    return Path(tempfile.gettempdir()) / "phi3-advise-campaign-cpu.json"


def _list(ordered: Sequence[Turn]) -> None:
    spent = 0.0
    for number, turn in enumerate(ordered, 1):
        spent += turn.seconds
        print(f"{number:3d}  {spent / 60:5.1f} min  {gib(turn.memory.allocated_bytes):>10}  {turn.case.name}")
    share = covered(ordered, 60 * FIRST_MINUTES)
    print(f"{len(ordered)} plans; the first {FIRST_MINUTES} minutes cover {share:.1%} of all pairs of settings")


def _begin(out: Path, gpu: Gpu) -> Campaign:
    """The file's campaign to go on with, or a new one."""
    if not out.exists():
        return new_campaign(gpu, expandable=training_regime().expandable)
    campaign = read_campaign(out)
    other = versions_differ(campaign)
    if other or campaign.gpu["name"] != gpu.name:
        what = f"other versions of {', '.join(other)}" if other else f"on {campaign.gpu['name']}"
        raise InputError(f"{out} was measured under {what}." if other else f"{out} was measured {what}.", hint="--out")
    return campaign


def _measure(
    campaign: Campaign, ordered: Sequence[Turn], workers: Workers, out: Path, options: argparse.Namespace
) -> None:
    """The grid, the snapshots, and the runs that decide what is open; until the time is up."""
    until = time.monotonic() + 60 * options.minutes
    done = campaign.done()
    command = " ".join(["python", "tests/benchmarks/gpu_campaign.py", *sys.argv[1:]])

    def keep(record: Record) -> None:
        campaign.put(record)
        write_campaign(campaign, out, command=command)
        print(f"{len(campaign.records):3d}  {_line(record)}", flush=True)

    if options.snapshots:
        _record_snapshots(ordered, workers, options.snapshots, until)
    # What failed before comes last.
    seen = {record.name for record in whole_card(campaign)}
    for turn in sorted(ordered, key=lambda turn: turn.case.name in seen):
        if (turn.case.name, None) not in done and time.monotonic() < until:
            keep(workers.measure(turn))
    if campaign.gpu["backend"] == "cpu":
        return
    for turn, cap_bytes in open_questions(campaign, ordered):
        if time.monotonic() > until:
            break
        keep(workers.measure(turn, cap_bytes=cap_bytes, context_bytes=campaign.context_bytes or 0))


def _record_snapshots(ordered: Sequence[Turn], workers: Workers, folder: Path, until: float) -> None:
    """One plan a method, with expandable segments and without."""
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {turn.case.name: turn for turn in ordered}
    for name in SNAPSHOT_CASES:
        for expandable in (True, False):
            mode = "expandable" if expandable else "default"
            path = folder / f"{name.split()[0]}-{mode}{SUFFIX}"
            if name not in by_name or path.exists() or time.monotonic() > until:
                continue
            record = workers.measure(by_name[name], snapshot=path, expandable=expandable)
            if record.measurement.outcome != "ran":
                # The next call records it again.
                path.unlink(missing_ok=True)
            print(f"snapshot {path.name}: {_line(record)}", flush=True)


def open_questions(campaign: Campaign, ordered: Sequence[Turn]) -> Iterator[tuple[Turn, int]]:
    """Plans and totals of which the whole card cannot say whether they would fit; first what the estimate says fits."""
    by_name = {turn.case.name: turn for turn in ordered}
    decided, asked = settled(campaign), []
    for cap_gib in CAPS_GIB:
        gpu = gpu_of(campaign, cap_gib * GIB)
        if gpu.total_bytes > campaign.gpu["total_bytes"]:
            continue
        for record in whole_card(campaign):
            turn = by_name.get(record.name)
            if turn and truth_at(record, cap_gib * GIB, campaign, decided) == "open":
                said = check_fit(turn.memory.reserved_bytes, gpu).fits
                asked.append((not said, turn.seconds, turn, cap_gib * GIB))
    for _, _, turn, cap_bytes in sorted(asked, key=lambda one: one[:2]):
        yield turn, cap_bytes


def _line(record: Record) -> str:
    """One result in a line."""
    found = record.measurement
    cap = f" at {gib(record.cap_bytes)}" if record.cap_bytes else ""
    sizes = {"allocated": found.allocated_bytes, "reserved": found.reserved_bytes}
    peaks = ", ".join(f"{what} {size(taken)}" for what, taken in sizes.items() if taken is not None)
    return f"{record.name}{cap}: {found.outcome}; {peaks or found.message}; {found.seconds or 0:.1f} s"


def _report_on(campaign: Campaign, options: argparse.Namespace) -> None:
    """Of a file; a processor measured small models under the names of large ones."""
    if campaign.gpu["backend"] != "cpu":
        _print_report(campaign, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        _print_report(campaign, options, {case.name: case for case in small_cases(grid(), Path(folder))})


def _print_report(campaign: Campaign, options: argparse.Namespace, cases: dict[str, Case] | None = None) -> None:
    """Predicts what was measured, and compares."""
    if options.no_report:
        return
    other = versions_differ(campaign)
    if other:
        print(f"measured under other versions of {', '.join(other)} than the trace runs under here", file=sys.stderr)
    gpu = gpu_of(campaign)
    names = [record.name for record in whole_card(campaign)]
    measured = [(cases or {}).get(name) or for_gpu(case_of(name), gpu) for name in names]
    text = report(campaign, predict_all(measured, gpu, workers=options.workers))
    print(f"\n{text}")
    if options.write:
        options.write.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
