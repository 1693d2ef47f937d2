"""`phi3-advise probe` and `phi3-advise --probe` as processes, on the processor and where there is no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "schema.json").read_text())

DATA = "phi3-advise-qa"


def run(*words: object, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "advisor", *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **more},
        timeout=300,
        check=False,
    )
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def plan(small_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    fields = ["gradient_accumulation = 4", "micro_batch = 2", "seq_len = 128", f'model = "{small_model}"']
    path.write_text("\n".join([*fields, 'method = "lora"', 'dtype = "bfloat16"']))
    return path


def test_without_a_gpu_it_ends_with_3_and_what_to_do(plan: Path) -> None:
    for words in (["probe", "--plan", plan], ["--probe"], ["--probe", "--as", "t4"]):
        said = " ".join(run(*words, code=3).stderr.split())
        assert "No GPU was found to probe on" in said
        assert "--device cpu" in said


def test_a_probe_on_the_processor_measures_and_is_remembered(plan: Path, tmp_path: Path) -> None:
    state = {"PHI3_ADVISE_STATE": str(tmp_path / "state")}
    answer = json.loads(run("probe", "--plan", plan, "--device", "cpu", "--json", **state).stdout)
    jsonschema.validate(answer, SCHEMA)
    assert answer["tier"] == "probe"
    assert answer["fits"]
    assert answer["measured"]["steps"] == 3
    traced = next(one["memory"] for one in answer["predicted"] if one["tier"] == "trace")
    assert traced["allocated_bytes"] == pytest.approx(answer["memory"]["allocated_bytes"], rel=0.005)
    # What the closed form calls so is what is there when a step begins, states of the optimizer included.
    estimated = next(one["memory"] for one in answer["predicted"] if one["tier"] == "estimate")
    assert "loading" in traced["moments"]
    assert "loading" not in estimated["moments"]
    assert answer["speed"]["measured"]
    kept = list((tmp_path / "state" / "probes").iterdir())
    assert len(kept) == 1
    assert not list((tmp_path / "state" / "running").iterdir())
    # The screen says the same, beside what was predicted.
    screen = run("probe", "--plan", plan, "--device", "cpu", **state).stdout
    for part in ("Runs.", "peak allocated", "loss backward", "trace said", "Tier: probe"):
        assert part in screen


@pytest.mark.skipif(os.name != "posix", reason="a terminal's signals")
@pytest.mark.parametrize("more", [[], ["--find-batch"]], ids=["one", "search"])
def test_ctrl_c_that_is_held_down_leaves_nothing_and_shows_no_traceback(
    plan: Path, tmp_path: Path, more: list[str]
) -> None:
    running = tmp_path / "state" / "running"
    process = subprocess.Popen(
        [sys.executable, "-m", "advisor", "probe", "--plan", plan, "--device", "cpu", *more],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PHI3_ADVISE_STATE": str(tmp_path / "state")},
    )
    while not list(running.glob("*/log.txt")):
        assert process.poll() is None
        time.sleep(0.01)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.0005)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, set(err.split())) == (130, "", {"Stopped."}), err
    until = time.monotonic() + 30
    while list(running.iterdir()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not list(running.iterdir())


def test_the_recommended_plan_is_probed_and_its_speed_used_from_then_on(small_model: Path, tmp_path: Path) -> None:
    state = {"PHI3_ADVISE_STATE": str(tmp_path / "state")}
    asked = ["--model", small_model, "--device", "cpu", "--seq-len", "64", "--effective-batch", "2", "--method", "lora"]
    before = json.loads(run(*asked, "--json", **state).stdout)
    assert next(part for part in before["methods"] if part["method"] == "lora")["speed"] is None
    probed = json.loads(run(*asked, "--probe", "--json", **state).stdout)
    jsonschema.validate(probed, SCHEMA)
    assert probed["plan"] == before["plan"]
    after = json.loads(run(*asked, "--json", **state).stdout)
    jsonschema.validate(after, SCHEMA)
    speed = next(part for part in after["methods"] if part["method"] == "lora")["speed"]
    assert speed["measured"]
    assert speed["tokens_per_second"] == pytest.approx(probed["speed"]["tokens_per_second"])
    assert any("was measured here by a probe on" in said for said in after["warnings"])


def test_a_plan_for_another_gpu_than_the_one_that_runs_it_is_said(plan: Path) -> None:
    plan.write_text(plan.read_text() + '\ngpu = "t4"')
    words = ["probe", "--plan", plan, "--device", "cpu"]
    answer = json.loads(run(*words, "--json").stdout)
    (said,) = [one for one in answer["warnings"] if "--as t4" in one]
    assert said.startswith("The plan is for NVIDIA T4, and this is ")
    assert "The plan is for" in " ".join(run(*words).stdout.split())
    plan.write_text(plan.read_text().replace('"t4"', '"t5"'))
    assert "no GPU called 't5'" in run(*words, code=2).stderr


def test_a_plan_that_is_refused_is_bad_input_and_debug_shows_what_its_process_said(plan: Path) -> None:
    plan.write_text(plan.read_text().replace("bfloat16", "float32") + '\nautocast = "float16"')
    words = ["probe", "--plan", plan, "--device", "cpu"]
    said = " ".join(run(*words, code=2).stderr.split())
    assert "float16 has no gradient scaling on the CPU. accelerate leaves" in said
    assert "Traceback" not in said
    shown = run(*words, "--debug", code=2).stderr
    assert "dry_run.py" in shown
    assert "advisor.errors.PlanError" in shown


def test_the_largest_micro_batch_under_a_limit_is_found_by_trying(plan: Path) -> None:
    words = ["probe", "--plan", plan, "--device", "cpu", "--as", "700MiB", "--find-batch", "--json"]
    answer = json.loads(run(*words).stdout)
    jsonschema.validate(answer, SCHEMA)
    found = answer["found"]
    ran = [one["value"] for one in found["tries"] if one["outcome"] == "ran"]
    did_not = [one["value"] for one in found["tries"] if one["outcome"] == "out_of_memory"]
    assert found["largest"] == max(ran) == min(did_not) - 1
    assert answer["plan"]["micro_batch"] == found["largest"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--find-batch"], "only a probe takes that"),
        (["--no-probe"], "--no-probe: only a run takes that"),
        (["--probe", "--gpu", "t4"], "--gpu and --probe contradict"),
        (["--probe", "--epochs", "2"], "--epochs and --probe contradict"),
        (["--launch", "--data", "x", "--as", "t4"], "--as and --launch contradict"),
        (["--probe", "--device", "cpu", "--as", "t5"], "There is no GPU called 't5'"),
        (["--probe", "--device", "cpu", "--as", "h200"], "cannot stand in for"),
        (["--probe", "--device", "cpu", "--find-batch", "--find-seq-len"], "contradict each other"),
        (["--probe", "--device", "cpu", "--data", DATA, "--find-seq-len"], "--find-seq-len and --data contradict"),
    ],
)
def test_what_cannot_be_meant_is_said_at_once(words: list[str], said: str) -> None:
    assert said in " ".join(run(*words, code=2).stderr.split())


@pytest.mark.parametrize("more", [[], ["--as", "2GiB"]], ids=["whole", "smaller"])
def test_a_torch_that_does_not_know_the_gpu_is_what_is_lacking(
    plan: Path, more: list[str], nvml: Callable[[str], dict[str, str]]
) -> None:
    """The driver has a T4, and this torch is a processor's."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this torch knows CUDA, and looks for the GPU itself")
    plan.write_text(plan.read_text().replace('dtype = "bfloat16"', ""))
    said = run("probe", "--plan", plan, *more, code=3, **nvml("t4")).stderr
    assert "There is no cuda here: torch would train on cpu." in " ".join(said.split())


def test_a_context_that_was_measured_is_used_on_that_gpu(
    nvml: Callable[[str], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**nvml("t4"), "PHI3_ADVISE_STATE": str(tmp_path)}

    def advice() -> Any:
        return json.loads(run("--json", **environment).stdout)

    before = advice()["gpu"]
    monkeypatch.setenv("PHI3_ADVISE_STATE", str(tmp_path))
    from advisor.plan import plan_from_fields
    from advisor.probe.measurement import Measurement
    from advisor.probe.results import installed_versions, keep

    one = Measurement(
        outcome="ran",
        plan=plan_from_fields({"model": "phi-3-mini-4k", "method": "full"}),
        device_name=before["name"],
        context_bytes=123_456_789,
        versions={**installed_versions(), "driver": before["driver"]},
        date="2026-08-01T12:00:00Z",
    )
    assert keep(one) is not None
    after = advice()["gpu"]
    assert (after["context_bytes"], after["context_provenance"]) == (123_456_789, "measured")
    assert "2026-08-01" in after["notes"][-1]
