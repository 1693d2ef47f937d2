"""What stops a run before it starts, with real files, and all of it at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.errors import EnvironmentLacksError, InputError
from advisor.hardware import Gpu, Host, what_if
from advisor.launch import preflight as module
from advisor.launch.device_check import DeviceCheck, check_device
from advisor.launch.model import find_files, locate_model
from advisor.launch.preflight import Preflight, preflight, raise_problems
from advisor.launch.storage import disk_need
from advisor.plan import Plan, plan_from_fields
from advisor.profiles import default_plan, find_model, load_gpu, load_model
from advisor.training.job import Job
from advisor.units import MIB

ROWS = '{"prompt": "What is LoRA?", "completion": "Two small matrices beside a large one."}\n'

MINI = load_model("phi-3-mini-4k")
MakeJob = Callable[..., Job]


@pytest.fixture(autouse=True)
def working_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is looked at by a test of its own: torch takes seconds."""
    monkeypatch.setattr(module, "check_device", lambda *_: DeviceCheck())


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache and a hub whose name does not resolve, whatever this machine is connected to."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def look(job: Job, gpu: Gpu, **options: int) -> Preflight:
    return preflight(job, gpu, load_model(job.plan.model).architecture, **options)


def test_nothing_is_wrong_with_a_local_model_and_good_data(make_job: MakeJob, cpu: Gpu) -> None:
    found = look(make_job(), cpu)
    assert found.problems == ()
    assert found.exit_code == 0
    assert found.rows == 20
    assert found.model is not None
    assert found.model.download_bytes == 0
    assert found.model.weight_bytes == found.model.largest_file_bytes


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"method": "qlora", "quantization": {}, "upcast_frozen": True},
            "would compute in fp32, not in bfloat16. ",
        ),
        ({"method": "lora", "dtype": "float16", "autocast": "float16"}, "no gradient scaling on the CPU. accelerate"),
    ],
)
def test_a_plan_that_would_be_refused_in_the_training_is_refused_before_a_download(
    fields: dict[str, Any], said: str, make_job: MakeJob, cpu: Gpu
) -> None:
    plan = plan_from_fields({"autocast": "none", "lora": {"rank": 8}, **fields, "model": make_job().plan.model})
    (problem,) = look(make_job(plan=plan), cpu).problems
    assert said in problem.what
    assert problem.exit_code == 2


