"""Probes of random plans on the CPU, with random kills of parent and child among them.

    python tests/benchmarks/probe_soak.py --probes 200

Each probe has a parent process of its own, as `phi3-advise probe` is one. Nothing of either may be left behind, no
state file may be lost or half written, and what the parent says must be what happened. Exit code 1 where anything is
not so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from advisor.errors import PlanError
from advisor.plan import Plan, plan_from_fields, plan_to_fields
from advisor.probe.measurement import measurement_of
from advisor.probe.work import sweep

ROOT = Path(__file__).parents[2]
MODEL: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KILLS = ("none", "none", "none", "child", "parent")
"""Two of five probes are disturbed."""

TOO_LITTLE_BYTES = 2**16
"""No plan runs in it: the weights alone take more."""

LATEST_KILL_SECONDS = 15.0
GONE_SECONDS = 30.0
"""A child notices the end of its parent at once, unless an import keeps its threads waiting."""

PARENT = """
import json, sys
from dataclasses import replace
from advisor.hardware import Gpu
from advisor.plan import plan_from_fields
from advisor.probe.measure import Subject, measure
from advisor.probe.results import keep
from advisor.profiles import ModelSource
asked = json.loads(sys.argv[1])
model = ModelSource(name="small", label="small", config=asked["model"], origin="small", source="the soak")
gpu = Gpu(name="CPU", backend="cpu", total_bytes=2**33, driver_bytes=2**33, detected=True, bfloat16=True, unified=True)
subject = Subject(model=model, gpu=gpu, steps=2, cap_bytes=asked["cap_bytes"], timeout_seconds=600)
found = measure(plan_from_fields(asked["plan"]), subject)
keep(found)
print(json.dumps({"outcome": found.outcome, "message": found.message}))
"""

Kill = Literal["none", "child", "parent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One probe of the soak."""

    number: int
    plan: Plan
    cap_bytes: int | None
    kill: str
    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of it."""

    case: Case
    outcome: str
    """The parent's, or "parent killed"."""

    killed: bool
    """Whether the kill came before the end."""

    problem: str = ""


def random_plan(chance: random.Random) -> Plan:
    """A plan that this project's trainer accepts on the CPU."""
    while True:
        method = chance.choice(("full", "lora", "qlora"))
        fields: dict[str, Any] = {
            "model": "small",
            "method": method,
            "dtype": chance.choice(("bfloat16", "float32")),
            "autocast": chance.choice(("none", "bfloat16")),
            "optimizer": chance.choice(("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit")),
            "micro_batch": chance.randint(1, 4),
            "gradient_accumulation": chance.randint(1, 4),
            "seq_len": chance.choice((16, 64, 100, 256)),
            "gradient_checkpointing": chance.random() < 0.5,
            "attention": chance.choice(("eager", "sdpa")),
            "loss": chance.choice(("standard", "chunked")),
            "padding": chance.choice(("none", "longest")),
            "packing": chance.random() < 0.3,
            "optimizer_in_backward": method == "full" and chance.random() < 0.3,
        }
        if method != "full":
            fields["lora"] = {"rank": chance.choice((2, 8)), "dropout": chance.choice((0.0, 0.1))}
        if method == "qlora":
            fields |= {"quantization": {"double": chance.random() < 0.5}}
        try:
            return plan_from_fields(fields)
        except PlanError:
            continue


def cases(number: int, seed: int) -> Iterator[Case]:
    chance = random.Random(seed)
    for index in range(number):
        kill = chance.choice(KILLS)
        yield Case(
            number=index,
            plan=random_plan(chance),
            cap_bytes=TOO_LITTLE_BYTES if kill == "none" and chance.random() < 0.25 else None,
            kill=kill,
            delay=chance.uniform(0.0, LATEST_KILL_SECONDS),
        )


def run_case(case: Case, state: Path) -> Verdict:
    """One parent with its child, disturbed or not, and everything checked that can be checked while others run."""
    asked = {"plan": plan_to_fields(case.plan), "model": MODEL, "cap_bytes": case.cap_bytes}
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PHI3_ADVISE_STATE": str(state),
        "OMP_NUM_THREADS": "1",
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(asked)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    known: set[psutil.Process] = set()
    killed = _disturb(case, parent, known) if case.kill != "none" else False
    out, err = parent.communicate(timeout=900)
    problem = _left_behind(known)
    if case.kill == "parent" and killed:
        return Verdict(case=case, outcome="parent killed", killed=True, problem=problem)
    try:
        said = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        return Verdict(case=case, outcome="nothing", killed=killed, problem=f"the parent fell over: {err[-800:]}")
    problem = problem or _wrong(case, said, killed)
    return Verdict(case=case, outcome=said["outcome"], killed=killed, problem=problem)


