"""Runs of the training on a small model and a few rows, in this process or in one of their own."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from advisor.plan import plan_from_fields
from advisor.training.job import Job, write_job
from advisor.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 8, "dropout": 0.1}},
    "qlora": {"method": "qlora", "lora": {"rank": 8, "dropout": 0.1}, "quantization": {}},
}


def write_rows(path: Path, rows: int) -> Path:
    """Questions of many lengths, and answers that can be learned from them."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            first, second = chance.randint(0, 9), chance.randint(0, 9)
            asked = f"How many GiB are {first} and {second}{' more' * chance.randint(0, 20)}?"
            turns = [("user", asked), ("assistant", f"They are {first + second} GiB.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def make_job(out: Path, model: Path, data: Path, method: str = "lora", **fields: Any) -> Job:
    """A job on the CPU; `job` among the fields are the job's own, `training` the hyperparameters."""
    job = fields.pop("job", {})
    training = {"learning_rate": 1e-3, "validation": 0.1, **fields.pop("training", {})}
    # fp32: bf16 products are slow on a processor without instructions for them.
    base = {"model": "small", "micro_batch": 2, "seq_len": 64, "gradient_accumulation": 2, "dtype": "float32"}
    plan = plan_from_fields({**base, **METHODS[method], **fields, "training": training})
    return Job(plan=plan, model_path=str(model), data=str(data), out=str(out), device="cpu", **job)


def run_here(job: Job) -> dict[str, Any]:
    """Run a job in this process; the facts that its result would have."""
    from advisor.training.interruption import Interruption
    from advisor.training.session import Session

    Path(job.out).mkdir(parents=True, exist_ok=True)
    session = Session(job, Interruption(lambda _: None))
    session.run()
    return session.facts()


def start(job: Job, program: Sequence[str] = ("-m", "advisor.training.run"), **options: Any) -> subprocess.Popen[str]:
    """A job in a process of its own, as accelerate starts it."""
    folder = Path(job.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    write_job(job, str(path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, str(path)],
        env=environment,
        **{
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
            **options,
        },
    )


def resumed(job: Job) -> Job:
    """The same job, to be gone on with."""
    return replace(job, resume=True)


def as_killed_at(job: Job, step: int, out: Path) -> Job:
    """The run folder as it was after a step, in another place, to be gone on with."""
    source = Path(job.out)
    (out / "checkpoints").mkdir(parents=True)
    shutil.copytree(source / "checkpoints" / f"checkpoint-{step}", out / "checkpoints" / f"checkpoint-{step}")
    shutil.copy(source / "metrics.jsonl", out)
    return replace(job, out=str(out), resume=True)


def read_result(out: str | Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((Path(out) / "result.json").read_text(encoding="utf-8"))
    return values


def losses(out: str | Path) -> list[tuple[int, float, float]]:
    """Step, loss and learning rate of every step of a run."""
    lines = read_metrics(Path(out) / "metrics.jsonl")
    return [(line["step"], line["loss"], line["learning_rate"]) for line in lines if "loss" in line]