def test_all_problems_are_in_one_list(make_job: MakeJob, cpu: Gpu, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    plan = replace(default_plan("lora", model=make_job().plan.model), attention="flash_attention_2")
    job = make_job(plan=plan, model_path=str(tmp_path), report_to=("no-such-place",))
    found = look(job, cpu)
    said = "\n".join(problem.what for problem in found.problems)
    for part in ("has no safetensors", "train.jsonl, line 2", "run is not free", "flash-attn 2", "no-such-place"):
        assert part in said
    assert len(found.problems) == 5
    assert found.exit_code == 2
    with pytest.raises(InputError, match="5 problems") as error:
        raise_problems(found)
    for number in range(1, 6):
        assert f"{number}. " in error.value.why


def test_a_run_in_the_folder_is_resumed_or_left_alone(make_job: MakeJob, cpu: Gpu, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("job.json", "log.txt"):
        (tmp_path / "run" / name).write_text("{}")
    found = look(make_job(), cpu)
    assert "holds a run" in found.problems[0].what
    assert "--resume" in found.problems[0].hint
    assert look(make_job(resume=True), cpu).problems == ()


def test_a_folder_that_cannot_be_written_to_is_said(
    make_job: MakeJob, cpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be written to" in look(make_job(), cpu).problems[0].what


@pytest.mark.usefixtures("no_hub")
def test_no_network_is_said_before_anything_is_downloaded(make_job: MakeJob, cpu: Gpu) -> None:
    found = look(make_job(model_path="microsoft/Phi-3-mini-4k-instruct"), cpu)
    assert len(found.problems) == 1
    assert "neither here nor to be reached" in found.problems[0].what
    assert found.exit_code == 3
    with pytest.raises(EnvironmentLacksError):
        raise_problems(found)


@pytest.mark.usefixtures("no_hub")
def test_a_model_in_the_cache_needs_no_network(small_model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--someone--small"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(small_model, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    files = find_files("someone/small")
    assert files.download_bytes == 0
    assert files.weight_bytes == (small_model / "model.safetensors").stat().st_size


def test_pickled_weights_are_refused(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(small_model, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="no safetensors") as error:
        find_files(str(folder))
    assert "run code" in error.value.why


def test_a_model_without_its_tokenizer_is_refused(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(small_model, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        find_files(str(folder))


def test_a_model_that_cannot_be_launched_is_refused_with_its_note() -> None:
    with pytest.raises(InputError) as error:
        locate_model(find_model("phi-3-small-8k"))
    assert "Triton" in error.value.why


def test_a_description_without_weights_is_refused(small_model: Path, tmp_path: Path) -> None:
    shutil.copy(small_model / "config.json", tmp_path / "architecture.json")
    with pytest.raises(InputError, match="weights are not beside it"):
        locate_model(find_model(str(tmp_path / "architecture.json")))
    assert locate_model(find_model(str(small_model / "config.json"))) == str(small_model)


def test_the_disk_is_computed_from_the_plan(make_job: MakeJob, cpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job()
    need = disk_need(job.plan, load_model(job.plan.model).architecture, keep=job.keep_checkpoints)
    machine = Host(ram_bytes=None, ram_available_bytes=None, disk_free_bytes=need.total_bytes, cpu_count=1)
    monkeypatch.setattr(module, "host", lambda _=".": machine)
    assert look(job, cpu).problems == ()
    tight = replace(machine, disk_free_bytes=need.total_bytes - 1)
    monkeypatch.setattr(module, "host", lambda _=".": tight)
    found = look(job, cpu)
    assert "3 checkpoints" in found.problems[0].what
    assert found.exit_code == 3


@pytest.mark.parametrize(
    ("plan", "checkpoint", "final"),
    [
        (default_plan("lora", model="phi-3-mini-4k"), 25_165_824 * 12, 25_165_824 * 4),
        # Where float16 cannot hold a weight, all are saved in fp32.
        (default_plan("full", model="phi-3-mini-4k", dtype="float16"), 3_821_079_552 * 12, 3_821_079_552 * 4),
        (
            replace(default_plan("full", model="phi-3-mini-4k"), dtype="float32", autocast="bfloat16"),
            3_821_079_552 * 12,
            3_821_079_552 * 2,
        ),
        (
            replace(default_plan("full", model="phi-3-mini-4k"), optimizer="adamw_bnb_8bit"),
            # 65 norms of 3,072 elements keep fp32 states; the others have two scales to 256 elements.
            3_821_079_552 * 4 + 65 * 3072 * 6 + (3_821_079_552 - 65 * 3072) // 256 * 8,
            3_821_079_552 * 2,
        ),
    ],
)
def test_a_checkpoint_is_what_is_trained_and_the_optimizer_s_states(plan: Plan, checkpoint: int, final: int) -> None:
    need = disk_need(plan, MINI.architecture, keep=2)
    assert (need.checkpoint_bytes, need.final_bytes, need.checkpoints) == (checkpoint, final, 3)


def test_bitsandbytes_is_asked_for_only_where_the_plan_needs_it(
    make_job: MakeJob, cpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = DeviceCheck(bitsandbytes_error="ImportError: no library for this CUDA")
    monkeypatch.setattr(module, "check_device", lambda *_: broken)
    assert look(make_job(), cpu).problems == ()
    plan = default_plan("qlora", model=make_job().plan.model)
    found = look(make_job(plan=plan), cpu)
    assert "no library for this CUDA" in found.problems[0].what
    assert found.exit_code == 3


def test_bfloat16_on_a_gpu_that_only_emulates_it_is_refused(make_job: MakeJob) -> None:
    found = look(make_job(), what_if(load_gpu("t4")))
    assert any("only emulates" in problem.what for problem in found.problems)


def test_a_package_to_report_to_has_to_be_there(make_job: MakeJob, cpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    found = look(make_job(report_to=("tensorboard",)), cpu)
    assert "pip install tensorboard" in found.problems[0].hint
    assert found.exit_code == 3


@pytest.mark.parametrize("device", ["cpu", "cuda:7"])
def test_the_device_is_looked_at_in_a_process_of_its_own(device: str) -> None:
    found = check_device(device, {})
    if device == "cpu":
        assert found == DeviceCheck(cuda=found.cuda)
    else:
        assert found.torch_error


def test_a_cut_off_download_and_a_pointer_to_one_are_no_weights(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(small_model, folder)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1000)
    with pytest.raises(InputError, match="not a whole safetensors file") as error:
        find_files(str(folder))
    assert "fetch it again" in error.value.hint
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(InputError, match="Git LFS's pointer") as error:
        find_files(str(folder))
    assert "git lfs pull" in error.value.hint


def test_what_only_the_tokenizer_sees_is_in_the_same_list(make_job: MakeJob, cpu: Gpu, tmp_path: Path) -> None:
    """Rows longer than the context, beside a folder that is not free; the data is read once."""
    from advisor.launch.resolve import Settings, resolve_plan

    job = make_job()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    (tmp_path / "train.jsonl").write_text(ROWS + ROWS.replace("Two", "Two " * 5000))
    with pytest.raises(InputError, match="2 problems") as error:
        resolve_plan(job.plan, cpu, Settings(data=job.data, out=job.out), lambda _: None)
    assert "line 2: 5,0" in error.value.why
    assert "the model's context is 4,096" in error.value.why
    assert "is not free" in error.value.why


def test_a_broken_tokenizer_does_not_hide_what_is_wrong_with_the_data(
    make_job: MakeJob, cpu: Gpu, small_model: Path, tmp_path: Path
) -> None:
    from advisor.launch.resolve import Settings, resolve_plan

    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    (folder / "tokenizer.json").write_text("{}")
    job = make_job(plan=replace(make_job().plan, model=str(folder)))
    (tmp_path / "train.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="2 problems") as error:
        resolve_plan(job.plan, cpu, Settings(data=job.data, out=job.out), lambda _: None)
    assert "No tokenizer can be loaded" in error.value.why
    assert "line 1: not JSON" in error.value.why


def test_small_files_are_counted() -> None:
    assert disk_need(default_plan("lora", model="m"), MINI.architecture, keep=2).total_bytes > 64 * MIB
