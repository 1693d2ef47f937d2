"""`phi3-advise doctor`: real packages, real computations on the CPU, a stub of NVIDIA's library for the card."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from advisor.doctor import examine
from advisor.report.terminal.doctor import render_doctor

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "schema.json").read_text())


def doctor(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "advisor", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def by_name(result: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    value = json.loads(result.stdout)
    jsonschema.validate(value, SCHEMA)
    return {check["name"]: check for check in value["checks"]}


def test_the_cpu_computes_and_every_package_is_named() -> None:
    result = doctor("--device", "cpu", "--json")
    assert result.returncode == 0, result.stdout
    checks = by_name(result)
    for name in ("matmul on cpu", "4-bit matmul on cpu", "attention on cpu"):
        assert checks[name]["verdict"] == "good", checks[name]
    assert "CUDA" in checks or "ROCm" in checks
    for package in ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"):
        assert checks[package]["found"][0].isdigit()


def test_a_device_that_is_not_there_is_a_verdict_with_a_remedy_for_each_computation() -> None:
    result = doctor("--device", "cuda", "--json")
    assert result.returncode == 3
    checks = by_name(result)
    assert {name for name, check in checks.items() if check["verdict"] == "bad"} == {
        f"{trial} on cuda" for trial in ("matmul", "4-bit matmul", "attention")
    }
    assert all(check["remedy"] for check in checks.values() if check["verdict"] == "bad")


def test_a_card_is_described_with_what_is_free(nvml: Callable[[str], dict[str, str]]) -> None:
    result = doctor("--device", "cpu", env=nvml("t4"))
    assert "Tesla T4" in result.stdout
    assert "capability 7.5" in result.stdout
    assert "no bfloat16" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_computation_that_kills_its_process_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bitsandbytes whose library crashes at import, as one built for another CUDA does."""
    package = tmp_path / "bitsandbytes"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), os.getcwd(), *sys.path])
    from advisor.report.terminal import make_console

    made = render_doctor(examine("cpu"), make_console())
    assert [check.verdict for check in made if check.name == "matmul on cpu"] == ["good"]
    broken = next(check for check in made if check.name == "4-bit matmul")
    assert broken.verdict == "bad"
    assert "SIGSEGV" in broken.found
    assert "cannot go on" in capsys.readouterr().out


def test_a_package_that_only_qlora_needs_does_not_end_training(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("advisor.doctor.examine")
    installed = module._installed
    monkeypatch.setattr(module, "_installed", lambda name: None if name == "bitsandbytes" else installed(name))
    (found,) = (check for check in module._packages() if check.name == "bitsandbytes")
    assert (found.verdict, found.found) == ("doubtful", "not installed")
    assert "QLoRA" in found.remedy


def test_without_torch_nothing_is_computed_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("advisor.doctor.examine")
    monkeypatch.setattr(module, "_installed", lambda name: None if name == "torch" else "1.0")
    (found,) = module._trials("cpu")
    assert (found.verdict, found.found) == ("absent", "nothing was computed: torch is not installed")


def test_what_is_no_device_is_a_usage_error() -> None:
    result = doctor("--device", "banana")
    assert result.returncode == 2
    assert "'banana' is no device" in result.stderr


@pytest.mark.parametrize(
    ("built", "driver", "verdict"),
    [("13.0", (12, 8), "bad"), ("12.8", (12, 4), "good"), ("12.8", None, "good"), (None, (12, 8), "absent")],
)
def test_a_torch_of_a_newer_cuda_than_the_drivers_is_bad(
    built: str | None, driver: tuple[int, int] | None, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from advisor.doctor import trials

    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(trials, "driver_cuda", lambda: driver)
    assert trials.cuda_of_torch().verdict == verdict
