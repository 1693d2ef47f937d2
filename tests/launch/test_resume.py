"""What a run that goes on may have other than before, what is refused, and what a person is told first."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.errors import EnvironmentLacksError, InputError
from advisor.hardware import Gpu
from advisor.launch import preflight as module
from advisor.launch.device_check import DeviceCheck
from advisor.launch.folder import write_run
from advisor.launch.resolve import Launch
from advisor.launch.resume import Said, go_on_command, resolve_resumed
from advisor.profiles import load_plan
from advisor.training.checkpoints import write_checkpoint
from advisor.training.job import Job
from advisor.training.result import Outcome, Result, write_result

MakeJob = Callable[..., Job]
Run = Callable[..., Path]


@pytest.fixture(autouse=True)
def working_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is looked at by a test of its own: torch takes seconds."""
    monkeypatch.setattr(module, "check_device", lambda *_: DeviceCheck())


@pytest.fixture
def run(make_job: MakeJob, cpu: Gpu) -> Run:
    """A run folder as a training leaves it, with checkpoints at some steps."""

    def make(*, outcome: Outcome = "finished", steps: tuple[int, ...] = (20, 40), **training: Any) -> Path:
        job = make_job()
        plan = replace(job.plan, training=replace(job.plan.training, **{"max_steps": 40, **training}))
        write_run(replace(job, plan=plan), cpu, DeviceCheck())
        folder = Path(job.out)
        for step in steps:
            write_checkpoint(folder / "checkpoints", step, filled_with(0))
        write_result(folder, Result(outcome=outcome, step=max(steps, default=0), steps=40))
        return folder

    return make


def filled_with(size_bytes: int) -> Callable[[Path], None]:
    def fill(aside: Path) -> None:
        (aside / "weights").write_bytes(bytes(size_bytes))

    return fill


def resolve(folder: Path, gpu: Gpu, **said: Any) -> Launch:
    return resolve_resumed(str(folder), gpu, lambda _: gpu, Said(**said))


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(run: Run, cpu: Gpu) -> None:
    launch = resolve(run(), cpu, length={"max_steps": 60})
    assert (launch.job.resume, launch.job.plan.training.max_steps) == (True, 60)
    assert launch.notes == ("The run goes on from its checkpoint of step 40.",)


def test_more_epochs_end_a_run_that_had_a_number_of_steps(run: Run, cpu: Gpu) -> None:
    training = resolve(run(), cpu, length={"epochs": 3.0}).job.plan.training
    assert (training.epochs, training.max_steps) == (3.0, None)


def test_more_epochs_lengthen_a_run_of_epochs(run: Run, cpu: Gpu) -> None:
    assert resolve(run(max_steps=None, epochs=2.0), cpu, length={"epochs": 3.0}).job.plan.training.epochs == 3.0


@pytest.mark.parametrize(
    ("training", "length", "said"),
    [
        ({}, {}, "has finished, at step 40 of 40"),
        ({}, {"max_steps": 40}, "has finished"),
        ({}, {"max_steps": 30}, "has taken 40 steps already"),
        ({"max_steps": None, "epochs": 2.0}, {}, "has finished"),
        ({"max_steps": None, "epochs": 2.0}, {"epochs": 2.0}, "has finished"),
        ({"max_steps": None, "epochs": 2.0}, {"epochs": 1.0}, "has finished"),
        ({"max_steps": None, "epochs": 2.0}, {"max_steps": 40}, "has taken 40 steps already"),
    ],
)
def test_a_finished_run_that_would_not_be_longer_says_how_it_would(
    training: dict[str, Any], length: dict[str, Any], said: str, run: Run, cpu: Gpu
) -> None:
    folder = run(**training)
    with pytest.raises(InputError, match=said) as caught:
        resolve(folder, cpu, length=length)
    assert "--max-steps" in caught.value.hint


def test_a_finished_run_without_its_checkpoints_does_not_begin_again_in_its_folder(run: Run, cpu: Gpu) -> None:
    with pytest.raises(InputError, match="its checkpoints are gone"):
        resolve(run(steps=()), cpu, length={"max_steps": 60})


