"""The shipped data, a small model, the CPU: each method lowers the loss, and what it leaves loads and generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_model import make_small_model
from training_runs import losses, make_job, run_here

DATA = Path(__file__).parents[2] / "profiles" / "datasets" / "phi3-advise-qa.jsonl"

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"training": {"learning_rate": 2e-3, "max_steps": 40}},
    "lora": {"lora": {"rank": 16, "alpha": 32}, "training": {"learning_rate": 5e-3, "max_steps": 50}},
    "qlora": {"lora": {"rank": 16, "alpha": 32}, "training": {"learning_rate": 5e-3, "max_steps": 50}},
}
"""Learning rates of a model with random weights, which has far to go in few steps."""

ENOUGH = 0.7
"""That of the issue: the loss falls by at least 30 %."""


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that adapters of rank 16 over random weights can move 32,064 logits."""
    return make_small_model(tmp_path_factory.mktemp("model") / "wide-phi3", hidden=256)


@pytest.mark.parametrize("method", SETTINGS)
def test_the_loss_falls_and_what_is_left_generates(method: str, wide_model: Path, tmp_path: Path) -> None:
    settings = {"micro_batch": 8, "gradient_accumulation": 1, "seq_len": 64, **SETTINGS[method]}
    job = make_job(tmp_path, wide_model, DATA, method, **settings)
    facts = run_here(job)
    first, last = losses(tmp_path)[0][1], [loss for _, loss, _ in losses(tmp_path)[-5:]]
    assert facts["step"] == job.plan.training.max_steps
    assert sum(last) / len(last) < ENOUGH * first
    assert facts["evaluation_loss"] < ENOUGH * first
    assert len(generated(method, wide_model, tmp_path)) == 8


def generated(method: str, base: Path, run: Path) -> Any:
    """Tokens that the trained model adds to a prompt."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run)
    model = AutoModelForCausalLM.from_pretrained(run if method == "full" else base)
    if method != "full":
        model = PeftModel.from_pretrained(model, run)
    turns = [{"role": "user", "content": "Why does it not fit?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    return output[0, prompt["input_ids"].shape[1] :].tolist()
