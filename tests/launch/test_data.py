"""What the launch reads of the data reaches the training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from training_runs import make_job, run_here, write_rows

from advisor.launch.resolve import Settings, resolve_plan
from advisor.plan import plan_from_fields
from advisor.training.data import leave_tokens


def test_the_training_takes_the_rows_that_the_launch_tokenised(small_model: Path, cpu: Any, tmp_path: Path) -> None:
    """Eight of forty rows are handed over, and the run has as many steps as they make."""
    job = make_job(tmp_path / "run", small_model, write_rows(tmp_path / "rows.jsonl", 40), training={"validation": 0.0})
    plan = replace(job.plan, model=str(small_model))
    data = resolve_plan(plan, cpu, Settings(data=job.data, out=job.out), lambda _: None).data
    assert data is not None
    assert data.tokenized is not None
    found = data.tokenized.rows
    (tmp_path / "run").mkdir(exist_ok=True)
    leave_tokens(job.out, replace(found, rows=found.rows[:8]), data.tokenized.key)
    assert run_here(job)["steps"] == 2
    assert not list((tmp_path / "run").glob(".*"))


def test_names_that_match_nothing_are_said_before_a_plan_is_trained(
    small_model: Path, cpu: Any, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "run", small_model, write_rows(tmp_path / "rows.jsonl", 8))
    lora = {"rank": 8, "target_modules": ["q_proj", "o_proj"]}
    plan = plan_from_fields({"method": "lora", "model": str(small_model), "seq_len": 64, "lora": lora})
    (said,) = resolve_plan(plan, cpu, Settings(data=job.data, out=job.out), lambda _: None).notes
    assert said.startswith("q_proj match nothing in phi3 (qkv_proj, o_proj, gate_up_proj, down_proj): ")
