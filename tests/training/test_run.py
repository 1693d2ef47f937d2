"""The training as a process: it keeps the work whatever happens to it, and says how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_runs import losses, make_job, read_result, resumed, start, write_rows

from advisor.training.checkpoints import last_checkpoint
from advisor.training.job import Job

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and mounts of POSIX")

PATIENCE = 300.0
"""Seconds that a process may take; importing torch and transformers takes most of it on a busy machine."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 24)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it took too long"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def at_step(job: Job, step: int) -> Callable[[], bool]:
    return lambda: Path(job.out, "metrics.jsonl").exists() and len(losses(job.out)) >= step


def finish(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=PATIENCE)
    return process.returncode


def test_a_run_that_was_killed_goes_on_with_bitwise_the_same_losses(
    small_model: Path, rows: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"training": {"max_steps": 30, "validation": 0.0}, "job": {"save_steps": 3}}
    whole = make_job(tmp_path / "whole", small_model, rows, **fields)
    assert finish(start(whole)) == 0
    killed = make_job(tmp_path / "killed", small_model, rows, **fields)
    process = start(killed)
    # Early enough that a machine ten times as fast has not finished it.
    wait_until(at_step(killed, 4 + random.randrange(8)), process)
    time.sleep(random.random() * 0.1)
    process.kill()
    finish(process)
    assert not (tmp_path / "killed" / "result.json").exists()
    assert finish(start(resumed(killed))) == 0
    assert losses(killed.out) == losses(whole.out)
    assert read_result(killed.out)["outcome"] == "finished"


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "end of stdin"])
def test_asked_to_stop_it_saves_and_says_so(how: str, small_model: Path, rows: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, small_model, rows, training={"epochs": 9999.0})
    process = start(job, stdin=subprocess.PIPE)
    wait_until(at_step(job, 2), process)
    assert int((tmp_path / "trainer.pid").read_text()) == process.pid
    if how == "end of stdin":
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    else:
        process.send_signal(getattr(signal, how))
    expected = signal.SIGINT if how == "SIGINT" else signal.SIGTERM
    assert finish(process) == 128 + expected
    result = read_result(tmp_path)
    kept = last_checkpoint(tmp_path / "checkpoints")
    assert kept is not None
    assert (result["outcome"], result["signal"]) == ("interrupted", expected)
    assert (result["checkpoint"], result["step"]) == (str(kept.path), kept.step)
    assert losses(tmp_path)[-1][0] == kept.step
    assert not (tmp_path / "adapter_config.json").exists()


def test_asked_to_stop_before_it_trains_it_stops_at_once(small_model: Path, rows: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, small_model, rows)
    process = start(job)
    wait_until((tmp_path / "trainer.pid").exists, process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM
    assert read_result(tmp_path)["outcome"] == "interrupted"
    assert read_result(tmp_path)["checkpoint"] is None


def test_a_second_interrupt_stops_at_once_and_leaves_the_last_checkpoint(
    small_model: Path, rows: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path, small_model, rows, training={"epochs": 9999.0}, job={"save_steps": 1})
    process = start(job)
    wait_until(at_step(job, 3), process)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.0001)  # a key held down: each comes while the one before is being answered
    assert finish(process) == 128 + signal.SIGINT
    result = read_result(tmp_path)
    kept = last_checkpoint(tmp_path / "checkpoints")
    assert (result["outcome"], result["signal"]) == ("interrupted", signal.SIGINT)
    assert kept is not None
    assert result["checkpoint"] == str(kept.path)


SIGNALLED_WHILE_IT_SAYS_WHY = """
import os, signal, sys
from advisor.training import run
write = run._write
def signalled(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    write(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGINT)
run._write = signalled
sys.exit(run.main(sys.argv[1]))
"""


def test_interrupted_while_it_says_why_it_failed_it_still_says_so(small_model: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, small_model, tmp_path / "absent.jsonl")
    assert finish(start(job, program=("-c", SIGNALLED_WHILE_IT_SAYS_WHY))) == 2
    result = read_result(tmp_path)
    assert (result["outcome"], result["exit_code"], result["signal"]) == ("failed", 2, None)


SIGNALLED_WHILE_IT_WRITES = """
import os, signal, sys
from advisor.training import run, session
save = session.save_artefacts
def signalled(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    save(*args, **kwargs)
session.save_artefacts = signalled
sys.exit(run.main(sys.argv[1]))
"""


