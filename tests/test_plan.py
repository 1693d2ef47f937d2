"""What a plan may say, and what it says when it may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.errors import InputError, PlanError
from advisor.plan import LoraSettings, Plan, Quantization, plan_from_fields, plan_to_fields
from advisor.profiles import default_plan, load_plan, save_plan_file, without_bfloat16

LORA: dict[str, Any] = {"model": "phi-3-mini-4k", "method": "lora", "lora": {"rank": 8}}
QLORA: dict[str, Any] = {**LORA, "method": "qlora", "quantization": {"bits": 4}}
FULL: dict[str, Any] = {"model": "phi-3-mini-4k", "method": "full"}


def named(value: object) -> str:
    """A short id of a parameter; pytest cannot spell every one of these."""
    return value[:20] if isinstance(value, str) else type(value).__name__


def refused(fields: dict[str, Any]) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan_from_fields(fields)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("model", "  "),
        ("model", 3),
        ("model", None),
        ("model", "a\0b"),
        ("model", "x" * 5000),
        ("method", "dora"),
        ("method", ["lora"]),
        ("dtype", "bf16"),
        ("dtype", None),
        ("autocast", False),
        ("optimizer", "sgd"),
        ("padding", True),
        ("attention", "flash"),
        ("loss", {}),
        ("micro_batch", 0),
        ("micro_batch", -1),
        ("micro_batch", 1.0),
        ("micro_batch", "2"),
        ("micro_batch", True),
        ("micro_batch", 10**5000),
        ("gradient_accumulation", 2**21),
        ("seq_len", float("nan")),
        ("seq_len", 2**30),
        ("gradient_checkpointing", 1),
        ("gradient_checkpointing", "true"),
        ("hold_outputs", None),
        ("upcast_frozen", 0),
        ("gpu", 4090),
        ("gpu", ""),
        ("quantization", 4),
        ("quantization", [4]),
        ("quantization", "nf4"),
        ("lora", 16),
        ("lora", []),
    ],
    ids=named,
)
def test_a_wrong_value_names_its_field(field: str, value: object) -> None:
    error = refused({**QLORA, field: value})
    assert error.field == field
    assert error.what.startswith(f"{field}: ")
    assert error.hint
    assert len(error.what) < 300


@pytest.mark.parametrize(
    ("table", "field", "value"),
    [
        ("quantization", "bits", 8),
        ("quantization", "bits", "4"),
        ("quantization", "bits", 4.0),
        ("quantization", "bits", 10**5000),
        ("quantization", "type", "int4"),
        ("quantization", "double", "yes"),
        ("lora", "rank", 0),
        ("lora", "rank", -16),
        ("lora", "rank", 1e3),
        ("lora", "alpha", None),
        ("lora", "dropout", 1.0),
        ("lora", "dropout", -0.1),
        ("lora", "dropout", float("nan")),
        ("lora", "dropout", False),
        ("lora", "dropout", "0.1"),
        ("lora", "target_modules", []),
        ("lora", "target_modules", ""),
        ("lora", "target_modules", 5),
        ("lora", "target_modules", None),
        ("lora", "target_modules", {"o_proj": True}),
        ("lora", "target_modules", ["o_proj", 3]),
        ("lora", "target_modules", [["o_proj"]]),
        ("lora", "target_modules", ["o_proj"] * 300),
    ],
    ids=named,
)
def test_a_wrong_value_in_a_table_names_its_field(table: str, field: str, value: object) -> None:
    error = refused({**QLORA, table: {**QLORA[table], field: value}})
    assert error.field == f"{table}.{field}"
    assert error.hint


@pytest.mark.parametrize(
    ("fields", "unknown", "nearest"),
    [
        ({**LORA, "micro_batchs": 2}, "micro_batchs", "micro_batch"),
        ({**LORA, "gradient_checkpoint": True}, "gradient_checkpoint", "gradient_checkpointing"),
        ({**LORA, "lora": {"rnak": 8}}, "lora.rnak", "lora.rank"),
        ({**QLORA, "quantization": {"bit": 4}}, "quantization.bit", "quantization.bits"),
        ({**LORA, "zzzzzzzz": 1}, "zzzzzzzz", "micro_batch"),
        ({**LORA, "x" * 10_000: 1}, "x" * 60, "micro_batch"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest(fields: dict[str, Any], unknown: str, nearest: str) -> None:
    error = refused(fields)
    assert error.field == unknown
    assert nearest in error.hint


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"method": "full"}, "model"),
        ({"model": "phi-4"}, "method"),
        ({"model": "phi-4", "method": "lora"}, "lora"),
        ({**FULL, "lora": {"rank": 8}}, "lora"),
        ({**LORA, "method": "qlora"}, "quantization"),
        ({**LORA, "quantization": {"bits": 4}}, "quantization"),
        ({**LORA, "upcast_frozen": True}, "upcast_frozen"),
        ({**FULL, "upcast_frozen": True}, "upcast_frozen"),
        ({**LORA, "dtype": "float16", "autocast": "bfloat16"}, "autocast"),
        ({**LORA, "dtype": "bfloat16", "autocast": "float16"}, "autocast"),
        ({**FULL, "dtype": "float16"}, "dtype"),
        ({**FULL, "dtype": "float16", "autocast": "float16"}, "dtype"),
        ({**FULL, "dtype": "float32", "attention": "flash_attention_2"}, "attention"),
    ],
)
def test_settings_that_contradict_each_other_name_the_one_to_change(fields: dict[str, Any], field: str) -> None:
    error = refused(fields)
    assert error.field == field
    assert error.hint


def test_tables_of_the_wrong_kind_are_refused_in_code_too() -> None:
    for given in ({"lora": {"rank": 8}}, {"lora": LoraSettings(), "quantization": 4}):
        with pytest.raises(PlanError):
            Plan(model="phi-4", method="lora", **given)
    with pytest.raises(PlanError):
        LoraSettings(target_modules=["o_proj"])  # type: ignore[arg-type]


def test_fp32_weights_under_autocast_may_train_in_full() -> None:
    plan = plan_from_fields({**FULL, "dtype": "float32", "autocast": "float16"})
    assert (plan.dtype, plan.autocast) == ("float32", "float16")


def test_a_batch_is_counted_in_sequences_and_tokens() -> None:
    plan = plan_from_fields({**LORA, "micro_batch": 4, "gradient_accumulation": 3, "seq_len": 100})
    assert (plan.effective_batch, plan.tokens) == (12, 400)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_plan_is_its_fields(method: Any) -> None:
    plan = default_plan(method, model="phi-4")
    assert plan_from_fields(plan_to_fields(plan)) == plan


def test_fields_left_out_come_from_the_base_in_tables_too() -> None:
    base = default_plan("qlora", model="phi-4")
    plan = plan_from_fields({"lora": {"alpha": 64}, "quantization": {"double": False}}, base)
    assert plan.lora == LoraSettings(rank=16, alpha=64)
    assert plan.quantization == Quantization(double=False)
    assert replace(plan, lora=base.lora, quantization=base.quantization) == base


def test_a_plan_file_takes_its_methods_defaults(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('model = "phi-4"\nmethod = "qlora"\nseq_len = 512\nlora = { rank = 4 }\n')
    plan = load_plan(str(path))
    default = default_plan("qlora", model="phi-4")
    assert plan == replace(default, seq_len=512, lora=LoraSettings(rank=4))


def test_fp16_full_finetuning_needs_fp32_weights() -> None:
    plans = {method: without_bfloat16(default_plan(method, model="phi-4")) for method in ("full", "lora", "qlora")}
    assert {method: (plan.dtype, plan.autocast) for method, plan in plans.items()} == {
        "full": ("float32", "float16"),
        "lora": ("float16", "float16"),
        "qlora": ("float16", "float16"),
    }


def test_a_plan_file_that_names_no_dtype_takes_the_gpus(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('model = "phi-4"\nmethod = "lora"\n')
    assert load_plan(str(path), dtype="float16").dtype == "float16"
    on_cpu = load_plan(str(path), dtype="float32")
    assert (on_cpu.dtype, on_cpu.autocast) == ("float32", "none")
    path.write_text('model = "phi-4"\nmethod = "lora"\ndtype = "bfloat16"\n')
    assert load_plan(str(path), dtype="float16").dtype == "bfloat16"


def test_a_plans_config_is_looked_up_beside_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "plan.toml"
    path.write_text('model = "config.json"\nmethod = "full"\n')
    assert load_plan(str(path)).model == str(tmp_path / "config.json")


def test_a_profiles_name_is_the_profile_whatever_lies_beside_the_plan(tmp_path: Path) -> None:
    (tmp_path / "phi-4").mkdir()
    path = tmp_path / "plan.toml"
    path.write_text('model = "phi-4"\nmethod = "full"\n')
    assert load_plan(str(path)).model == "phi-4"


def test_an_empty_model_is_not_the_plans_folder(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text('model = ""\nmethod = "full"\n')
    with pytest.raises(PlanError) as caught:
        load_plan(str(path))
    assert caught.value.field == "model"


@pytest.mark.parametrize(
    "content",
    [
        b"model = ",
        b'model = "phi-4"\nmodel = "phi-3"',
        b"\xff\xfe\x00binary",
        b'a = "' + b"x" * (4 * 2**20),
        b"a = " + b"[" * 5000,
        b"a = " + b"{a = " * 5000,
        b"a" + b".a" * 200_000 + b" = 1",
        b"a = " + b"9" * 5000,
    ],
    ids=["cut off", "twice", "binary", "huge", "nested lists", "nested tables", "deep key", "long number"],
)
def test_a_file_that_is_no_plan_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_plan(str(path))
    assert str(path) in caught.value.what
    assert caught.value.why
    assert caught.value.hint


@pytest.mark.parametrize("name", ["missing.toml", "", "\0"])
def test_a_plan_that_cannot_be_read_says_why(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_plan(str(tmp_path / name))
    assert "cannot be read" in caught.value.what
    assert caught.value.why


def test_a_saved_plan_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("mine")
    with pytest.raises(InputError) as caught:
        save_plan_file(default_plan("full", model="phi-4"), str(path))
    assert caught.value.hint
    assert path.read_text() == "mine"


def test_a_plan_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    with pytest.raises(InputError) as caught:
        save_plan_file(default_plan("full", model="not-utf-8-\udcff"), str(path))
    assert "cannot be written" in caught.value.what
    assert not path.exists()
    with pytest.raises(InputError):
        save_plan_file(default_plan("full", model="phi-4"), str(tmp_path / "no such folder" / "plan.toml"))


def test_optimizer_in_backward_needs_every_gradient_to_be_final() -> None:
    plan_from_fields(FULL_BFLOAT16 | {"optimizer_in_backward": True})
    for field, value in [("gradient_accumulation", 2), ("autocast", "float16")]:
        with pytest.raises(PlanError, match="optimizer_in_backward"):
            plan_from_fields(FULL_BFLOAT16 | {"dtype": "float32", "optimizer_in_backward": True, field: value})
    with pytest.raises(PlanError, match="only full fine-tuning"):
        plan_from_fields({"model": "m", "method": "lora", "lora": {}, "optimizer_in_backward": True})


def test_packed_rows_are_not_padded() -> None:
    with pytest.raises(PlanError, match="packing"):
        plan_from_fields(FULL_BFLOAT16 | {"packing": True, "padding": "longest"})


def test_hyperparameters_are_a_table_of_the_plan() -> None:
    plan = plan_from_fields(FULL_BFLOAT16 | {"training": {"epochs": 3, "learning_rate": 1e-5}})
    assert (plan.training.epochs, plan.training.learning_rate, plan.training.seed) == (3, 1e-5, 42)
    assert plan_from_fields(plan_to_fields(plan)) == plan


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("schedule", "exponential"),
        ("warmup", 1.5),
        ("epochs", 0),
        ("max_steps", 0),
        ("validation", 0.9),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", True),
        ("compile", "yes"),
    ],
)
def test_a_bad_hyperparameter_is_named(field: str, value: object) -> None:
    with pytest.raises(PlanError, match=f"training.{field}"):
        plan_from_fields(FULL_BFLOAT16 | {"training": {field: value}})
    plan_from_fields(FULL_BFLOAT16 | {"training": {"seed": 0}})


FULL_BFLOAT16 = {"model": "m", "method": "full", "dtype": "bfloat16"}
