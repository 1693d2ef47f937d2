"""A merge is PEFT's merge_and_unload in little RAM: the same values, complete or absent, or refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from advisor.errors import EnvironmentLacksError, InputError, RunFailedError, UnsupportedError
from advisor.training import merge as merging
from advisor.training.checkpoints import rotate, write_checkpoint
from advisor.training.merge import merge_adapter, prepare_merge

Change = Callable[[dict[str, Any]], None]


def make_adapter(base: Path, run: Path, **fields: Any) -> Path:
    """An adapter of random matrices over `base`, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    settings = {"r": 8, "lora_alpha": 24, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(run, save_embedding_layers=False)
    return run


@pytest.fixture(scope="module")
def run(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an adapter; read only."""
    return make_adapter(small_model, tmp_path_factory.mktemp("run") / "lora")


@pytest.fixture
def changed_run(run: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A copy of the run whose adapter_config.json is changed."""

    def make(change: Change) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(run, copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        change(config)
        (copy / "adapter_config.json").write_text(json.dumps(config))
        return copy

    return make


def merged_by_peft(base: Path, run: Path, dtype: Any = "auto") -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, run).merge_and_unload()


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids).logits.float()
    return result


def assert_as_peft(out: Path, base: Path, run: Path) -> None:
    """Weights within one rounding: the product's sums may be made in another order, and fall on the other side."""
    expected, found = merged_by_peft(base, run).state_dict(), load(out).state_dict()
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype, name
        eps = torch.finfo(weight.dtype).eps
        assert torch.allclose(found[name].float(), weight.float(), rtol=eps, atol=1e-7), name
    # Eight roundings of bfloat16 at the size of these logits; the update itself moves them by far more.
    expected_logits = logits(merged_by_peft(base, run))
    assert torch.allclose(logits(load(out)), expected_logits, atol=8 * 2**-8 * expected_logits.abs().max().item())
    assert (expected_logits - logits(load(base))).abs().max() > 0.1 * expected_logits.abs().max()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 4, "lora_alpha": 4},
        {"use_rslora": True},
        {"target_modules": ["o_proj", "down_proj"]},
        {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 40}},
    ],
    ids=["alpha 3 × rank", "alpha = rank", "rslora", "two modules", "patterns"],
)
def test_a_merge_is_what_peft_makes_of_it(fields: dict[str, Any], small_model: Path, tmp_path: Path) -> None:
    run = make_adapter(small_model, tmp_path / "run", **fields)
    merge_adapter(prepare_merge(str(run), str(tmp_path / "out")))
    assert_as_peft(tmp_path / "out", small_model, run)


def test_grouped_heads_merge_as_peft_merges_them(small_grouped_model: Path, tmp_path: Path) -> None:
    run = make_adapter(small_grouped_model, tmp_path / "run")
    merge_adapter(prepare_merge(str(run), str(tmp_path / "out")))
    assert_as_peft(tmp_path / "out", small_grouped_model, run)


