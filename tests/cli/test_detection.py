"""The whole command over a stub of NVIDIA's driver library: real nvidia-ml-py, real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Nvml = Callable[[str], dict[str, str]]


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "advisor", *arguments], capture_output=True, text=True, check=False, env=env
    )


def answer(env: dict[str, str], *arguments: str) -> dict[str, Any]:
    result = run(env, *arguments, "--json")
    assert result.returncode in (0, 1), result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_a_t4_is_detected_and_advised(nvml: Nvml) -> None:
    advice = answer(nvml("t4"))
    assert advice["gpu"]["detected"] is True
    assert advice["gpu"]["profile"] == "t4"
    assert advice["gpu"]["capability"] == "7.5"
    assert advice["recommended"] == "lora"
    assert advice["plan"]["dtype"] == "float16"


@pytest.mark.parametrize(
    ("device", "index"), [("cuda", 1), ("cuda:0", 0), ("cuda:1", 1), ("0", 0), ("1", 1), ("CUDA:1", 1)]
)
def test_a_device_is_named_as_nvidia_smi_counts_or_as_torch_spells_it(nvml: Nvml, device: str, index: int) -> None:
    assert answer(nvml("two_a100"), "--device", device)["gpu"]["index"] == index


def test_cuda_counts_what_is_visible(nvml: Nvml) -> None:
    env = {**nvml("two_a100"), "CUDA_VISIBLE_DEVICES": "1"}
    assert answer(env, "--device", "cuda:0")["gpu"]["index"] == 1


@pytest.mark.parametrize(
    ("device", "code"), [("cuda:2", 3), ("xpu", 3), ("mps", 3), ("2", 2), ("cuda:x", 2), ("tpu", 2)]
)
def test_a_device_that_is_not_here_is_refused(nvml: Nvml, device: str, code: int) -> None:
    result = run(nvml("two_a100"), "--device", device)
    assert result.returncode == code
    assert "What to do:" in result.stderr


def test_the_processor_can_be_asked_about(nvml: Nvml) -> None:
    gpu = answer(nvml("t4"), "--device", "cpu")["gpu"]
    assert (gpu["backend"], gpu["detected"], gpu["unified"]) == ("cpu", True, True)


def test_a_torch_that_cannot_use_the_gpu_is_said_before_anything_else_happens(
    nvml: Nvml, small_model: Path, tmp_path: Path
) -> None:
    """The stub answers for a driver, and no CUDA is behind it."""
    words = ["--launch", "--data", "phi3-advise-qa", "--model", str(small_model), "--out", str(tmp_path / "run")]
    result = run(nvml("t4"), *words)
    assert result.returncode == 3
    assert "torch cannot use Tesla T4" in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def test_the_freer_of_two_a100_is_taken_and_the_other_on_demand(nvml: Nvml) -> None:
    env = nvml("two_a100")
    chosen = answer(env)["gpu"]
    other = answer(env, "--device", str(1 - chosen["index"]))["gpu"]
    assert other["index"] != chosen["index"]
    assert other["free_bytes"] <= chosen["free_bytes"]
    assert any("--device" in note for note in chosen["notes"])


def test_a_device_that_is_not_there_is_bad_input(nvml: Nvml) -> None:
    result = run(nvml("two_a100"), "--device", "7")
    assert result.returncode == 2
    assert "7" in result.stderr
    assert not result.stdout


def test_a_mig_slice_is_advised_for_its_own_memory(nvml: Nvml) -> None:
    gpu = answer(nvml("mig"))["gpu"]
    assert gpu["mig"] is True
    assert gpu["total_bytes"] < 40 * 2**30


def test_memory_that_reads_na_is_the_hosts(nvml: Nvml) -> None:
    gpu = answer(nvml("no_memory_figures"))["gpu"]
    assert gpu["unified"] is True
    assert gpu["total_bytes"] > 0


def test_other_processes_are_counted_against_the_gpu(nvml: Nvml) -> None:
    busy = answer(nvml("busy_4090"))
    idle = answer(nvml("busy_4090"), "--free", "23GiB")
    assert busy["gpu"]["others_bytes"] > 8 * 2**30
    assert busy["gpu"]["processes"]
    full_busy, full_idle = busy["methods"][0], idle["methods"][0]
    assert full_busy["needed_bytes"] - full_idle["needed_bytes"] > 5 * 2**30 or not full_busy["fits"]


def test_a_broken_driver_is_said_and_a_typical_gpu_answered_for(nvml: Nvml) -> None:
    result = run(nvml("broken"), "--json")
    assert result.returncode == 0
    assert "driver" in result.stderr.lower()
    advice = json.loads(result.stdout)
    assert advice["gpu"]["detected"] is False
    assert any("No GPU was found" in warning for warning in advice["warnings"])


def test_a_named_gpu_wins_over_the_detected_one(nvml: Nvml) -> None:
    assert answer(nvml("t4"), "--gpu", "h100")["gpu"]["profile"] == "h100"


def test_vram_over_a_detected_gpu_keeps_its_other_facts(nvml: Nvml) -> None:
    gpu = answer(nvml("t4"), "--vram", "8GiB")["gpu"]
    assert gpu["total_bytes"] == 8 * 2**30
    assert gpu["capability"] == "7.5"


def test_an_estimate_without_a_gpu_in_its_plan_takes_the_detected_one(nvml: Nvml, tmp_path: Any) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('model = "phi-3.5-mini"\nmethod = "lora"\n')
    assert answer(nvml("t4"), "estimate", "--plan", str(plan))["plan"]["dtype"] == "float16"
    assert answer(nvml("two_a100"), "estimate", "--plan", str(plan))["plan"]["dtype"] == "bfloat16"


READ_PLAN = """
import json, sys
from advisor.cli.common import read_plan
path, gpu, vram, free = (argument or None for argument in sys.argv[1:5])
_, target = read_plan(path, gpu, vram=vram, free=free)
print(json.dumps([target.detected, target.total_bytes, target.others_bytes, list(target.notes)]))
"""


def plan_gpu(env: dict[str, str], plan: Path, gpu: str = "", vram: str = "", free: str = "") -> list[Any]:
    """Whether the GPU that a plan is judged on was detected, its memory, what others hold of it, and its notes."""
    command = [sys.executable, "-c", READ_PLAN, str(plan), gpu, vram, free]
    found: list[Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
    return found


def test_a_plan_that_names_the_gpu_of_this_machine_is_judged_on_what_is_free_of_it(nvml: Nvml, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('model = "phi-3.5-mini"\nmethod = "qlora"\ngpu = "rtx-4090"\n')
    # The stub's card has 24,564 MiB, of which the driver keeps 480 and 14,392 are free.
    detected, total, others, notes = plan_gpu(nvml("busy_4090"), plan)
    assert (detected, total, others) == (True, (24564 - 480) * 2**20, (24564 - 480 - 14392) * 2**20)
    assert any("in this machine" in note for note in notes)
    assert "in this machine" in " ".join(run(nvml("busy_4090"), "estimate", "--plan", str(plan)).stdout.split())


def test_a_plan_for_another_gpu_or_a_gpu_that_is_named_is_a_what_if(nvml: Nvml, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('model = "phi-3.5-mini"\nmethod = "qlora"\ngpu = "rtx-4090"\n')
    assert plan_gpu(nvml("two_a100"), plan)[::2] == [False, 0]
    assert plan_gpu(nvml("busy_4090"), plan, gpu="rtx-4090")[::2] == [False, 0]


def test_a_plans_gpu_can_be_given_another_size_and_what_is_free_of_it(nvml: Nvml, tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('model = "phi-3.5-mini"\nmethod = "qlora"\ngpu = "t4"\n')
    env = nvml("busy_4090")
    assert plan_gpu(env, plan, vram="12GiB")[:3] == [False, 12 * 2**30, 0]
    assert plan_gpu(env, plan, vram="12GiB", free="9GiB")[:3] == [False, 12 * 2**30, 3 * 2**30]
    plan.write_text('model = "phi-3.5-mini"\nmethod = "qlora"\n')
    assert plan_gpu(nvml("no_gpu"), plan, vram="12GiB", free="9GiB")[:3] == [False, 12 * 2**30, 3 * 2**30]
    assert plan_gpu(env, plan, free="10GiB")[2] == (24564 - 480 - 10240) * 2**20
    for command in ("estimate", "trace"):
        refused = run(env, command, "--plan", str(plan), "--free", "99GiB")
        assert (refused.returncode, refused.stdout) == (2, "")
