"""The trainer: what it trains, that it goes on exactly where it stopped, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import as_killed_at, losses, make_job, run_here, write_rows
from transformers import AutoModelForCausalLM, MixtralConfig

from advisor.errors import InputError, PlanError
from advisor.training import artefacts, trainer
from advisor.training.build import load_model
from advisor.training.checkpoints import complete_checkpoints
from advisor.training.job import Job
from advisor.training.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings(
    "ignore:Paged optimizers are not supported on CPU",
    "ignore:.*torch.jit.script.* is deprecated:DeprecationWarning",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 15)


RESUMED: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "full-in-backward": {"method": "full", "optimizer_in_backward": True, "gradient_accumulation": 1},
    "full-8bit": {"method": "full", "optimizer": "adamw_8bit"},
    "full-paged-in-backward": {
        "method": "full",
        "optimizer_in_backward": True,
        "gradient_accumulation": 1,
        "optimizer": "paged_adamw_8bit",
    },
    "lora": {"method": "lora"},
    "lora-autocast": {"method": "lora", "autocast": "bfloat16", "packing": True},
    "qlora": {"method": "qlora"},
    "qlora-paged": {"method": "qlora", "optimizer": "paged_adamw_32bit", "loss": "chunked"},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_has_bitwise_the_losses_of_one_that_was_not_stopped(
    case: str, small_model: Path, rows: Path, tmp_path: Path
) -> None:
    fields = {"training": {"epochs": 2.0}, "job": {"save_steps": 1, "keep_checkpoints": 99}, **RESUMED[case]}
    job = make_job(tmp_path / "whole", small_model, rows, **fields)
    run_here(job)
    expected = losses(job.out)
    steps = [one.step for one in complete_checkpoints(Path(job.out) / "checkpoints")]
    assert steps == list(range(1, len(expected) + 1))
    per_epoch = len(steps) // 2
    # In the middle of either epoch, and between the two.
    for step in (1, per_epoch, per_epoch + 2) if case in ("full", "lora", "qlora") else (per_epoch + 1,):
        out = tmp_path / f"from-{step}"
        run_here(as_killed_at(job, step, out))
        assert losses(out) == expected, step


def test_a_model_in_several_files_goes_on_bitwise(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (trainer, artefacts):
        monkeypatch.setattr(module, "SHARD_BYTES", 10**6)
    job = make_job(tmp_path / "whole", small_model, rows, "full", job={"save_steps": 1, "keep_checkpoints": 99})
    run_here(job)
    run_here(as_killed_at(job, 2, tmp_path / "from-2"))
    assert losses(tmp_path / "from-2") == losses(job.out)
    assert len(list((tmp_path / "whole" / "checkpoints" / "checkpoint-2").glob("model-*.safetensors"))) > 2
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole")


def test_experts_go_on_too(small_model: Path, rows: Path, tmp_path: Path) -> None:
    """Saved for others each expert has a name of its own, and here all of a layer are one tensor."""
    model = tmp_path / "model"
    shutil.copytree(small_model, model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32_064}
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads), dtype=torch.bfloat16).save_pretrained(model)
    job = make_job(tmp_path / "whole", model, rows, "full", job={"save_steps": 1, "keep_checkpoints": 99})
    run_here(job)
    run_here(as_killed_at(job, 2, tmp_path / "from-2"))
    assert losses(tmp_path / "from-2") == losses(job.out)
    assert any(".experts.1." in name for name in load_file(tmp_path / "whole" / "model.safetensors"))


def test_what_is_loaded_is_what_was_saved_and_is_counted(small_model: Path, method: str) -> None:
    fields = {"method": method, "dtype": "bfloat16"} | ({} if method == "full" else {"lora": {"rank": 8}})
    job = make_job(Path("unused"), small_model, Path("unused"), **fields)
    built = load_model(job.plan, str(small_model), "cpu")
    saved = load_file(small_model / "model.safetensors")
    assert built.total_parameters == sum(tensor.numel() for tensor in saved.values())
    assert torch.equal(built.causal_lm.lm_head.weight, saved["lm_head.weight"])
    assert built.model.training
    kinds = {p.dtype for name, p in built.model.named_parameters() if p.requires_grad}
    assert kinds == {torch.bfloat16 if method == "full" else torch.float32}
    if method == "qlora":
        from bitsandbytes.nn import Linear4bit

        quantised = [module for module in built.causal_lm.modules() if isinstance(module, Linear4bit)]
        assert len(quantised) == 8
        assert {module.compute_dtype for module in quantised} == {torch.bfloat16}


def test_weights_that_are_not_in_safetensors_are_refused(small_model: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((small_model / "config.json").read_bytes())
    job = make_job(tmp_path, tmp_path, tmp_path)
    with pytest.raises(InputError) as caught:
        load_model(job.plan, str(tmp_path), "cpu")
    assert "safetensors" in caught.value.hint


def test_an_evaluation_leaves_4_bit_weights_trainable(small_model: Path, rows: Path, tmp_path: Path) -> None:
    # On processors with AVX-512 BF16 bitsandbytes would pack the weights for inference, and gradients would stop.
    job = make_job(tmp_path, small_model, rows, "qlora", training={"epochs": 3.0})
    run_here(job)
    norms = [line["gradient_norm"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    evaluations = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "evaluation_loss" in line]
    assert len(evaluations) == 3
    assert min(norms[len(norms) // 3 :]) > 0.1 * norms[0]


def test_metrics_have_a_line_for_each_step_and_none_of_memory_on_the_cpu(
    small_model: Path, rows: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path, small_model, rows, training={"max_steps": 3})
    facts = run_here(job)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0].keys() == {
        *("step", "epoch", "loss", "learning_rate", "gradient_norm", "tokens_per_second"),
        *("allocated_bytes", "reserved_bytes", "seconds"),
    }
    assert lines[0]["allocated_bytes"] is None
    assert facts["first_loss"] == lines[0]["loss"]
    assert facts["final_loss"] == lines[-1]["loss"]
    assert facts["tokens"] < 3 * job.plan.tokens * job.plan.gradient_accumulation


def test_no_pickle_of_arguments_and_no_environment_in_what_is_written(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setenv("WANDB_API_KEY", "anothersecret")
    run_here(make_job(tmp_path, small_model, rows, training={"max_steps": 1}))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if path.name == "training_args.bin"]
    for path in written:
        content = path.read_bytes()
        assert b"secretsecret" not in content, path
        assert b"anothersecret" not in content, path


def test_checkpoints_are_rotated(small_model: Path, rows: Path, tmp_path: Path) -> None:
    run_here(make_job(tmp_path, small_model, rows, job={"save_steps": 1, "keep_checkpoints": 2}))
    kept = complete_checkpoints(tmp_path / "checkpoints")
    assert len(kept) == 2
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"checkpoint-{one.step}" for one in kept
    ]


def test_a_run_of_other_data_or_settings_does_not_go_on(small_model: Path, rows: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", small_model, rows, training={"max_steps": 2})
    run_here(job)
    with pytest.raises(InputError, match="checkpoints of an earlier run"):
        run_here(job)
    other = make_job(tmp_path / "run", small_model, rows, micro_batch=1, training={"max_steps": 2})
    with pytest.raises(InputError, match="micro_batch"):
        run_here(replace(other, resume=True))
    more = write_rows(tmp_path / "more.jsonl", 30)
    with pytest.raises(InputError, match="data"):
        run_here(replace(job, data=str(more), resume=True))


def test_a_longer_run_goes_on_from_a_shorter_one(small_model: Path, rows: Path, tmp_path: Path) -> None:
    fields = {"training": {"max_steps": 2, "schedule": "constant"}}
    run_here(make_job(tmp_path, small_model, rows, **fields))
    longer = make_job(tmp_path, small_model, rows, training={"max_steps": 4, "schedule": "constant"})
    facts = run_here(replace(longer, resume=True))
    assert facts["step"] == 4
    assert [step for step, _, _ in losses(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_longer_run_goes_on_by_the_schedule_of_its_new_length_and_says_so(
    schedule: str, small_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(out: str, steps: int) -> Job:
        return make_job(tmp_path / out, small_model, rows, training={"max_steps": steps, "schedule": schedule})

    run_here(job("whole", 6))
    run_here(job("longer", 3))
    assert losses(tmp_path / "longer")[-1][2] < losses(tmp_path / "whole")[2][2]
    assert "learning rate goes on" not in capsys.readouterr().out
    run_here(replace(job("longer", 6), resume=True))
    rates, expected = ([rate for _, _, rate in losses(tmp_path / out)] for out in ("longer", "whole"))
    assert rates[3:] == expected[3:]
    said = " ".join(capsys.readouterr().out.split())
    assert f"With 6 steps in all the learning rate goes on at {expected[3]:.2e}" in said
    assert "it would be 0.00e+00" in said


def test_resuming_where_nothing_was_saved_begins(small_model: Path, rows: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, small_model, rows, training={"max_steps": 2}, job={"resume": True})
    assert run_here(job)["step"] == 2


def test_a_batch_without_a_token_that_carries_loss_is_refused(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from advisor.training import session

    class Masked(session.Collator):  # type: ignore[misc]
        def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
            batch = super().__call__(rows)
            batch["labels"].fill_(-100)
            return batch

    monkeypatch.setattr(session, "Collator", Masked)
    with pytest.raises(InputError, match="step 1 carries loss"):
        run_here(make_job(tmp_path, small_model, rows))


def test_padding_with_the_end_of_a_text_is_refused(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    from advisor.training import session

    # As the real Phi-3's tokenizer is, without load_tokenizer's change.
    monkeypatch.setattr(session, "load_tokenizer", lambda path, **_: AutoTokenizer.from_pretrained(path))
    with pytest.raises(InputError, match="ends a text"):
        run_here(make_job(tmp_path, small_model, rows))


def test_4_bit_weights_that_would_compute_in_fp32_are_refused(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match="upcast_frozen"):
        run_here(make_job(tmp_path / "a", small_model, rows, "qlora", dtype="bfloat16", upcast_frozen=True))
    from transformers import BitsAndBytesConfig

    from advisor.training import build

    monkeypatch.setattr(build, "_bitsandbytes_config", lambda _: BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(PlanError, match="not in bfloat16"):
        run_here(make_job(tmp_path / "b", small_model, rows, "qlora", dtype="bfloat16"))


def test_float16_autocast_on_the_cpu_is_refused(small_model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="autocast"):
        run_here(make_job(tmp_path, small_model, rows, "full", dtype="float32", autocast="float16"))


def test_random_weights_train_without_any_file_of_weights(small_model: Path, rows: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in small_model.iterdir():
        if "safetensors" not in path.name:
            (model / path.name).write_bytes(path.read_bytes())
    for method in ("full", "lora", "qlora"):
        job = make_job(tmp_path / method, model, rows, method, training={"max_steps": 1}, job={"random_weights": True})
        assert run_here(job)["step"] == 1


def test_an_adapter_checkpoint_is_an_adapter_that_peft_loads(small_model: Path, rows: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    run_here(make_job(tmp_path, small_model, rows, training={"max_steps": 1}))
    base = AutoModelForCausalLM.from_pretrained(small_model)
    PeftModel.from_pretrained(base, tmp_path / "checkpoints" / "checkpoint-1")


def test_manifest_holds_the_plan(small_model: Path, rows: Path, tmp_path: Path) -> None:
    job: Job = make_job(tmp_path, small_model, rows, training={"max_steps": 1})
    run_here(job)
    manifest = json.loads((tmp_path / "checkpoints" / "checkpoint-1" / "manifest.json").read_text())
    assert manifest["facts"]["plan"]["micro_batch"] == 2


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("default")  # dynamo makes warnings while it looks at the libraries' code
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_compiled_layers_train_as_the_others(method: str, small_model: Path, rows: Path, tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        training = {"max_steps": 3, "compile": compiled, "learning_rate": 1e-2}
        fields = {"dtype": "float32", "training": training}
        if method != "full":
            fields["lora"] = {"rank": 8}
        run_here(make_job(folder, small_model, rows, method, **fields))
        found.append([loss for _, loss, _ in losses(folder)])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_asked_to_stop_in_an_evaluation_it_saves_and_goes_on_to_the_end(
    small_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from advisor.training.interruption import Interruption
    from advisor.training.session import Session
    from advisor.training.trainer import PlanTrainer

    interruption = Interruption(lambda _: None)
    evaluate = PlanTrainer.prediction_step

    def stop(*args: Any, **kwargs: Any) -> Any:
        interruption.number = 15
        return evaluate(*args, **kwargs)

    job = make_job(tmp_path, small_model, rows, training={"max_steps": 2}, job={"save_steps": 99})
    with monkeypatch.context() as patched:
        patched.setattr(PlanTrainer, "prediction_step", stop)
        session = Session(job, interruption)
        session.run()
    assert session.facts()["evaluation_loss"] is None
    assert [one.step for one in complete_checkpoints(tmp_path / "checkpoints")] == [2]
    assert not (tmp_path / "adapter_config.json").exists()
    facts = run_here(replace(job, resume=True))
    assert facts["evaluation_loss"] is not None
    assert (tmp_path / "adapter_config.json").exists()
    assert [step for step, _, _ in losses(tmp_path)] == [1, 2]
    # Its figures are those of the whole run, and what it leaves is what was trained before it was stopped.
    assert (facts["step"], facts["first_loss"]) == (2, losses(tmp_path)[0][1])
    assert facts["tokens"] > 0
    adapters = [load_file(path) for path in sorted(tmp_path.rglob("adapter_model.safetensors"))]
    assert len(adapters) == 2
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