def _disturb(case: Case, parent: subprocess.Popen[str], known: set[psutil.Process]) -> bool:
    """Kills the one that is to be killed after a while; whether it still ran."""
    until = time.monotonic() + case.delay
    while parent.poll() is None:
        known |= _children(parent.pid)
        # To kill a child, there has to be one.
        if time.monotonic() >= until and (known or case.kill == "parent"):
            break
        time.sleep(0.02)
    known |= _children(parent.pid)
    victims = [parent.pid] if case.kill == "parent" else [child.pid for child in known if child.is_running()]
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return False
    return bool(victims) and (case.kill == "child" or parent.poll() is None or parent.returncode == -signal.SIGKILL)


def _children(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return set()


def _left_behind(known: set[psutil.Process]) -> str:
    until = time.monotonic() + GONE_SECONDS
    while alive := [one.pid for one in known if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
        if time.monotonic() > until:
            return f"still running: {alive}"
        time.sleep(0.05)
    return ""


def _wrong(case: Case, said: dict[str, str], killed: bool) -> str:
    """What is wrong with a parent's verdict; empty where it is right."""
    if case.kill == "child" and killed:
        # It may have written its result before it died, and then the result stands.
        right = said["outcome"] == "ran" or (said["outcome"] == "failed" and "SIGKILL" in said["message"])
    elif case.cap_bytes is not None:
        right = said["outcome"] == "out_of_memory"
    else:
        right = said["outcome"] == "ran"
    return "" if right else f"{said['outcome']}: {said['message']}"


def check_state(state: Path, verdicts: list[Verdict]) -> list[str]:
    """What is wrong with the state folder once everything has ended."""
    files = sorted((state / "probes").glob("*"))
    asides = [path for path in files if path.suffix == ".part"]
    results = {path.name: path.read_text(encoding="utf-8") for path in files if path.suffix == ".json"}
    problems = [f"{name} cannot be read" for name, text in results.items() if measurement_of(json.loads(text)) is None]
    kept = {one.case.number for one in verdicts if one.outcome in ("ran", "out_of_memory")}
    parents_killed = sum(one.outcome == "parent killed" for one in verdicts)
    plans = {json.dumps(plan_to_fields(one.case.plan)) for one in verdicts if one.case.number in kept}
    if not len(plans) <= len(results) <= len(plans) + parents_killed:
        problems.append(f"{len(results)} results are kept of {len(plans)} plans")
    if len(asides) > parents_killed:
        problems.append(f"{len(asides)} files were left half written")
    sweep(str(state / "running"))
    left = [path.name for path in (state / "running").iterdir()]
    if left:
        problems.append(f"somebody still holds {left}")
    return problems


def soak(number: int, *, seed: int, workers: int, state: Path, show: bool = False) -> tuple[list[Verdict], list[str]]:
    """Runs so many probes; the verdicts, and what was wrong."""
    verdicts = []
    with ThreadPoolExecutor(workers) as pool:
        for verdict in pool.map(lambda case: run_case(case, state), cases(number, seed)):
            verdicts.append(verdict)
            if show:
                case = verdict.case
                disturbed = f"{case.kill} killed after {case.delay:.1f} s" if verdict.killed else "undisturbed"
                line = f"{case.number:4} {case.plan.method:6} {disturbed:28} {verdict.outcome:14} {verdict.problem}"
                print(line.rstrip(), flush=True)
    problems = [f"probe {one.case.number}: {one.problem}" for one in verdicts if one.problem]
    return verdicts, problems + check_state(state, verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        verdicts, problems = soak(options.probes, seed=options.seed, workers=options.workers, state=state, show=True)
    print()
    print(f"{len(verdicts)} probes in {time.monotonic() - began:.0f} s, seed {options.seed}")
    for outcome, count in sorted(Counter(one.outcome for one in verdicts).items()):
        print(f"  {outcome}: {count}")
    killed = Counter(one.case.kill for one in verdicts if one.killed)
    print(f"  killed: {killed['child']} children, {killed['parent']} parents")
    print(f"wrong: {len(problems)}")
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
