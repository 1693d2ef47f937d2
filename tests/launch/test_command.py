"""What is started: one process, on the device that was judged, with nothing secret written down."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from advisor.hardware import Gpu, what_if
from advisor.launch.command import accelerate_config, torch_device, training_command
from advisor.launch.device_check import DeviceCheck
from advisor.launch.folder import default_folder, occupied_by, read_run, set_attempt_aside, write_run
from advisor.plan import plan_from_fields
from advisor.profiles import load_gpu, load_plan
from advisor.training.job import Job

MakeJob = Callable[..., Job]
A100 = replace(what_if(load_gpu("a100-80gb")), detected=True, index=1, uuid="GPU-1234")


def test_accelerate_reads_the_configuration(make_job: MakeJob, cpu: Gpu, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = tmp_path / "accelerate.yaml"
    path.write_text(accelerate_config(make_job().plan, cpu))
    config = load_config_from_file(str(path))
    assert (config.num_processes, config.use_cpu, config.mixed_precision) == (1, True, "no")
    path.write_text(accelerate_config(replace(make_job().plan, autocast="bfloat16"), A100))
    config = load_config_from_file(str(path))
    assert (config.use_cpu, config.mixed_precision) == (False, "bf16")


def test_the_command_line_is_complete(make_job: MakeJob, cpu: Gpu) -> None:
    job = make_job()
    words = training_command(job, cpu).words
    at = words.index("launch")
    assert words[at + 1 :] == (
        *("--config_file", f"{job.out}/accelerate.yaml", "-m", "advisor.training.run", f"{job.out}/job.json"),
    )


def test_the_training_sees_the_one_gpu_that_was_judged(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    command = training_command(make_job(), A100)
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "GPU-1234"
    assert "CUDA_VISIBLE_DEVICES=GPU-1234 " in command.text
    assert "PYTHONSAFEPATH=1 " in command.text
    if sys.platform != "win32":
        assert command.environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3,5")
    amd = replace(A100, backend="rocm", uuid=None)
    assert training_command(make_job(), amd).environment["HIP_VISIBLE_DEVICES"] == "5"
    assert torch_device(amd) == "cuda"


def test_a_processor_gets_its_cores_unless_somebody_said_how_many(
    make_job: MakeJob, cpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in training_command(make_job(), cpu).environment
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert int(training_command(make_job(), cpu).environment["OMP_NUM_THREADS"]) >= 1


def test_the_run_folder_has_everything_and_no_secret(
    make_job: MakeJob, cpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_very_secret")
    job = make_job()
    write_run(job, cpu, DeviceCheck(cuda="13.0"))
    folder = Path(job.out)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("accelerate.yaml", "environment.json", "job.json", "plan.toml")
    ]
    for path in folder.iterdir():
        assert "very_secret" not in path.read_text()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["cuda"] == "13.0"
    assert {"torch", "transformers", "peft", "phi3-advise"} <= set(environment["packages"])
    assert load_plan(str(folder / "plan.toml")) == job.plan
    assert plan_from_fields(json.loads((folder / "job.json").read_text())["plan"]) == job.plan


def test_a_folder_that_was_moved_is_still_its_run(make_job: MakeJob, cpu: Gpu, tmp_path: Path) -> None:
    job = make_job()
    write_run(job, cpu, DeviceCheck())
    moved = tmp_path / "elsewhere"
    Path(job.out).rename(moved)
    assert read_run(str(moved)) == replace(job, out=str(moved))


def test_what_a_dry_run_left_is_in_nobody_s_way(make_job: MakeJob, cpu: Gpu) -> None:
    job = make_job()
    write_run(job, cpu, DeviceCheck())
    assert occupied_by(job.out) is None
    (Path(job.out) / "log.txt").touch()
    assert occupied_by(job.out) == "it holds a run"
    for path in Path(job.out).iterdir():
        if path.name != "plan.toml":
            path.unlink()
    # Somebody's own plan, which writing a run would replace.
    assert occupied_by(job.out) == "it holds another file"


def test_an_attempt_is_set_aside_whole(make_job: MakeJob, cpu: Gpu) -> None:
    job = make_job()
    for number in (1, 2):
        write_run(job, cpu, DeviceCheck())
        (Path(job.out) / "checkpoints" / "checkpoint-5").mkdir(parents=True)
        assert set_attempt_aside(job.out) == f"{job.out}/attempt-{number}"
        assert (Path(job.out) / f"attempt-{number}" / "checkpoints" / "checkpoint-5").is_dir()
    assert sorted(path.name for path in Path(job.out).iterdir()) == ["attempt-1", "attempt-2"]


def test_default_folders_are_named_after_model_and_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    first = default_folder("Phi-3-mini (4k)", "lora")
    assert Path(first).parent == tmp_path / "runs"
    assert Path(first).name.startswith("phi-3-mini-4k-lora-2")
    Path(first).mkdir(parents=True)
    assert occupied_by(first) is None
    assert default_folder("Phi-3-mini (4k)", "lora") != first
