"""Exports: every field of a plan is accounted for, and each tool's own schema or parser takes what is written."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner, Result
from export.plans import PLANS

from advisor.cli import cli
from advisor.errors import InputError
from advisor.export import TOOLS, Tool, export_plan, field_names, fit_as_run
from advisor.hardware import what_if
from advisor.plan import LoraSettings, Plan
from advisor.profiles import load_gpu, load_model, load_plan, save_plan_file
from advisor.report.yaml import config_text

SCHEMAS = Path(__file__).parent / "schemas"

every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
every_tool = pytest.mark.parametrize("tool", TOOLS)


def settings(plan: Plan, tool: Tool) -> dict[str, Any]:
    written: dict[str, Any] = yaml.safe_load(config_text(export_plan(plan, tool)))
    return written


@every_tool
@every_plan
def test_every_field_of_a_plan_is_written_or_said(tool: Tool, plan: Plan) -> None:
    assert set(field_names(plan)) - export_plan(plan, tool).fields == set()


@every_tool
@every_plan
def test_what_is_read_back_is_what_was_meant(tool: Tool, plan: Plan) -> None:
    export = export_plan(plan, tool)
    assert yaml.safe_load(config_text(export)) == {setting.name: setting.value for setting in export.settings}


@every_tool
def test_it_opens_with_the_command_that_runs_it(tool: Tool) -> None:
    first = config_text(export_plan(PLANS["lora"], tool, file="my.yaml")).splitlines()[0]
    assert first.startswith("# ")
    assert "my.yaml" in shlex.split(first.removeprefix("# "))


# SFTConfig's own default takes transformers' older name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@every_plan
def test_trl_parses_it_as_it_parses_its_own(plan: Plan, tmp_path: Path) -> None:
    from trl.scripts.sft import make_parser

    path = tmp_path / "trl.yaml"
    path.write_text(config_text(export_plan(plan, "trl")), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        # The GPU that the plan is for has bfloat16; this machine may have none.
        patch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        script, training, model, data = make_parser().parse_args_and_config(["--config", str(path)])
    assert training.per_device_train_batch_size == plan.micro_batch
    assert training.gradient_accumulation_steps == plan.gradient_accumulation
    assert training.max_length == plan.seq_len
    assert training.optim.value == plan.optimizer
    assert (training.bf16, training.fp16) == (plan.autocast == "bfloat16", plan.autocast == "float16")
    assert training.gradient_checkpointing == plan.gradient_checkpointing
    assert training.warmup_steps == plan.training.warmup
    assert model.dtype == plan.dtype
    assert model.use_peft == (plan.lora is not None)
    assert model.load_in_4bit == (plan.quantization is not None)
    assert [dataset.data_files for dataset in data.datasets] == ["train.jsonl"]
    assert script.dataset_name is None


@pytest.mark.parametrize("targets", ["lora on one module", "lora on two modules", "lora by pattern"])
def test_trl_adapts_the_modules_that_the_plan_names(targets: str) -> None:
    """TRL makes a plain text of a list of one, and PEFT a pattern of a plain text."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from trl import ModelConfig

    plan = PLANS[targets]
    assert plan.lora is not None
    written = settings(plan, "trl")
    config = ModelConfig(use_peft=True, lora_target_modules=written["lora_target_modules"])
    adapters = LoraConfig(target_modules=config.lora_target_modules)
    modules = [f"model.layers.0.{name}" for name in ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.down_proj")]
    adapted = {name.rpartition(".")[2] for name in modules if check_target_module_exists(adapters, name)}
    named = plan.lora.target_modules
    assert adapted == ({"qkv_proj"} if isinstance(named, str) else set(named))


@every_plan
def test_accelerate_loads_it(plan: Plan, tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = tmp_path / "accelerate.yaml"
    path.write_text(config_text(export_plan(plan, "accelerate")), encoding="utf-8")
    config = load_config_from_file(str(path))
    assert config.mixed_precision == {"none": "no", "bfloat16": "bf16", "float16": "fp16"}[plan.autocast]
    assert config.num_processes == 1
    assert bool(config.dynamo_config) == plan.training.compile


@pytest.mark.parametrize("tool", ["axolotl", "llama-factory"])
@every_plan
def test_the_tools_own_schema_takes_it(tool: Tool, plan: Plan) -> None:
    """The schema as its package gave it; tests/benchmarks/export_schemas.py runs the packages' own parsers."""
    schema = json.loads((SCHEMAS / f"{tool}.json").read_text(encoding="utf-8"))
    assert export_plan(plan, tool).checked_against.split()[1] in schema["$comment"]
    jsonschema.validate(settings(plan, tool), schema)


@pytest.mark.parametrize("tool", ["axolotl", "llama-factory"])
def test_a_setting_that_the_tool_does_not_have_is_noticed(tool: str) -> None:
    schema = json.loads((SCHEMAS / f"{tool}.json").read_text(encoding="utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"base_model": "m", "learning_rate": 1e-5, "no_such_setting": 1}, schema)


def test_a_small_rate_is_a_number_to_yaml() -> None:
    assert settings(PLANS["every hyperparameter"], "trl")["learning_rate"] == 2e-5


@pytest.mark.parametrize(
    ("name", "tool", "field"),
    [
        ("lora", "llama-factory", "loss"),
        ("lora", "axolotl", "loss"),
        ("full in bfloat16", "trl", "loss"),
        ("qlora in fp16", "trl", "lora"),
        ("full, stepped in backward", "trl", "optimizer_in_backward"),
        ("full in fp32 under fp16", "axolotl", "dtype"),
        ("qlora, upcast", "llama-factory", "upcast_frozen"),
        ("lora in fp16 without autocast", "axolotl", "hold_outputs"),
        ("lora, packed", "trl", "packing"),
        ("lora", "accelerate", "lora.rank"),
    ],
)
def test_what_a_tool_cannot_be_told_is_said_in_the_file(name: str, tool: Tool, field: str) -> None:
    export = export_plan(PLANS[name], tool)
    assert field in [told.field for told in export.lost]
    head = config_text(export).partition("\n\n")[0]
    assert re.search(rf"^#.*\b{re.escape(field)}\b", head, re.MULTILINE)


@pytest.mark.parametrize(
    ("model", "pattern", "written", "lost"),
    [
        ("phi-3-mini-4k", r".*\.(qkv|o)_proj", "o_proj,qkv_proj", False),
        ("phi-3-mini-4k", r"model\.layers\.0\..*\.o_proj", r"model\.layers\.0\..*\.o_proj", True),
        ("acme/model-7b", r".*\.o_proj", r".*\.o_proj", True),
    ],
)
def test_llama_factory_gets_names_for_a_pattern(model: str, pattern: str, written: str, lost: bool) -> None:
    """It splits the text at its commas, and PEFT takes each part of a list for a name."""
    plan = replace(PLANS["lora"], model=model, lora=LoraSettings(target_modules=pattern))
    export = export_plan(plan, "llama-factory")
    assert settings(plan, "llama-factory")["lora_target"] == written
    assert ("lora.target_modules" in [told.field for told in export.lost]) is lost


def test_trl_collates_a_packed_micro_batch_into_one_row() -> None:
    """So what runs is one row of all its tokens, and sdpa's block mask grows with their square."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    plan = PLANS["lora, packed"]
    examples = [{"input_ids": [1] * plan.seq_len, "seq_lengths": [plan.seq_len]} for _ in range(plan.micro_batch)]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples)
    ran = export_plan(plan, "trl").as_run
    assert ran is not None
    assert tuple(batch["input_ids"].shape) == (ran.micro_batch, ran.seq_len)
    flash = replace(plan, attention="flash_attention_2")
    assert "packing" not in [told.field for told in export_plan(flash, "trl").lost]


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, ["export", *words])


def test_a_plan_file_is_exported(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    save_plan_file(PLANS["qlora"], str(path))
    out = tmp_path / "my config.yaml"
    result = run("--to", "trl", "--plan", str(path), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert out.read_text(encoding="utf-8") == config_text(
        export_plan(load_plan(str(path)), "trl", file=shlex.quote(str(out)))
    )
    assert "bfloat16, not fp32" in " ".join(result.stderr.split())


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine", encoding="utf-8")
    result = run("--to", "trl", "--gpu", "t4", "--out", str(out))
    assert isinstance(result.exception, InputError)
    assert out.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("tool", ["trl", "axolotl", "llama-factory"])
@pytest.mark.parametrize("gpu", ["t4", "rtx-4090", "a100-80gb"])
def test_the_exported_recommendation_fits_as_the_tool_runs_it(tool: Tool, gpu: str) -> None:
    result = run("--to", tool, "--gpu", gpu)
    assert result.exit_code == 0, result.output
    written = yaml.safe_load(result.stdout)
    sizes = ("micro_batch_size" if tool == "axolotl" else "per_device_train_batch_size", "gradient_accumulation_steps")
    micro_batch, accumulation = (written[name] for name in sizes)
    from advisor.advise import advise

    target = what_if(load_gpu(gpu))
    plan = advise(load_model("phi-3-mini-4k"), target).choice.plan
    plan = replace(plan, micro_batch=micro_batch, gradient_accumulation=accumulation)
    fit = fit_as_run(export_plan(plan, tool), load_model(plan.model).architecture, target)
    assert fit is not None
    assert fit.fits
    assert micro_batch * accumulation == 16


def test_a_plan_file_is_not_changed_to_fit_but_said_not_to(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    save_plan_file(replace(PLANS["lora"], micro_batch=16, gradient_accumulation=1, seq_len=4096), str(path))
    result = run("--to", "llama-factory", "--plan", str(path))
    assert yaml.safe_load(result.stdout)["per_device_train_batch_size"] == 16
    assert "GiB short on" in " ".join(result.stderr.split())


def test_a_plan_and_a_gpu_contradict_each_other() -> None:
    assert isinstance(run("--to", "trl", "--plan", "plan.toml", "--gpu", "t4").exception, InputError)


def test_nothing_is_exported_where_nothing_fits() -> None:
    result = run("--to", "trl", "--vram", "1GiB")
    assert isinstance(result.exception, InputError)
    assert result.stdout == ""