def test_an_interrupted_run_goes_on_to_its_own_end(run: Run, cpu: Gpu) -> None:
    assert resolve(run(outcome="interrupted", steps=(7,)), cpu).job.plan.training.max_steps == 40
    # Stopped in its last evaluation: the steps are all there, the artefacts are not.
    assert resolve(run(outcome="interrupted", steps=(40,)), cpu).job.resume


def test_no_run_goes_back(run: Run, cpu: Gpu) -> None:
    with pytest.raises(InputError, match="has taken 20 steps already, and is to have 10"):
        resolve(run(outcome="interrupted", steps=(20,)), cpu, length={"max_steps": 10})


def test_a_length_that_is_written_into_the_plan_file_is_taken(run: Run, cpu: Gpu) -> None:
    folder = run()
    path = folder / "plan.toml"
    path.write_text(path.read_text().replace("max_steps = 40", "max_steps = 80"))
    assert resolve(folder, cpu).job.plan.training.max_steps == 80
    assert resolve(folder, cpu, length={"max_steps": 90}).job.plan.training.max_steps == 90


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("micro_batch = 1", "micro_batch = 2", "micro_batch"),
        ("seed = 42", "seed = 43", "training.seed"),
        ("rank = 16", "rank = 8", "lora.rank"),
    ],
)
def test_a_plan_file_that_was_changed_is_not_passed_over(
    before: str, after: str, named: str, run: Run, cpu: Gpu
) -> None:
    folder = run(outcome="interrupted", steps=(20,))
    path = folder / "plan.toml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(InputError, match=rf"was changed since the run began: {named}\."):
        resolve(folder, cpu)
    path.unlink()
    assert resolve(folder, cpu).job.resume


def test_a_damaged_checkpoint_is_passed_over_and_named(run: Run, cpu: Gpu) -> None:
    folder = run(outcome="interrupted", steps=(7, 20))
    manifest = folder / "checkpoints" / "checkpoint-20" / "manifest.json"
    values = json.loads(manifest.read_text())
    (manifest.parent / "weights").write_bytes(b"")
    manifest.write_text(json.dumps({**values, "checksums": {"weights": 1}}))
    launch = resolve(folder, cpu)
    assert launch.job.resume
    assert launch.notes == (
        "The run goes on from its checkpoint of step 7.",
        "Not whole, and passed over: checkpoint-20.",
    )


def test_checkpoints_that_are_not_whole_are_named(run: Run, cpu: Gpu) -> None:
    folder = run(outcome="failed", steps=(7, 20, 100))
    (folder / "checkpoints" / "checkpoint-100" / "manifest.json").write_text('{"step"')
    assert resolve(folder, cpu, length={"max_steps": 200}).notes == (
        "The run goes on from its checkpoint of step 20.",
        "Not whole, and passed over: checkpoint-100.",
    )
    for step in (7, 20):
        (folder / "checkpoints" / f"checkpoint-{step}" / "weights").unlink()
    launch = resolve(folder, cpu)
    assert not launch.job.resume
    assert "starts again from the beginning" in launch.notes[0]
    assert launch.notes[1] == "Not whole, and passed over: checkpoint-7, checkpoint-20, checkpoint-100."


def test_other_versions_and_another_device_are_said_and_kept(run: Run, cpu: Gpu) -> None:
    folder = run(outcome="interrupted", steps=(20,))
    path = folder / "environment.json"
    values = json.loads(path.read_text())
    newest = values["packages"]["torch"]
    values["packages"] |= {"torch": "2.3.0", "xformers": "0.1"}
    values["gpu"]["name"] = "NVIDIA T4"
    path.write_text(json.dumps(values))
    launch = resolve(folder, cpu)
    changed = f"torch 2.3.0 → {newest}, xformers 0.1 → none, NVIDIA T4 → a processor"
    assert launch.notes[1].endswith(f"losses may differ in their last digits: {changed}.")
    for _ in range(2):
        write_run(launch.job, launch.gpu, launch.preflight.check)
    kept = json.loads(path.read_text())
    assert kept["packages"]["torch"] == newest
    assert [one["packages"]["torch"] for one in kept["before"]] == ["2.3.0"]


