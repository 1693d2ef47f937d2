"""The advice: what fits where, what is recommended and why, and that what it tells a person to do works."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from advisor.advise import Advice, Request, advise, base_plan, longest_that_fits, recommend, to_spare, usable_attentions
from advisor.cli import cli
from advisor.errors import InputError, PlanError
from advisor.hardware import Gpu, Host, what_if
from advisor.plan import METHODS
from advisor.profiles import load_gpu, load_model, load_plan, model_names
from advisor.search import any_fits, smallest_plan
from advisor.units import GIB

MINI = load_model("phi-3-mini-4k")


def gpu_named(name: str) -> Gpu:
    return what_if(load_gpu(name))


def advice_for(gpu: str | Gpu, *, model: str = "phi-3-mini-4k", **request: Any) -> Advice:
    return advise(load_model(model), gpu_named(gpu) if isinstance(gpu, str) else gpu, Request(**request))


def fitting(advice: Advice) -> set[str]:
    return {part.method for part in advice.methods if part.fits}


def test_on_a_t4_lora_and_qlora_fit_and_lora_is_recommended() -> None:
    advice = advice_for("t4", seq_len=2048)
    assert fitting(advice) == {"lora", "qlora"}
    assert advice.recommended == "lora"
    assert "full fine-tuning does not fit" in advice.reason


@pytest.mark.parametrize("gpu", ["a100-80gb", "h100"])
def test_on_an_80_gb_card_full_bfloat16_fits_and_is_recommended(gpu: str) -> None:
    advice = advice_for(gpu)
    full = advice.of("full")
    assert full.fits
    assert (full.plan.dtype, full.plan.autocast) == ("bfloat16", "none")
    assert advice.recommended == "full"
    assert advice.unlock == ""


@pytest.mark.parametrize("gpu", [gpu_named("rtx-4060-8gb"), what_if(vram_bytes=8 * GIB)], ids=["card", "amount"])
def test_on_8_gib_qlora_is_the_one_that_fits(gpu: Gpu) -> None:
    advice = advice_for(gpu)
    assert fitting(advice) == {"qlora"}
    assert advice.recommended == "qlora"


def test_a_gpu_without_bfloat16_gets_fp16_and_fp32_where_weights_train() -> None:
    advice = advice_for("t4")
    assert {part.method: (part.plan.dtype, part.plan.autocast) for part in advice.methods} == {
        "full": ("float32", "float16"),
        "lora": ("float16", "float16"),
        "qlora": ("float16", "float16"),
    }
    assert any("no bfloat16" in warning for warning in advice.warnings)


def test_preferences_change_the_rule() -> None:
    chosen = {prefer: advice_for("a100-40gb", prefer=prefer) for prefer in ("quality", "balanced", "speed", "memory")}
    assert all(fitting(advice) == set(METHODS) for advice in chosen.values())
    assert chosen["quality"].recommended == "full"
    assert chosen["memory"].recommended == "qlora"
    speeds = {part.method: part.speed.tokens_per_second for part in chosen["speed"].methods if part.speed}
    assert chosen["speed"].recommended == max(speeds, key=speeds.__getitem__)


def test_full_without_memory_to_spare_yields_to_lora_unless_quality_comes_first() -> None:
    gpu = gpu_named("rtx-4090")
    advice = advice_for(gpu)
    assert advice.of("full").fits
    assert advice.recommended == "lora"
    assert "paged optimizer states, which fill the rest" in advice.reason
    assert "--prefer quality" in advice.unlock
    assert advice_for(gpu, prefer="quality").recommended == "full"


def test_full_that_steps_in_backward_says_what_that_costs_and_is_never_memory_to_spare() -> None:
    gpu = gpu_named("rtx-4080")
    advice = advice_for(gpu)
    full = advice.of("full")
    assert full.fits
    assert full.plan.optimizer_in_backward
    assert full.plan.gradient_accumulation == 1
    assert full.plan.micro_batch < 16
    cost = f"gradients are not clipped, and the effective batch becomes {full.plan.micro_batch} in place of 16"
    assert cost in full.reason
    assert any("optimizer in backward" in warning and cost in warning for warning in advice.warnings)
    assert "only by stepping in backward" in advice.reason
    assert advice.recommended == "lora"
    assert advice.unlock.endswith(f"--prefer quality takes it, but {cost}")
    roomy = replace(full, fit=replace(full.fit, total_bytes=10 * full.fit.total_bytes))
    assert roomy.fits
    assert not to_spare(replace(roomy, plan=replace(roomy.plan, optimizer="adamw_bnb_8bit")))
    quality = advice_for(gpu, prefer="quality")
    assert quality.recommended == "full"
    assert cost in quality.choice.reason
    whole = advice_for(gpu, effective_batch=4).of("full")
    assert whole.plan.micro_batch == 4
    assert "the whole effective batch of 4 is one micro-batch" in whole.reason


@pytest.mark.parametrize("gpu", ["rtx-4090", "a100-80gb", "t4", "rtx-4060-8gb"])
def test_where_an_ordinary_plan_fits_or_none_can_nothing_steps_in_backward(gpu: str) -> None:
    assert not any(part.plan.optimizer_in_backward for part in advice_for(gpu).methods)


def test_preferring_memory_takes_each_methods_smallest_plan() -> None:
    gpu = gpu_named("t4")
    frugal, fast = advice_for(gpu, prefer="memory"), advice_for(gpu)
    for method in METHODS:
        base = base_plan(method, MINI, gpu, Request())
        least = smallest_plan(base, MINI.architecture, gpu).fit.needed_bytes
        assert frugal.of(method).fit.needed_bytes == least <= fast.of(method).fit.needed_bytes
    assert frugal.of("lora").fit.needed_bytes < fast.of("lora").fit.needed_bytes


@pytest.mark.parametrize("effective_batch", [1, 12, 16, 7])
@pytest.mark.parametrize("gpu", ["t4", "h100"])
def test_the_effective_batch_and_the_length_are_kept(gpu: str, effective_batch: int) -> None:
    advice = advice_for(gpu, effective_batch=effective_batch, seq_len=1000)
    assert {(part.plan.effective_batch, part.plan.seq_len) for part in advice.methods} == {(effective_batch, 1000)}


def test_what_was_asked_of_the_adapters_is_in_the_plans() -> None:
    advice = advice_for("t4", lora_rank=64, target_modules=("o_proj", "qkv_proj"))
    for method in ("lora", "qlora"):
        lora = advice.of(method).plan.lora
        assert lora is not None
        assert (lora.rank, lora.target_modules) == (64, ("o_proj", "qkv_proj"))
    assert advice.of("full").plan.lora is None


def test_a_plan_is_the_worst_batch_that_the_request_can_meet() -> None:
    assert {part.plan.padding for part in advice_for("t4").methods} == {"longest"}


@pytest.mark.parametrize("gpu", ["t4", "a100-80gb", "rtx-4060-8gb"])
def test_fits_means_the_four_claims_are_within_the_total(gpu: str) -> None:
    for part in advice_for(gpu).methods:
        fit = part.fit
        claims = fit.reserved_bytes + fit.context_bytes + fit.others_bytes + fit.margin_bytes
        assert part.fits == (claims <= gpu_named(gpu).total_bytes)
        assert fit.context_bytes == load_gpu(gpu).context_bytes
        assert fit.reserved_bytes == part.memory.reserved_bytes >= part.memory.allocated_bytes
        assert (fit.broken_by is None) == part.fits
        assert ("out of memory by" in part.reason) != part.fits
        assert part.fits or part.memory.at in part.reason


def test_the_claim_that_breaks_it_is_named() -> None:
    gpu = gpu_named("a100-80gb")
    part = advice_for(gpu).of("qlora")
    reserved, context, margin = part.fit.reserved_bytes, part.fit.context_bytes, part.fit.margin_bytes
    broken = {
        "peak reserved": replace(part.fit, total_bytes=reserved - 1),
        "the CUDA context": replace(part.fit, total_bytes=reserved + context - 1),
        "other processes' memory": replace(part.fit, others_bytes=GIB, total_bytes=reserved + context + GIB - 1),
        "the safety margin": replace(part.fit, total_bytes=reserved + context + margin - 1),
    }
    assert {name: fit.broken_by for name, fit in broken.items()} == {name: name for name in broken}
    assert all(not fit.fits and fit.missing_bytes > 0 for fit in broken.values())
    assert replace(part.fit, total_bytes=reserved + context + margin).fits


def test_memory_that_others_hold_counts() -> None:
    free = gpu_named("a100-80gb")
    busy = replace(free, free_bytes=free.total_bytes - 72 * GIB)
    assert fitting(advice_for(free)) == set(METHODS)
    assert fitting(advice_for(busy)) == {"qlora"}


def test_a_gpu_that_would_do_indeed_does_and_no_smaller_one_of_the_ladder() -> None:
    from advisor.profiles import gpu_ladder

    for model, gpu in (("phi-3-mini-4k", "t4"), ("phi-3-mini-4k", "rtx-4060-8gb"), ("phi-4", "rtx-3060-12gb")):
        advice = advice_for(gpu, model=model)
        better = METHODS[METHODS.index(advice.recommended) - 1] if advice.recommended else "qlora"
        named = [profile for profile in gpu_ladder() if profile.product in advice.unlock]
        assert len(named) == 1
        assert "--method" not in advice.unlock  # the others that fit are shown beside it, and one is recommended
        assert fitting(advice_for(named[0].name, model=model)) >= {better}
        total = gpu_named(gpu).total_bytes
        for profile in gpu_ladder():
            if total < profile.usable_bytes < named[0].usable_bytes:
                smaller = advice_for(profile.name, model=model)
                # Stepping in backward is no way out that is offered: it changes what was asked for.
                assert better not in fitting(smaller) or smaller.of(better).plan.optimizer_in_backward


def test_a_shorter_sequence_that_would_do_indeed_does_and_a_longer_one_does_not() -> None:
    advice = advice_for("rtx-4060-8gb", seq_len=16_384)
    assert advice.recommended is None
    shorter = int(re.search(r"--seq-len (\d+)", advice.unlock)[1])  # type: ignore[index]
    assert shorter % 256 == 0
    assert fitting(advice_for("rtx-4060-8gb", seq_len=shorter)) == {"qlora"}
    assert fitting(advice_for("rtx-4060-8gb", seq_len=shorter + 256)) == set()


def test_the_longest_that_fits_is_shorter_than_asked_and_none_where_nothing_helps() -> None:
    gpu = gpu_named("t4")
    for method, seq_len in product(METHODS, (65_536, 49_152, 40_000)):
        base = base_plan(method, MINI, gpu, Request(seq_len=seq_len))
        longest = longest_that_fits(base, MINI, gpu)
        assert (longest is None) == (method == "full")
        assert longest is None or longest < seq_len
        if longest is not None:
            assert any_fits(replace(base, seq_len=longest), MINI.architecture, gpu)
            assert not any_fits(replace(base, seq_len=longest + 256), MINI.architecture, gpu)
    assert longest_that_fits(base_plan("lora", MINI, gpu, Request(seq_len=256)), MINI, gpu) is None


def test_where_nothing_fits_nothing_is_recommended_and_the_nearest_miss_is_shown() -> None:
    advice = advice_for("rtx-4060-8gb", model="phi-4")
    assert advice.recommended is None
    assert fitting(advice) == set()
    assert advice.choice.method == "qlora"
    assert f"{advice.choice.fit.missing_bytes / GIB:.2f} GiB short" in advice.reason


def test_a_method_that_fits_but_was_not_taken_is_offered_with_the_preference_that_takes_it() -> None:
    for gpu in ("a100-40gb", "t4", "rtx-4090", "h200"):
        for prefer in ("balanced", "speed", "memory"):
            advice = advice_for(gpu, prefer=prefer)
            if "--prefer quality takes it" in advice.unlock:
                taken = advice_for(gpu, prefer="quality").recommended
                label = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}[str(taken)]
                assert advice.unlock.startswith(label)


def test_a_method_that_was_asked_for_is_taken_if_it_fits_and_no_other() -> None:
    assert advice_for("t4").recommended == "lora"
    asked = advice_for("t4", method="qlora")
    assert (asked.recommended, asked.choice.method, asked.unlock) == ("qlora", "qlora", "")
    assert "--method qlora" in asked.next_command
    too_much = advice_for("t4", method="full")
    assert (too_much.recommended, too_much.choice.method) == (None, "full")
    assert "was asked for" in too_much.reason
    assert "LoRA (--method lora)" in too_much.unlock
    assert "--method" not in too_much.next_command


def test_packed_rows_are_full_and_have_no_mask() -> None:
    for part in advice_for("a100-40gb", packing=True).methods:
        assert (part.plan.packing, part.plan.padding) == (True, "none")


def test_where_the_gpu_is_here_the_next_command_trains() -> None:
    here = replace(gpu_named("rtx-4090"), detected=True, index=0)
    advice = advise(MINI, here, Request(prefer="memory"))
    assert advice.next_command == "phi3-advise --prefer memory --launch --data train.jsonl"
    assert advice.proof_command == "phi3-advise --prefer memory --trace"
    cannot = replace(MINI, launchable=False, launch_note="no such code")
    assert "--save-plan" in advise(cannot, here).next_command


def test_on_a_processor_nothing_is_paged_to_where_it_already_is() -> None:
    cpu = replace(gpu_named("rtx-4060-8gb"), backend="cpu", profile=None, detected=True)
    advice = advise(MINI, cpu)
    assert not any(part.plan.optimizer.startswith("paged") for part in advice.methods)
    assert not any(part.spilled_bytes for part in advice.methods)


REQUESTS: list[tuple[Gpu, dict[str, Any]]] = [
    (gpu_named("t4"), {}),
    (gpu_named("t4"), {"seq_len": 4096, "effective_batch": 12, "prefer": "memory"}),
    (gpu_named("a100-80gb"), {"prefer": "quality", "effective_batch": 8}),
    (gpu_named("rtx-4090"), {"lora_rank": 64, "target_modules": ("qkv_proj", "o_proj")}),
    (gpu_named("rtx-4060-8gb"), {"seq_len": 16_384}),
    (what_if(vram_bytes=13 * GIB), {"effective_batch": 4}),
    (what_if(load_gpu("t4"), vram_bytes=20 * GIB, free_bytes=13 * GIB), {}),
    (what_if(vram_bytes=3 * GIB), {"seq_len": 8192}),
]


@pytest.mark.parametrize(("gpu", "request_"), REQUESTS)
def test_the_next_command_runs_and_keeps_what_was_asked(
    gpu: Gpu,
    request_: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    advice = advise(MINI, gpu, Request(**request_))
    program, *words = shlex.split(advice.next_command)
    assert program == "phi3-advise"
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--json"], prog_name="phi3-advise")
    assert ended.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    if advice.recommended:
        assert answer["recommended"] == advice.recommended
        assert load_plan(str(tmp_path / "plan.toml")) == advice.choice.plan
    elif "--seq-len" in words:
        assert answer["recommended"] == "qlora"
        assert int(words[words.index("--seq-len") + 1]) < request_["seq_len"]


def test_the_next_command_quotes_a_path_with_a_space(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(MINI.architecture.config)))
    words = shlex.split(advise(load_model(str(folder)), gpu_named("t4")).next_command)
    assert words[words.index("--model") + 1] == str(folder)


def test_a_device_that_is_not_the_first_is_named_in_the_next_command() -> None:
    second = replace(gpu_named("t4"), detected=True, index=1)
    assert "--device 1" in advise(MINI, second).next_command
    assert "--device" not in advise(MINI, replace(second, index=0)).next_command


@pytest.mark.parametrize("model", [name for name in model_names() if "small" in name or "vision" in name])
def test_a_model_that_cannot_be_launched_says_so_and_what_to_take_instead(model: str) -> None:
    warnings = advice_for("a100-80gb", model=model).warnings
    said = [warning for warning in warnings if "cannot be launched" in warning]
    assert len(said) == 1
    assert re.search(r"phi-3(\.5)?-m(ini|edium)", said[0])


@pytest.mark.parametrize("model", ["phi-3-mini-4k", "phi-4-mini"])
def test_a_model_that_can_be_launched_says_nothing_of_it(model: str) -> None:
    assert not any("launched" in warning for warning in advice_for("a100-80gb", model=model).warnings)


def test_images_are_said_to_be_left_out_of_the_count() -> None:
    assert any("Only text" in warning for warning in advice_for("a100-80gb", model="phi-3.5-vision").warnings)


def test_targets_that_match_nothing_are_said_with_the_names_that_exist() -> None:
    notebook = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    advice = advice_for("t4", target_modules=notebook)
    (said,) = [warning for warning in advice.warnings if "match nothing" in warning]
    assert said.startswith("q_proj, k_proj, v_proj, gate_proj, up_proj match nothing")
    assert all(name in said for name in ("qkv_proj", "gate_up_proj", "o_proj", "down_proj"))
    assert advice.of("lora").memory.parameters.trainable == 8_912_896


def test_targets_of_which_none_matches_are_an_error_that_lists_the_names() -> None:
    with pytest.raises(PlanError) as caught:
        advice_for("t4", target_modules=("q_proj", "v_proj"))
    assert caught.value.field == "lora.target_modules"
    assert "qkv_proj" in caught.value.why
    assert caught.value.hint


@pytest.mark.parametrize(("model", "trainable"), [("phi-3-mini-4k", 25_165_824), ("phi-4-mini", 23_068_672)])
def test_adapters_on_every_linear_are_counted_with_fused_projections(model: str, trainable: int) -> None:
    advice = advice_for("a100-80gb", model=model)
    assert advice.of("lora").memory.parameters.trainable == trainable
    assert advice.of("qlora").memory.parameters.trainable == trainable
    total = load_model(model).architecture.parameters
    assert advice.of("full").memory.parameters.trainable == advice.of("full").memory.parameters.total == total


def test_what_is_saved_is_the_model_or_a_small_adapter() -> None:
    advice = advice_for("a100-80gb")
    assert advice.of("full").saved_bytes == 2 * MINI.architecture.parameters
    assert advice.of("lora").saved_bytes == 4 * 25_165_824


def test_a_run_takes_its_tokens_at_the_plans_speed() -> None:
    part = advice_for("t4", tokens=12_000_000).of("lora")
    assert part.speed is not None
    assert part.run_seconds == pytest.approx(12_000_000 / part.speed.tokens_per_second)
    assert advice_for("t4").of("lora").run_seconds is None


def test_a_gpu_without_a_profile_has_no_speed_and_says_so() -> None:
    advice = advice_for(what_if(vram_bytes=80 * GIB))
    assert [part.speed for part in advice.methods] == [None] * 3
    assert any("speed is unknown" in warning for warning in advice.warnings)
    assert advice_for(what_if(vram_bytes=80 * GIB), prefer="speed").recommended is not None


@pytest.mark.parametrize(
    ("seq_len", "said"), [(8192, "was made for 4,096 tokens"), (2047, "sliding window"), (2046, None)]
)
def test_lengths_beyond_what_the_model_was_made_for_are_said(seq_len: int, said: str | None) -> None:
    warnings = " ".join(advice_for("a100-80gb", seq_len=seq_len).warnings)
    assert said in warnings if said else "sliding window" not in warnings


def test_an_assumed_context_is_called_assumed() -> None:
    assert load_gpu("h100").context_provenance == "assumed"
    assert any("assumed" in warning for warning in advice_for("h100").warnings)


def test_paged_states_ask_for_host_ram_and_say_when_it_is_not_there() -> None:
    card = gpu_named("rtx-4090")
    here = replace(card, detected=True)
    spilling = next(
        gpu
        for gpu in (replace(here, total_bytes=size * GIB // 4) for size in range(56, 96))
        if any(part.fits and part.spilled_bytes for part in advise(MINI, gpu).methods)
    )

    def host(available_bytes: int) -> Host:
        return Host(ram_bytes=64 * GIB, ram_available_bytes=available_bytes, disk_free_bytes=None, cpu_count=2)

    short = advise(MINI, spilling, host=host(1 << 20)).warnings
    enough = advise(MINI, spilling, host=host(60 * GIB)).warnings
    unknown = advise(MINI, spilling).warnings
    assert any("paged states of full fine-tuning" in warning and "only 0.00 GiB" in warning for warning in short)
    assert not any("paged states of full fine-tuning" in warning for warning in enough)
    assert any("paged states of full fine-tuning" in warning and "not known" in warning for warning in unknown)


def test_flash_attention_2_is_taken_only_where_it_is_installed_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "flash_attn" else None)
    assert "flash_attention_2" in usable_attentions(replace(gpu_named("rtx-4090"), detected=True))
    assert usable_attentions(gpu_named("rtx-4090")) == ("sdpa",)
    assert usable_attentions(replace(gpu_named("t4"), detected=True)) == ("sdpa",)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert usable_attentions(replace(gpu_named("rtx-4090"), detected=True)) == ("sdpa",)


def test_the_only_method_that_fits_is_recommended_whichever_it_is() -> None:
    parts = advice_for("h100").methods
    for part in parts:
        others = [replace(other, fit=replace(other.fit, total_bytes=0)) for other in parts if other is not part]
        for prefer in ("quality", "balanced", "speed", "memory"):
            assert recommend((part, *others), prefer)[0] == part.method


@pytest.mark.parametrize(
    "request_",
    [
        {"seq_len": 0},
        {"seq_len": -1},
        {"seq_len": 10**9},
        {"seq_len": "2048"},
        {"lora_rank": 0},
        {"lora_rank": 1.5},
        {"target_modules": ()},
        {"target_modules": ("",)},
        {"target_modules": None},
        {"effective_batch": 0},
        {"effective_batch": 2**16 + 1},
        {"effective_batch": "16"},
        {"effective_batch": True},
        {"prefer": "cheap"},
        {"prefer": None},
        {"tokens": 0},
        {"tokens": -5},
        {"tokens": "12M"},
    ],
)
def test_a_request_that_cannot_be_is_refused_with_a_hint(request_: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        advice_for("t4", **request_)
    assert caught.value.hint


def test_a_mixture_of_experts_is_to_be_traced() -> None:
    with pytest.raises(PlanError) as caught:
        advice_for("b200", model="phi-3.5-moe")
    assert caught.value.field == "model"
    assert "trace" in caught.value.hint


@pytest.mark.parametrize(("free_bytes", "said"), [(10 * GIB, False), (GIB, True)])
def test_a_disk_that_cannot_hold_the_trained_model_is_said(free_bytes: int, said: bool) -> None:
    host = Host(ram_bytes=None, ram_available_bytes=None, disk_free_bytes=free_bytes, cpu_count=2)
    advice = advise(MINI, what_if(load_gpu("a100-80gb")), host=host)
    assert any("of disk is free" in warning for warning in advice.warnings) is said
