"""What the fast answer may not import. How fast it is, tests/benchmarks/cold_start.py measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "transformers", "numpy", "peft", "bitsandbytes", "accelerate", "datasets", "huggingface_hub"]

SCRIPT = """
import atexit, json, sys
atexit.register(lambda: sys.stderr.write(json.dumps(sorted(sys.modules))))
from advisor.cli import main
main(sys.argv[1:])
"""


def modules_after(*arguments: str, code: int = 0) -> set[str]:
    result = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    *_, loaded = result.stderr.splitlines()
    return {name.partition(".")[0] for name in json.loads(loaded)}


COMMANDS = [
    ["--gpu", "t4", "--json"],
    ["--gpu", "t4"],
    ["gpus"],
    ["models"],
    ["--recipe", "cookbook-full", "--gpu", "a100-40gb"],
    ["trace", "--help"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_answer_in_closed_form_imports_a_training_library(command: list[str]) -> None:
    assert not modules_after(*command) & set(HEAVY)


def test_a_named_gpu_as_json_imports_neither_the_screens_nor_the_driver() -> None:
    assert not modules_after("--gpu", "t4", "--json") & {"rich", "pynvml", "psutil"}


def test_an_estimate_imports_no_training_library(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('model = "phi-3-mini-4k"\nmethod = "qlora"\ngpu = "t4"\n')
    assert not modules_after("estimate", "--plan", str(plan), "--explain") & set(HEAVY)


@pytest.mark.parametrize("words", [["--timeline", "/nowhere/run.html"], ["--gpu", "no-such-gpu"]])
def test_a_trace_that_is_refused_imports_no_training_library(tmp_path: Path, words: list[str]) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('model = "phi-3-mini-4k"\nmethod = "qlora"\n')
    assert not modules_after("trace", "--plan", str(plan), *words, code=2) & set(HEAVY)
