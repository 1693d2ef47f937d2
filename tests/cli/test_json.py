"""The JSON output of every command, from the process, against docs/schema.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "schema.json").read_text())

COMMANDS = {
    "advice": ["--gpu", "t4"],
    "advice where nothing fits": ["--vram", "2GiB"],
    "advice with everything said": [
        *("--gpu", "rtx-4090", "--model", "phi-4-mini", "--seq-len", "1024", "--effective-batch", "8"),
        *("--lora-rank", "8", "--target-modules", "qkv_proj,o_proj", "--prefer", "quality", "--tokens", "3M"),
    ],
    "recipe": ["--recipe", "cookbook-full", "--gpu", "a100-40gb"],
    "gpus": ["gpus"],
    "models": ["models"],
}


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "advisor", *arguments], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_json_output_matches_the_published_schema(name: str) -> None:
    command = COMMANDS[name]
    result = run(*command, "--json")
    assert result.returncode == (1 if "nothing" in name else 0), result.stderr
    jsonschema.validate(json.loads(result.stdout), SCHEMA)


@pytest.mark.parametrize("explain", [[], ["--explain"]])
def test_estimate_json_matches_the_published_schema(tmp_path: Path, explain: list[str]) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('model = "phi-3.5-mini"\nmethod = "qlora"\n')
    result = run("estimate", "--plan", str(plan), "--json", *explain)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    jsonschema.validate(answer, SCHEMA)
    assert sum(answer["memory"]["components"].values()) == answer["memory"]["allocated_bytes"]
    if explain:
        assert sum(term["bytes"] for term in answer["terms"]) == answer["memory"]["allocated_bytes"]


def test_the_schema_refuses_an_answer_without_its_memory() -> None:
    answer = json.loads(run("--gpu", "t4", "--json").stdout)
    del answer["memory"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(answer, SCHEMA)


def test_the_plan_and_the_memory_are_the_recommended_method_s() -> None:
    answer = json.loads(run("--gpu", "t4", "--json").stdout)
    chosen = next(part for part in answer["methods"] if part["method"] == answer["recommended"])
    assert answer["plan"] == chosen["plan"]
    assert answer["memory"] == chosen["memory"]


def test_a_saved_plan_estimates_to_the_same_bytes(tmp_path: Path) -> None:
    saved = tmp_path / "plan.toml"
    advice = json.loads(run("--gpu", "t4", "--save-plan", str(saved), "--json").stdout)
    again = json.loads(run("estimate", "--plan", str(saved), "--json").stdout)
    assert again["plan"] == advice["plan"]
    assert again["memory"] == advice["memory"]
