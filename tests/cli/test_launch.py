"""From nothing to a trained model and everything that can come between, as whole processes on the processor."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from advisor.profiles import load_plan
from advisor.training.checkpoints import last_checkpoint

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "schema.json").read_text())
DATA = "phi3-advise-qa"
PATIENCE = 900.0
"""Seconds that a whole run may take; it takes fifteen where nothing else runs."""

SECRETS = {"HF_TOKEN": "hf_very_secret", "WANDB_API_KEY": "wandb_very_secret"}

PLAN = """
model = "{model}"
method = "lora"
micro_batch = {micro_batch}
gradient_accumulation = 1
seq_len = 64
padding = "longest"
gradient_checkpointing = false
training = {{ validation = 0.0 }}
"""

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))
os.execv(sys.executable, [sys.executable, "-m", "advisor", *sys.argv[1:]])
"""


def environment(**more: str) -> dict[str, str]:
    hidden = {"COLUMNS", "NO_COLOR", "FORCE_COLOR"}
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**inherited, "PYTHONPATH": str(ROOT), **more}


def run(*words: object, code: int = 0, program: tuple[str, ...] = ("-m", "advisor"), **more: str) -> Any:
    done = subprocess.run(
        [sys.executable, *program, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(**more),
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert not re.search(r"[\r\x1b]", done.stdout)
    return done


def write_plan(folder: Path, model: Path, micro_batch: int) -> Path:
    path = folder / "plan.toml"
    path.write_text(PLAN.format(model=model, micro_batch=micro_batch))
    return path


def test_one_command_goes_from_nothing_to_an_adapter(small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["--launch", "--data", DATA, "--model", small_model, "--device", "cpu", "--method", "qlora"]
    done = run(*words, "--max-steps", 2, "--seed", 0, "--out", out, "--json", **SECRETS)
    answer = json.loads(done.stdout)
    jsonschema.validate(answer, SCHEMA)
    assert (answer["plan"]["method"], answer["plan"]["training"]["seed"]) == ("qlora", 0)
    # Short samples: two or more of them go into a row.
    assert answer["plan"]["packing"]
    assert answer["plan"]["seq_len"] % 64 == 0
    assert answer["probed"]["holds"]
    assert answer["result"]["outcome"] == "finished"
    assert answer["result"]["step"] == 2
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "metrics.jsonl"):
        assert (out / name).is_file(), name
    assert load_plan(str(out / "plan.toml")).training.max_steps == 2
    for path in out.rglob("*"):
        if path.is_file():
            assert b"very_secret" not in path.read_bytes(), path
    # What a person reads is on stderr, and says where everything is.
    for part in (
        "First example",
        "Fits.",
        "Probe: it holds",
        "step 1/2",
        "step 2/2",
        "Trained: 2 steps",
        "AutoPeftModelForCausalLM",
    ):
        assert part in done.stderr, part
    again = ["train", "--resume", "--out", out, "--device", "cpu"]
    run(*again, code=2)
    run(*words, "--out", out, code=2)
    # Other data is refused, and the run stays what it was: finished, and able to go on with its own.
    before = {name: (out / name).read_bytes() for name in ("job.json", "plan.toml", "environment.json", "result.json")}
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "What else?", "completion": "Nothing."}\n' * 40)
    done = run(*again, "--max-steps", 3, "--data", other, code=2)
    assert "was written by another run: data differ" in " ".join(done.stderr.split())
    assert before == {name: (out / name).read_bytes() for name in before}
    done = run(*again, "--max-steps", 3, "--dry-run")
    assert before == {name: (out / name).read_bytes() for name in before}
    (command,) = (line for line in done.stdout.splitlines() if "phi3-advise train --resume" in line)
    assert "Trained: 3 steps" in run(*shlex.split(command)[1:]).stdout


def test_a_dry_run_shows_everything_and_its_command_runs_as_it_stands(small_model: Path, tmp_path: Path) -> None:
    out, saved = tmp_path / "run", tmp_path / "saved.toml"
    words = ["--launch", "--data", DATA, "--model", small_model, "--device", "cpu", "--method", "lora"]
    words += ["--no-packing", "--no-probe", "--seq-len", 96]
    done = run(*words, "--max-steps", 1, "--out", out, "--dry-run", "--save-plan", saved)
    assert not list(out.glob("*.safetensors"))
    plan = load_plan(str(saved))
    assert (plan.seq_len, plan.packing, plan.padding) == (96, False, "longest")
    lines = done.stdout.splitlines()
    assert '  method = "lora"' in lines
    assert "  use_cpu: true" in lines
    command = next(line for line in lines if "accelerate" in line and " launch " in line)
    assert command.endswith(f"launch --config_file {out}/accelerate.yaml -m advisor.training.run {out}/job.json")
    assert "Probe: not probed" in done.stdout
    assert max(len(line) for line in lines if not line.startswith("  ")) <= 80
    # Pasted into a shell, in a folder whose contents are called like libraries.
    (tmp_path / "here" / "datasets").mkdir(parents=True)
    pasted = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path / "here", stdin=subprocess.DEVNULL, timeout=PATIENCE, check=False
    )
    assert pasted.returncode == 0
    assert (out / "adapter_model.safetensors").is_file()
    run(*words, "--out", out, code=2)


