"""`phi3-advise estimate` of plans that somebody wrote by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result

from advisor.cli import cli

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "schema.json").read_text(encoding="utf-8"))


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(f'model = "phi-3-mini-4k"\n{text}\n', encoding="utf-8")
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(cli, ["estimate", *map(str, words)], standalone_mode=False)


def answer(path: Path) -> dict[str, Any]:
    result = run("--plan", path, "--json")
    assert result.exception is None, result.exception
    assert result.stdout.isascii()
    found: dict[str, Any] = json.loads(result.stdout)
    jsonschema.validate(found, SCHEMA)
    return found


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ('method = "lora"\nlora = { target_modules = ["q_proj", "o_proj"] }', "q_proj match nothing in phi3 (qkv_proj"),
        ('method = "qlora"\ndtype = "bfloat16"\nautocast = "bfloat16"\ngpu = "t4"', "NVIDIA T4 has no bfloat16"),
        ('method = "full"\ndtype = "float32"\nautocast = "bfloat16"\ngpu = "t4"', "emulated there, slowly"),
        ('method = "lora"\nseq_len = 8192', "was made for 4,096 tokens; 8,192 is beyond that"),
        ('method = "lora"\nseq_len = 2048', "reach the sliding window"),
    ],
)
def test_what_a_plan_overlooks_is_said(tmp_path: Path, settings: str, said: str) -> None:
    path = write(tmp_path, settings)
    assert [warning for warning in answer(path)["warnings"] if said in warning]
    assert said in " ".join(run("--plan", path).stdout.split())


@pytest.mark.parametrize("settings", ['method = "qlora"\nseq_len = 512\ngpu = "t4"', 'method = "full"\nseq_len = 512'])
def test_a_plan_that_overlooks_nothing_has_no_warning_of_its_own(tmp_path: Path, settings: str) -> None:
    warnings = answer(write(tmp_path, settings))["warnings"]
    assert [warning for warning in warnings if not warning.startswith("No GPU is named")] == []


@pytest.mark.parametrize(("micro_batch", "fits"), [(1, True), (16, False)])
def test_the_verdict_is_in_the_answer_and_not_in_the_exit_code(tmp_path: Path, micro_batch: int, fits: bool) -> None:
    path = write(tmp_path, f'method = "lora"\nmicro_batch = {micro_batch}\ngpu = "t4"')
    found = answer(path)
    assert found["fits"] is fits
    assert (found["missing_bytes"] == 0) is fits
    assert found["needed_bytes"] >= found["memory"]["total_bytes"] + found["margin_bytes"]
    assert found["gpu"]["name"] == "NVIDIA T4"
    assert run("--plan", path).return_value is None  # exit code 0


def test_where_no_gpu_is_known_nothing_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advisor.cli.common.detect_gpu", lambda _: None)
    found = answer(write(tmp_path, 'method = "lora"'))
    assert not {"fits", "gpu", "needed_bytes"} & found.keys()
