"""`phi3-advise trace` and `--trace` as processes: small models, so that importing torch is most of what they take."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "schema.json").read_text())

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def write_plan(folder: Path, config: dict[str, Any], **fields: object) -> Path:
    """A plan file beside the config.json that it names."""
    (folder / "config.json").write_text(json.dumps(SIZES | config))
    settings = {"model": "config.json", "method": "lora", "seq_len": 128, "gpu": "a100-40gb"} | fields
    plan = folder / "plan.toml"
    plan.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items()))
    return plan


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "advisor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_a_trace_is_one_json_object_and_files_that_open(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, {"model_type": "phi3", "num_key_value_heads": 4})
    timeline, snapshot = tmp_path / "run.html", tmp_path / "run.pickle"
    result = run("trace", "--plan", plan, "--json", "--timeline", timeline, "--snapshot", snapshot)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    jsonschema.validate(answer, SCHEMA)
    memory = answer["memory"]
    assert answer["tier"] == "trace"
    assert sum(memory["components"].values()) == memory["allocated_bytes"]
    assert memory["moments"][memory["at"]] == memory["allocated_bytes"]
    assert sum(row["bytes"] for row in answer["modules"]) == memory["allocated_bytes"]
    assert memory["reserved_bytes"] >= memory["allocated_bytes"]
    assert answer["fits"] is True
    assert answer["survives"]["out_of_memory"] is None
    error = answer["closed_form"]["allocated_bytes"] - memory["allocated_bytes"]
    assert answer["closed_form"]["error_bytes"] == error
    layers = [row for row in answer["largest"] if row["module"].endswith("layers.*.mlp.down_proj.base_layer.weight")]
    assert [(row["count"], row["shape"]) for row in layers] == [(2, [64, 128])]
    assert timeline.read_text().startswith("<!")
    assert pickle.loads(snapshot.read_bytes())["segments"]


def test_a_family_that_the_closed_form_does_not_know_is_traced(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, {"model_type": "gpt_neox"}, method="full", optimizer="paged_adamw_8bit")
    result = run("trace", "--plan", plan, COLUMNS="80")
    assert result.returncode == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "closed form says nothing: " in shown
    assert "'gpt_neox'" in shown
    assert "gpt_neox.layers.*.attention.query_key_value" in shown
    assert "Fits." in shown
    assert "nothing was measured" in shown
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_shortlist_is_traced_and_says_which_number_is_of_which_tier(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    # Weights enough for the smallest GPU to hold an adapter's training and not a full fine-tune's.
    config.write_text(json.dumps(SIZES | {"model_type": "phi3", "num_key_value_heads": 4, "vocab_size": 600_000}))
    words = ["--model", config, "--vram", "1GiB", "--seq-len", 8, "--effective-batch", 1]
    saved = tmp_path / "plan.toml"
    result = run(*words, "--trace", "--json", "--save-plan", saved)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    answer = json.loads(result.stdout)
    jsonschema.validate(answer, SCHEMA)
    tiers = {part["method"]: part["tier"] for part in answer["methods"]}
    fits = {part["method"]: part["fits"] for part in answer["methods"]}
    assert answer["tier"] == tiers[answer["recommended"]] == "trace"
    assert {method for method, tier in tiers.items() if tier == "estimate"} == {m for m, fit in fits.items() if not fit}
    assert answer["next_command"] == f"phi3-advise trace --plan {saved}"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"hidden_size": 64}, "model_type"),
        ({"model_type": "phi3", "num_key_value_heads": 3}, "key-value heads"),
    ],
)
def test_what_is_no_causal_model_is_refused_before_torch_is_asked(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    plan = write_plan(tmp_path, config)
    result = run("trace", "--plan", plan)
    assert result.returncode == 2
    assert said in result.stderr
    assert not result.stdout


@pytest.mark.parametrize("option", ["--timeline", "--snapshot"])
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere/out", "cannot be written"),
        ("config.json/out", "cannot be written"),
        (".", "exists already"),
        ("config.json", "exists already"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path, option: str, place: str, said: str) -> None:
    plan = write_plan(tmp_path, {"model_type": "phi3"})
    before = (tmp_path / "config.json").read_bytes()
    started = time.monotonic()
    result = run("trace", "--plan", plan, option, tmp_path / place)
    assert result.returncode == 2
    assert said in " ".join(result.stderr.split())
    assert (tmp_path / "config.json").read_bytes() == before
    assert time.monotonic() - started < 2  # a trace takes longer to import what it runs


def test_one_file_cannot_be_both_reports(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, {"model_type": "phi3"})
    result = run("trace", "--plan", plan, "--timeline", tmp_path / "out", "--snapshot", tmp_path / "." / "out")
    assert result.returncode == 2


WITHOUT = """
import sys
from importlib.abc import MetaPathFinder
missing = sys.argv.pop(1).split(",")
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in missing else find(name, package)
from advisor.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("missing", "command"), [("torch", "pip install torch"), ("torch,peft", "torch peft")])
def test_missing_packages_are_named_with_the_command_that_installs_them(
    tmp_path: Path, missing: str, command: str
) -> None:
    plan = write_plan(tmp_path, {"model_type": "phi3"})
    words = [sys.executable, "-c", WITHOUT, missing, "trace", "--plan", str(plan)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert command in result.stderr
    assert "Traceback" not in result.stderr


def test_a_recipe_is_not_traced_as_it_stands() -> None:
    result = run("--recipe", "cookbook-full", "--trace")
    assert result.returncode == 2
    assert "--save-plan" in result.stderr


STOPPED = """
import sys, time
import advisor.traced
def trace_plan(*_, **__):
    print("tracing", file=sys.stderr, flush=True)
    time.sleep(60)
advisor.traced.trace_plan = trace_plan
from advisor.cli import main
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_a_stopped_trace_leaves_no_file(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, {"model_type": "phi3"})
    before = set(tmp_path.iterdir())
    words = [sys.executable, "-c", STOPPED, "trace", "--plan", str(plan), "--timeline", str(tmp_path / "run.html")]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "tracing\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Stopped." in said
    assert set(tmp_path.iterdir()) == before


def test_a_script_of_others_runs_the_allocator_as_torch_sets_it_up(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, {"model_type": "phi3", "num_key_value_heads": 4})
    ours, theirs = (
        json.loads(run("trace", "--plan", plan, "--json", "--allocator", which).stdout)
        for which in ("training", "torch")
    )
    assert theirs["allocator"] == {"expandable_segments": False, "empties_cache": False}
    assert ours["allocator"] == {"expandable_segments": sys.platform != "win32", "empties_cache": True}
    memory = theirs["memory"]
    assert memory["reserved_bytes"] == memory["reserved_default_bytes"] == ours["memory"]["reserved_default_bytes"]
    assert memory["allocated_bytes"] == memory["allocated_default_bytes"]
