"""What a training leaves: it loads with the libraries' own calls, and is what was in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_model import phi3_tokenizer

from advisor.plan import Plan, plan_from_fields
from advisor.training import artefacts
from advisor.training.artefacts import CardFacts, save_artefacts
from advisor.training.build import enable_checkpointing
from advisor.training.loss import chunk_loss

PROMPT = [{"role": "user", "content": "What is LoRA?"}]
RANK = 8


def make_plan(method: str, **fields: Any) -> Plan:
    base: dict[str, Any] = {"model": "small", "method": method, "seq_len": 64, "loss": "chunked", "autocast": "none"}
    if method != "full":
        base["lora"] = {"rank": RANK}
    if method == "qlora":
        base["quantization"] = {}
    return plan_from_fields({**base, **fields})


def card(base: Path | str, **fields: Any) -> CardFacts:
    facts: dict[str, Any] = {
        "base_model": str(base),
        "data": "/home/somebody/secret/train.jsonl",
        "device": "CPU",
        "steps": 2,
        "first_loss": 3.0,
        "final_loss": 1.5,
        "predicted_reserved_bytes": 3 * 2**30,
        "versions": {"torch": torch.__version__},
    }
    return CardFacts(**{**facts, **fields})


def load_base(plan: Plan, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if plan.quantization is not None:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, plan.dtype),
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, plan.dtype), quantization_config=quantization
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Packed for inference, a 4-bit weight has other rounding, and no gradient.
            module.support_avx512bf16_for_cpu = False
    return model


def train(plan: Plan, folder: Path) -> Any:
    """A model after a few steps, with everything around it that a training puts there."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = load_base(plan, folder)
    model.config.use_cache = False
    if plan.lora is not None:
        model.enable_input_require_grads()
        model = get_peft_model(
            model,
            LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
    chunk_loss(model.get_base_model() if plan.lora else model)
    enable_checkpointing(model.get_base_model() if plan.lora else model)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.randint(3, 1000, (2, 24))
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=plan.autocast != "none"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits_of(model: Any, folder: Path) -> torch.Tensor:
    """Of one prompt; the chunked loss's forward, which gives no logits, is set aside."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    replaced = inner.__dict__.pop("forward", None)
    try:
        with torch.no_grad():
            result: torch.Tensor = model(input_ids=ids).logits.float()
    finally:
        if replaced is not None:
            inner.forward = replaced
    return result


def generate(model: Any, folder: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert made.shape[1] > inputs["input_ids"].shape[1]
    text: str = tokenizer.decode(made[0])
    return text


def front_matter(folder: Path) -> str:
    found = re.match(r"---\n(.*?)\n---\n", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_adapter_loads_over_its_base_with_the_same_logits_and_generates(
    method: str, small_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    plan = make_plan(method)
    model = train(plan, small_model)
    save_artefacts(model, phi3_tokenizer(), str(tmp_path / "run"), plan=plan, card=card(small_model))
    base = load_base(plan, small_model)
    before = logits_of(base, tmp_path / "run")
    loaded = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    assert torch.equal(logits_of(loaded, tmp_path / "run"), logits_of(model, tmp_path / "run"))
    assert not torch.allclose(logits_of(loaded, tmp_path / "run"), before, atol=0.01), "nothing was trained"
    assert "<|user|>" in generate(loaded, tmp_path / "run")


def test_a_full_model_loads_with_the_same_logits_and_generates(small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan = make_plan("full")
    model = train(plan, small_model)
    save_artefacts(model, phi3_tokenizer(), str(tmp_path), plan=plan, card=card(small_model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.use_cache is True
    assert torch.equal(logits_of(loaded, tmp_path), logits_of(model, tmp_path))
    generate(loaded, tmp_path)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_wrappers_around_the_model_leave_no_trace(method: str, small_model: Path, tmp_path: Path) -> None:
    """Autocast's forward and torch.compile's module, as a trainer puts them on."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from safetensors.torch import load_file

    plan = make_plan(method)
    model = train(plan, small_model)
    save_artefacts(model, phi3_tokenizer(), str(tmp_path / "plain"), plan=plan, card=card(small_model))
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one, of whatever trained in it before
    wrapped = torch.compile(Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model))
    save_artefacts(wrapped, phi3_tokenizer(), str(tmp_path / "wrapped"), plan=plan, card=card(small_model))
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    plain, found = load_file(tmp_path / "plain" / name), load_file(tmp_path / "wrapped" / name)
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[key], found[key]) for key in plain)


def test_what_is_left_can_be_merged_and_keeps_its_tokenizer(small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from advisor.training.merge import merge_adapter, prepare_merge

    plan = make_plan("lora")
    model = train(plan, small_model)
    save_artefacts(model, phi3_tokenizer(), str(tmp_path), plan=plan, card=card(small_model))
    merged = merge_adapter(prepare_merge(str(tmp_path)))
    assert merged.merge.out == str(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    found, expected = logits_of(loaded, tmp_path / "merged"), logits_of(model, tmp_path)
    # The update is rounded into bfloat16 weights: their relative precision, at the size of these logits.
    assert torch.allclose(found, expected, atol=8 * 2**-8 * expected.abs().max().item())
    assert (found - logits_of(load_base(plan, small_model), tmp_path)).abs().max() > 0.1 * expected.abs().max()
    generate(loaded, tmp_path / "merged")


@pytest.mark.parametrize("autocast", ["none", "bfloat16", "float16"])
def test_fp32_weights_under_autocast_are_saved_in_its_dtype(autocast: str, small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan = make_plan("full", dtype="float32", autocast=autocast)
    model = train(plan, small_model)
    save_artefacts(model, phi3_tokenizer(), str(tmp_path), plan=plan, card=card(small_model))
    expected = "float32" if autocast == "none" else autocast
    assert plan.saved_dtype == expected
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, expected)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the model in memory changed"
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].to(weight.dtype)), name