def test_a_dry_run_leaves_its_folder_to_the_run(small_model: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "run", write_plan(tmp_path, small_model, 2)
    words = ["train", "--plan", plan, "--data", DATA, "--device", "cpu", "--out", out, "--no-probe", "--max-steps", 1]
    run(*words, "--dry-run")
    run(*words)
    assert (out / "adapter_model.safetensors").is_file()


def test_a_run_that_is_terminated_saves_and_is_resumed(small_model: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "run", write_plan(tmp_path, small_model, 2)
    words = [
        "train",
        "--plan",
        plan,
        "--data",
        DATA,
        "--device",
        "cpu",
        "--max-steps",
        9999,
        "--out",
        out,
        "--no-probe",
    ]
    parent = subprocess.Popen(
        [sys.executable, "-m", "advisor", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + PATIENCE
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while parent.poll() is None:  # again and again, until what became of the work has been said
        parent.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    said, _ = parent.communicate()
    assert parent.returncode == 143, said
    kept = last_checkpoint(out / "checkpoints")
    assert kept is not None
    assert str(kept.path) in said
    assert f"phi3-advise train --resume --out {out} --device cpu" in said
    run("train", "--resume", "--out", out, "--device", "cpu", "--learning-rate", 1e-3, code=2)
    done = run("train", "--resume", "--out", out, "--device", "cpu", "--max-steps", kept.step + 2)
    assert f"Trained: {kept.step + 2} steps" in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process's data exist on Linux")
def test_memory_that_runs_out_is_followed_by_the_next_plan(small_model: Path, tmp_path: Path) -> None:
    """128 × 64 tokens × 32,064 logits take 1 GiB in fp32, three times over; 3 GiB is all that the process may have."""
    out, plan = tmp_path / "run", write_plan(tmp_path, small_model, 128)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "word " * 30, "completion": "word " * 60}) + "\n")
    rows.write_text(rows.read_text() * 128)
    words = ["train", "--plan", plan, "--data", rows, "--device", "cpu", "--max-steps", 1, "--out", out]
    done = run(*words, "--no-probe", "--fallback", "--json", program=("-c", LIMITED))
    assert "Out of memory at step 1" in done.stderr
    assert "Taken instead: micro-batch 64 × accumulation 2 in place of 128 × 1" in " ".join(done.stderr.split())
    answer = json.loads(done.stdout)
    jsonschema.validate(answer, SCHEMA)
    assert answer["result"]["outcome"] == "finished"
    assert answer["attempts"] >= 2
    assert answer["plan"]["micro_batch"] * answer["plan"]["gradient_accumulation"] == 128
    assert (out / "attempt-1" / "result.json").is_file()


def test_no_network_ends_before_anything_is_downloaded(tmp_path: Path) -> None:
    hub = {"HF_ENDPOINT": "https://hub.invalid", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    done = run("--launch", "--data", DATA, "--device", "cpu", "--out", tmp_path / "run", code=3, **hub)
    assert "Phi-3-mini-4k-instruct are neither here nor to be reached" in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--launch", "--data", DATA, "--device", "cpu", "--model", "phi-3-small-8k"], 2, "cannot be trained"),
        (["--launch", "--data", DATA, "--gpu", "t4"], 2, "--gpu and --launch contradict"),
        (["--launch", "--device", "cpu"], 2, "--launch needs --data"),
        (["--data", DATA, "--seed", "0", "--no-packing"], 2, "--data, --seed, --packing: only a run takes that"),
        (["--launch", "--resume"], 2, "--resume needs the run's folder"),
        (["--launch", "--resume", "--out", "."], 2, "holds no run"),
        (["train"], 2, "--plan is missing"),
        (["train", "--resume", "--out", ".", "--fallback"], 2, "by its own plan: --fallback cannot be given"),
        (["--launch", "--resume", "--out", ".", "--fallback"], 2, "by its own plan: --fallback cannot be given"),
        (["--device", "gpu0"], 2, "is no device"),
        (["--seq-len", "auto"], 2, "auto needs data"),
        (["--seq-len", "long"], 2, "is not a number"),
    ],
)
def test_what_cannot_be_meant_is_said_at_once(words: list[str], code: int, said: str) -> None:
    assert said in " ".join(run(*words, code=code).stderr.split())


def test_a_plan_that_does_not_fit_is_not_tried_where_nobody_can_be_asked(small_model: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, small_model, 65_536)
    words = ["train", "--plan", plan, "--data", DATA, "--device", "cpu", "--out", tmp_path / "run"]
    done = run(*words, code=1)
    assert "does not fit" in done.stderr
    assert not (tmp_path / "run").exists()
    done = run(*words, "--fallback", "--dry-run", "--no-probe")
    assert "It does not fit. Taken instead: micro-batch" in " ".join(done.stdout.split())