def test_a_qlora_adapter_is_merged_into_the_16_bit_base(small_model: Path, tmp_path: Path) -> None:
    """Trained over 4-bit weights: what is merged into are the base model's own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(2)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.bfloat16, quantization_config=quantization)
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "run", save_embedding_layers=False)
    merge_adapter(prepare_merge(str(tmp_path / "run"), str(tmp_path / "out")))
    assert_as_peft(tmp_path / "out", small_model, tmp_path / "run")


def test_small_blocks_change_nothing(
    run: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block of five rows: the last one is not whole, and every tensor has many."""
    monkeypatch.setattr(merging, "BLOCK_ELEMENTS", 5 * 64)
    merge_adapter(prepare_merge(str(run), str(tmp_path / "out")))
    assert_as_peft(tmp_path / "out", small_model, run)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_merged_model_has_the_dtype_that_is_asked_for(dtype: Any, run: Path, tmp_path: Path) -> None:
    merge_adapter(prepare_merge(str(run), str(tmp_path / "out"), dtype=dtype))
    model = load(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_the_sum_is_rounded_once(run: Path, small_model: Path, tmp_path: Path) -> None:
    """In fp32 the merged weight is the base's plus the whole update, not the update rounded to bfloat16 before."""
    from safetensors.torch import load_file

    merge_adapter(prepare_merge(str(run), str(tmp_path / "out"), dtype="float32"))
    name = "model.layers.0.mlp.down_proj"
    adapter, base = load_file(run / "adapter_model.safetensors"), load_file(small_model / "model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert torch.allclose(merged, base[f"{name}.weight"].float() + 3.0 * (b @ a), rtol=1e-5, atol=1e-6)


def test_a_sharded_base_makes_a_sharded_model_with_its_index(run: Path, small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(small_model, dtype="auto").save_pretrained(sharded, max_shard_size="2MB")
    merged = merge_adapter(prepare_merge(str(run), str(tmp_path / "out"), base=str(sharded)))
    shards = [name for name in merged.files if name.startswith("model-")]
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert_as_peft(tmp_path / "out", small_model, run)


def test_the_folder_is_a_whole_model_and_leaves_nothing_beside_it(run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    merged = merge_adapter(prepare_merge(str(run), str(tmp_path / "out")))
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert set(merged.files) == set(os.listdir(tmp_path / "out"))
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert set(merged.files) >= wanted | {"tokenizer_config.json", "README.md"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    made = load(tmp_path / "out").generate(**inputs, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > inputs["input_ids"].shape[1]
    assert merged.merge.disk_bytes <= (tmp_path / "out" / "model.safetensors").stat().st_size


def test_the_run_s_own_tokenizer_goes_along(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "tokenizer_config.json").write_text('{"trained": true}')
    merge_adapter(prepare_merge(str(copy), str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"trained": True}


def test_without_out_it_is_made_in_the_run_folder(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert prepare_merge(str(copy)).out == str(copy / "merged")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device")])
def test_a_merge_that_stops_leaves_nothing(error: BaseException, run: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    merge = prepare_merge(str(run), str(tmp_path / "out"))
    with pytest.raises(RunFailedError if isinstance(error, OSError) else type(error)):
        merge_adapter(merge, progress=stop)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_merge_left_is_removed_by_the_next(run: Path, tmp_path: Path) -> None:
    gone = 2**22 + 1  # above Linux's largest process id
    (tmp_path / f".out.{gone}.unfinished").mkdir()
    living = tmp_path / f".out.{os.getppid()}.unfinished"
    living.mkdir()
    merge_adapter(prepare_merge(str(run), str(tmp_path / "out")))
    assert sorted(os.listdir(tmp_path)) == [living.name, "out"], "another merge that still runs keeps its folder"


def test_a_folder_that_is_taken_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge_adapter(prepare_merge(str(run), str(tmp_path / "out")))
    before = sorted(os.listdir(tmp_path / "out"))
    with pytest.raises(InputError, match="exists already"):
        prepare_merge(str(run), str(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path / "out")) == before


def test_a_full_fine_tuning_has_nothing_to_merge(small_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to merge") as caught:
        prepare_merge(str(small_model), str(tmp_path / "out"))
    assert "AutoModelForCausalLM" in caught.value.hint


def test_an_unfinished_run_offers_its_last_whole_checkpoint(run: Path, tmp_path: Path) -> None:
    for step in (9, 10, 11):
        write_checkpoint(tmp_path / "checkpoints", step, partial(shutil.copytree, run, dirs_exist_ok=True))
    (tmp_path / "checkpoints" / "checkpoint-11" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no adapter") as caught:
        prepare_merge(str(tmp_path))
    assert "checkpoint-10 " in caught.value.hint
    assert prepare_merge(str(tmp_path / "checkpoints" / "checkpoint-10"), str(tmp_path / "out")).modules


def test_a_merged_checkpoint_does_not_lie_in_a_folder_that_rotation_removes(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoint = write_checkpoint(folder, 10, partial(shutil.copytree, run, dirs_exist_ok=True))
    merged = merge_adapter(prepare_merge(str(checkpoint.path)))
    assert merged.merge.out == str(tmp_path / "merged-checkpoint-10")
    write_checkpoint(folder, 20, partial(shutil.copytree, run, dirs_exist_ok=True))
    rotate(folder, 1)
    assert load(tmp_path / "merged-checkpoint-10") is not None


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_run_that_is_no_folder_is_an_input_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="There is no folder"):
        prepare_merge(str(tmp_path / name))


def test_a_base_that_has_moved_is_named_with_base(
    changed_run: Callable[[Change], Path], small_model: Path, tmp_path: Path
) -> None:
    gone = changed_run(lambda config: config.update(base_model_name_or_path="/nowhere/phi-3"))
    with pytest.raises(InputError, match="/nowhere/phi-3") as caught:
        prepare_merge(str(gone), str(tmp_path / "out"))
    assert "--base" in caught.value.hint
    merge_adapter(prepare_merge(str(gone), str(tmp_path / "out"), base=str(small_model)))
    assert load(tmp_path / "out") is not None


def test_a_hub_model_that_is_neither_cached_nor_reachable_says_so(
    changed_run: Callable[[Change], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("no such host")))
    monkeypatch.setattr("urllib.request.getproxies", dict)
    away = changed_run(lambda config: config.update(base_model_name_or_path="owner/nobody-has-this"))
    with pytest.raises(EnvironmentLacksError, match="owner/nobody-has-this"):
        prepare_merge(str(away), str(tmp_path / "out"))


def test_another_model_s_shapes_are_refused(run: Path, small_grouped_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not suit") as caught:
        prepare_merge(str(run), str(tmp_path / "out"), base=str(small_grouped_model))
    assert "qkv_proj" in str(caught.value)
    assert "(192, 64)" in caught.value.why
    assert "(128, 64)" in caught.value.why


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, of the same trouble
def test_an_adapter_of_a_head_that_is_the_embedding_is_not_called_another_model_s(tmp_path: Path) -> None:
    from small_model import small_config
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = {**small_config(), "tie_word_embeddings": True}
    del config["model_type"]
    AutoModelForCausalLM.from_config(Qwen2Config(**config)).save_pretrained(tmp_path / "base")
    run = make_adapter(tmp_path / "base", tmp_path / "run", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedError, match="shares with its embedding"):
        prepare_merge(str(run))
    run = make_adapter(tmp_path / "base", tmp_path / "all")
    merge_adapter(prepare_merge(str(run), str(tmp_path / "out")))
    assert_as_peft(tmp_path / "out", tmp_path / "base", run)


def test_modules_that_the_base_lacks_are_refused(run: Path, tmp_path: Path) -> None:
    from small_model import make_small_model

    short = make_small_model(tmp_path / "short", layers=1)
    with pytest.raises(InputError, match=r"layers\.1\."):
        prepare_merge(str(run), str(tmp_path / "out"), base=str(short))


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"peft_type": "IA3"},
        {"fan_in_fan_out": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"something_new": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_more_than_low_rank_matrices_is_refused(
    change: dict[str, Any], changed_run: Callable[[Change], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        prepare_merge(str(changed_run(lambda config: config.update(change))), str(tmp_path / "out"))
    assert "merge_and_unload" in caught.value.hint


def test_a_quantised_base_is_refused(run: Path, small_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(small_model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UnsupportedError, match="quantised"):
        prepare_merge(str(run), str(tmp_path / "out"), base=str(copy))


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "no length", "no header", "one byte short"])
def test_a_base_that_is_cut_off_is_refused_before_anything_is_written(
    keep: int, run: Path, small_model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(small_model, copy)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        prepare_merge(str(run), str(tmp_path / "out"), base=str(copy))
    assert not (tmp_path / "out").exists()


def test_a_base_without_safetensors_is_refused(run: Path, small_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "base"
    shutil.copytree(small_model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    (copy / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(InputError, match=r"lacks model\.safetensors"):
        prepare_merge(str(run), str(tmp_path / "out"), base=str(copy))


def test_an_adapter_with_values_that_are_not_finite_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = float("nan")
    save_file(tensors, copy / "adapter_model.safetensors")
    with pytest.raises(RunFailedError, match="not finite"):
        merge_adapter(prepare_merge(str(copy), str(tmp_path / "out")))
    assert os.listdir(tmp_path) == ["run"]


def test_a_weight_that_float16_cannot_hold_says_which(run: Path, small_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "base"
    shutil.copytree(small_model, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e5
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFailedError, match="lm_head") as caught:
        merge_adapter(prepare_merge(str(run), str(tmp_path / "out"), base=str(copy), dtype="float16"))
    assert "bfloat16" in caught.value.hint


@pytest.mark.parametrize("what", ["ram_available_bytes", "disk_free_bytes"])
def test_too_little_room_is_said_before_anything_is_written(
    what: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from advisor import hardware

    plenty = hardware.Host(ram_bytes=2**40, ram_available_bytes=2**40, disk_free_bytes=2**40, cpu_count=1)
    monkeypatch.setattr(hardware, "host", lambda _: replace(plenty, **{what: 1000}))
    with pytest.raises(EnvironmentLacksError, match=r"1000 B|0\.00 GiB"):
        prepare_merge(str(run), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
