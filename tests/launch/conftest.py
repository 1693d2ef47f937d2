"""A machine with a processor only, and jobs on the small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from advisor.hardware import Gpu
from advisor.plan import LoraSettings, Plan
from advisor.training.job import Job
from advisor.units import GIB

ROWS = '{"prompt": "What is LoRA?", "completion": "Two small matrices beside a large one."}\n'


@pytest.fixture
def cpu() -> Gpu:
    return Gpu(
        name="a processor",
        backend="cpu",
        total_bytes=16 * GIB,
        driver_bytes=16 * GIB,
        free_bytes=12 * GIB,
        detected=True,
        bfloat16=True,
    )


@pytest.fixture
def make_job(tmp_path: Path, small_model: Path) -> Callable[..., Job]:
    data = tmp_path / "train.jsonl"
    data.write_text(ROWS * 20)

    def make(*, plan: Plan | None = None, **fields: object) -> Job:
        plan = plan or Plan(model=str(small_model), method="lora", lora=LoraSettings(), seq_len=64)
        values = {"model_path": str(small_model), "data": str(data), "out": str(tmp_path / "run"), "device": "cpu"}
        return Job(plan=plan, **{**values, **fields})

    return make