def test_an_environment_that_cannot_be_read_stops_nothing(run: Run, cpu: Gpu) -> None:
    folder = run(outcome="interrupted", steps=(20,))
    (folder / "environment.json").write_text("[]")
    assert len(resolve(folder, cpu).notes) == 1


def test_where_it_reports_to_may_be_said_again_and_is_looked_at(run: Run, cpu: Gpu) -> None:
    folder = run(outcome="interrupted", steps=(20,))
    with pytest.raises(InputError) as caught:
        resolve(folder, cpu, report_to=("nowhere",))
    assert "'nowhere'" in caught.value.why
    launch = resolve(folder, cpu, skip_bad_rows=True)
    assert (launch.job.skip_bad_rows, launch.job.report_to) == (True, ())


def test_checkpoints_that_are_there_need_no_room_again(run: Run, cpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(outcome="disk_full", steps=(7,))
    need = resolve(folder, cpu).preflight.disk
    assert need is not None
    for step in (20, 30):
        write_checkpoint(folder / "checkpoints", step, filled_with(need.checkpoint_bytes))
    room = need.checkpoint_bytes + need.final_bytes + module.SMALL_FILES_BYTES
    host = module.host()
    monkeypatch.setattr(module, "host", lambda _=".": replace(host, disk_free_bytes=room))
    assert resolve(folder, cpu).job.resume
    monkeypatch.setattr(module, "host", lambda _=".": replace(host, disk_free_bytes=room - 1))
    with pytest.raises(EnvironmentLacksError) as caught:
        resolve(folder, cpu)
    assert "The disk of" in caught.value.why


def test_the_plan_file_of_a_longer_run_is_that_run_s(run: Run, cpu: Gpu) -> None:
    folder = run()
    launch = resolve(folder, cpu, length={"max_steps": 60})
    write_run(launch.job, launch.gpu, launch.preflight.check)
    assert load_plan(str(folder / "plan.toml")) == launch.job.plan


def test_a_run_that_is_being_trained_is_left_alone(run: Run, cpu: Gpu) -> None:
    folder = run(outcome="interrupted")
    sleeping = [sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"]
    with subprocess.Popen([*sleeping, "advisor.training.run"], stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        trainer.stdout.readline()
        (folder / "trainer.pid").write_text(f"{trainer.pid}\n")
        with pytest.raises(InputError, match=f"is being trained now, by process {trainer.pid}"):
            resolve(folder, cpu)
        trainer.kill()
    assert resolve(folder, cpu).job.resume
    with subprocess.Popen(sleeping, stdout=subprocess.PIPE) as other:  # which has the number of a trainer that ended
        assert other.stdout is not None
        other.stdout.readline()
        (folder / "trainer.pid").write_text(f"{other.pid}\n")
        assert resolve(folder, cpu).job.resume
        other.kill()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"length": {"max_steps": 60}}, ["--max-steps", "60"]),
        ({"length": {"epochs": 2.5}}, ["--epochs", "2.5"]),
        ({"length": {"max_steps": 60}, "report_to": ("wandb",)}, ["--max-steps", "60", "--report-to", "wandb"]),
        ({"length": {"max_steps": 60}, "skip_bad_rows": True}, ["--max-steps", "60", "--skip-bad-rows"]),
    ],
)
def test_the_command_that_goes_on_says_what_was_said_anew(
    said: dict[str, Any], words: list[str], run: Run, cpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advisor.launch.preflight._package_problems", lambda _: [])
    folder = run()
    command = go_on_command(resolve(folder, cpu, **said).job)
    begin = ["phi3-advise", "train", "--resume", "--out", str(folder), "--device", "cpu"]
    assert shlex.split(command) == [*begin, *words]


def test_a_plan_that_was_edited_needs_no_option_to_go_on(run: Run, cpu: Gpu) -> None:
    folder = run()
    plan = folder / "plan.toml"
    plan.write_text(plan.read_text().replace("max_steps = 40", "max_steps = 60"))
    job = resolve(folder, cpu).job
    assert job.plan.training.max_steps == 60
    assert go_on_command(job).endswith(f"--out {folder} --device cpu")