def test_asked_to_stop_when_nothing_is_left_to_train_it_finishes(small_model: Path, rows: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, small_model, rows, training={"max_steps": 2})
    assert finish(start(job, program=("-c", SIGNALLED_WHILE_IT_WRITES))) == 0
    assert read_result(tmp_path)["outcome"] == "finished"
    assert (tmp_path / "adapter_config.json").exists()


def test_a_disk_that_fills_leaves_the_last_good_checkpoint(small_model: Path, rows: Path, small_disk: Path) -> None:
    out = small_disk / "run"
    job = make_job(out, small_model, rows, "full", dtype="bfloat16", training={"epochs": 9999.0}, job={"save_steps": 2})
    assert finish(start(job)) == 4
    result = read_result(out)
    kept = last_checkpoint(out / "checkpoints")
    assert kept is not None
    assert (result["outcome"], result["checkpoint"], kept.step) == ("disk_full", str(kept.path), 2)
    assert (result["message"], result["exit_code"]) == ("Nothing more could be written.", 4)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_disk_that_something_else_fills_to_its_last_byte_is_said_to_be_full(
    small_model: Path, rows: Path, small_disk: Path
) -> None:
    out = small_disk / "run"
    job = make_job(out, small_model, rows, training={"epochs": 9999.0}, job={"save_steps": 2})
    process = start(job)
    wait_until(lambda: last_checkpoint(out / "checkpoints") is not None, process)
    with (small_disk / "something-else").open("wb", buffering=0) as other:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                other.write(bytes(2**16))
                continue
            with contextlib.suppress(OSError):
                other.write(b"x")
            time.sleep(0.001)
    assert finish(process) == 4
    result = read_result(out)
    kept = last_checkpoint(out / "checkpoints")
    assert kept is not None
    assert (result["outcome"], result["checkpoint"]) == ("disk_full", str(kept.path))
    assert not list(out.glob(".result*"))


def test_a_file_that_may_not_grow_is_a_full_disk(small_model: Path, rows: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("limits of another process exist on Linux alone")
    job = make_job(tmp_path, small_model, rows, training={"epochs": 9999.0}, job={"save_steps": 2})
    process = start(job)
    wait_until(lambda: last_checkpoint(tmp_path / "checkpoints") is not None, process)
    # The adapter is larger; metrics, log and result are smaller.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    assert finish(process) == 4
    result = read_result(tmp_path)
    kept = last_checkpoint(tmp_path / "checkpoints")
    assert kept is not None
    assert (result["outcome"], result["checkpoint"]) == ("disk_full", str(kept.path))


def test_memory_that_runs_out_is_said_with_what_was_reached(small_model: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    rows = write_rows(tmp_path / "rows.jsonl", 500)
    # 480 × 64 tokens × 32,064 logits in bf16 are 1.8 GiB, in fp32 3.7.
    job = make_job(tmp_path / "run", small_model, rows, micro_batch=480, training={"validation": 0.0})
    process = start(job, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30)))
    assert finish(process) == 4
    result = read_result(job.out)
    assert (result["outcome"], result["step"]) == ("out_of_memory", 0)
    assert re.search(r": [\d.]+ [MG]iB more was asked for", result["message"])
    assert result["hint"]


def test_a_loss_that_is_no_number_stops_the_run_with_advice(small_model: Path, rows: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    poisoned = tmp_path / "poisoned"
    shutil.copytree(small_model, poisoned)
    weights = load_file(poisoned / "model.safetensors")
    weights["model.norm.weight"].fill_(float("inf"))
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    job = make_job(tmp_path / "run", poisoned, rows, job={"save_steps": 1})
    assert finish(start(job)) == 4
    result = read_result(job.out)
    assert (result["outcome"], result["step"]) == ("diverged", 3)
    assert "learning rate" in result["hint"]
    assert result["checkpoint"] is None
    assert [loss for _, loss, _ in losses(job.out)] == [None] * 3


def test_what_cannot_be_used_is_said_in_the_result(small_model: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", small_model, tmp_path / "nowhere.jsonl")
    assert finish(start(job)) == 2
    result = read_result(job.out)
    assert result["outcome"] == "failed"
    assert "There is no file or folder" in result["message"]
    assert result["exit_code"] == 2
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


def test_accelerate_starts_it(small_model: Path, rows: Path, tmp_path: Path) -> None:
    from advisor.training.job import write_job

    job = make_job(tmp_path, small_model, rows, training={"max_steps": 2})
    write_job(job, str(tmp_path / "job.json"))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "advisor.training.run", str(tmp_path / "job.json")],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = read_result(tmp_path)
    assert (result["outcome"], result["step"], result["steps"]) == ("finished", 2, 2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "step 2/2" in done.stdout