def test_weights_that_float16_cannot_hold_are_saved_in_fp32(small_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan = make_plan("full", dtype="float32", autocast="float16")
    model = load_base(plan, small_model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 70000.0
    save_artefacts(model, phi3_tokenizer(), str(tmp_path), plan=plan, card=card(small_model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.float32
    assert loaded.lm_head.weight[0, 0] == 70000.0
    assert "in float32" in (tmp_path / "README.md").read_text()


def test_tied_embeddings_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    from small_model import small_config
    from transformers import AutoModelForCausalLM, Phi3Config

    config = {**small_config(), "tie_word_embeddings": True}
    del config["model_type"]
    model = AutoModelForCausalLM.from_config(Phi3Config(**config), dtype=torch.float32)
    plan = make_plan("full", dtype="float32", autocast="bfloat16")
    save_artefacts(model, phi3_tokenizer(), str(tmp_path), plan=plan, card=card("owner/base"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_saved_has_all_its_files_and_no_path_but_the_base_s(
    method: str, small_model: Path, tmp_path: Path
) -> None:
    plan = make_plan(method)
    run = tmp_path / "run"
    model = train(plan, small_model)
    save_artefacts(model, phi3_tokenizer(), str(run), plan=plan, card=card(small_model))
    files = {path.name for path in run.iterdir()}
    weights = {"adapter_model.safetensors", "adapter_config.json"}
    if method == "full":
        weights = {"model.safetensors", "config.json"}
    common = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "README.md"}
    assert files == weights | common
    assert len({path.stat().st_mode for path in run.iterdir()}) == 1, "who may read the weights may read the rest"
    for path in run.iterdir():
        if path.suffix in (".json", ".md", ".jinja"):
            text = path.read_text(encoding="utf-8")
            assert "/home/somebody" not in text
            assert str(tmp_path) not in text
            assert str(small_model) not in text or (
                method == "lora" and path.name in ("adapter_config.json", "README.md")
            )
    if method == "lora":
        assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(small_model)


def test_the_adapter_names_the_hub_id_and_asks_no_hub(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    plan = make_plan("lora", model="phi-3-mini-4k")
    model = train(plan, small_model)
    hub_id = "microsoft/Phi-3-mini-4k-instruct"
    save_artefacts(model, phi3_tokenizer(), str(tmp_path), plan=plan, card=card(hub_id))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == hub_id
    assert f'base_model: "{hub_id}"' in front_matter(tmp_path)


def test_a_save_that_fails_leaves_what_was_there(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan("lora")
    model = train(plan, small_model)
    save_artefacts(model, phi3_tokenizer(), str(tmp_path), plan=plan, card=card(small_model))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefacts, "render_card", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_artefacts(model, phi3_tokenizer(), str(tmp_path), plan=plan, card=card(small_model))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_makes_a_folder_load_is_moved_last(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan("lora")
    model = train(plan, small_model)
    save_artefacts(model, phi3_tokenizer(), str(tmp_path), plan=plan, card=card(small_model))
    moved: list[str] = []
    replace = Path.replace

    def stop_at_the_weights(self: Path, target: Path) -> Path:
        moved.append(self.name)
        if len(moved) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stop_at_the_weights)
    with pytest.raises(KeyboardInterrupt):
        save_artefacts(model, phi3_tokenizer(), str(tmp_path), plan=plan, card=card(small_model))
    assert not (tmp_path / "adapter_config.json").exists(), "half an artefact that looks whole"


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_lines_in_the_card_load_it(
    method: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(method)
    save_artefacts(train(plan, small_model), phi3_tokenizer(), str(tmp_path / "run"), plan=plan, card=card(small_model))
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(code[1].replace("max_new_tokens=100", "max_new_tokens=3"), {})
    assert "<|user|>" in capsys.readouterr().out


def test_the_card_says_what_is_known_and_nothing_else(small_model: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    plan = make_plan("lora")
    save_artefacts(train(plan, small_model), phi3_tokenizer(), str(tmp_path), plan=plan, card=card(small_model))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "peft"
    assert data["datasets"] == ["train"]
    assert "base_model" not in data, "a folder is no name on the hub, and the hub refuses it"
    assert "license" not in data
    assert "not measured on CPU" in text
    assert "| peak reserved, predicted | 3.00 GiB |" in text
    assert "| final loss | 1.5000 |" in text
    assert "evaluation loss" not in text
    plan_text = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert plan_text is not None
    import tomllib

    assert plan_from_fields(tomllib.loads(plan_text[1])) == plan
