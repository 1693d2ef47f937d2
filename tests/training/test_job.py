from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from advisor.errors import InputError
from advisor.plan import Hyperparameters
from advisor.profiles import default_plan
from advisor.training.job import Job, read_job, write_job


def make_job(out: Path) -> Job:
    plan = replace(default_plan("qlora", model="phi-3-mini-4k"), training=Hyperparameters(max_steps=3, seed=0))
    return Job(plan=plan, model_path="some/model", data="訓練.jsonl", out=str(out), report_to=("tensorboard",))


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    write_job(job, str(tmp_path / "job.json"))
    assert read_job(str(tmp_path / "job.json")) == job
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


@pytest.mark.parametrize("change", [{"schema": 2}, {"unknown": 1}, {"plan": None}])
def test_a_file_that_is_no_job_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "job.json"
    write_job(make_job(tmp_path), str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError):
        read_job(str(path))
