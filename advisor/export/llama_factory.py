"""A plan for LLaMA-Factory.

Source: llamafactory/hparams/, model/adapter.py, model/patcher.py and model/model_utils/ of the release below.
"""

from __future__ import annotations

from advisor.export.draft import DATA_FILE, Draft, model_reference
from advisor.export.trainer_arguments import set_batches, set_optimizer, set_schedule, tell_gpu, tell_padding
from advisor.plan import Attention, Plan

CHECKED_AGAINST = "LLaMA-Factory 0.9.5"
COMMANDS = ("llamafactory-cli train {file}",)

_ATTENTION: dict[Attention, str] = {"eager": "disabled", "sdpa": "sdpa", "flash_attention_2": "fa2"}

_TEMPLATES = (("phi-3-small", "phi_small"), ("phi-3", "phi"), ("phi-4-mini", "phi4_mini"), ("phi-4", "phi4"))
"""Starts of profile names, and the template of each (llamafactory/extras/constants.py)."""

_DATASET_INFO = (
    f'{{"train": {{"file_name": "{DATA_FILE}", "formatting": "sharegpt", "columns": {{"messages": "messages"}}, '
    '"tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}}}'
)


def describe(plan: Plan, draft: Draft) -> None:
    """Fills the draft in the order of a reader's questions: what, how, on what data."""
    draft.set("stage", "sft")
    draft.set("do_train", True)
    draft.set("model_name_or_path", model_reference(plan.model), "model")
    draft.set("finetuning_type", "full" if plan.method == "full" else "lora", "method")
    _describe_adapters(plan, draft)
    _describe_precision(plan, draft)
    draft.set("flash_attn", _ATTENTION[plan.attention], "attention")
    set_optimizer(plan, draft)
    set_batches(plan, draft)
    _describe_memory(plan, draft)
    set_schedule(plan, draft)
    _describe_data(plan, draft)
    draft.set("output_dir", "llama-factory-run")
    draft.set("report_to", "none")
    tell_gpu(plan, draft)


def _describe_adapters(plan: Plan, draft: Draft) -> None:
    if plan.quantization is not None:
        draft.set("quantization_method", "bnb")
        draft.set("quantization_bit", plan.quantization.bits, "quantization.bits")
        draft.set("quantization_type", plan.quantization.type, "quantization.type")
        draft.set("double_quantization", plan.quantization.double, "quantization.double")
    draft.set("upcast_layernorm", plan.upcast_frozen, "upcast_frozen")
    if plan.upcast_frozen:
        draft.lose("upcast_frozen", "it upcasts the norms only: less memory than planned", upcast_frozen=False)
    if plan.lora is None:
        return
    draft.set("lora_rank", plan.lora.rank, "lora.rank")
    draft.set("lora_alpha", plan.lora.alpha, "lora.alpha")
    draft.set("lora_dropout", plan.lora.dropout, "lora.dropout")
    targets = plan.lora.target_modules
    if isinstance(targets, str) and targets != "all-linear":
        targets = _names(plan)
        if not targets:
            draft.lose("lora.target_modules", "it takes names and no pattern: name the modules, or this will fail")
    names = "all" if targets == "all-linear" else ",".join(targets or (str(plan.lora.target_modules),))
    draft.set("lora_target", names, "lora.target_modules")


def _names(plan: Plan) -> tuple[str, ...]:
    """The modules that a pattern matches in every layer; none where the model is not known, or not every layer does."""
    from advisor.errors import AdvisorError
    from advisor.memory.lora import adapted_names
    from advisor.profiles import load_model

    try:
        return tuple(sorted(adapted_names(plan, load_model(plan.model).architecture)))
    except AdvisorError:
        return ()


def _describe_precision(plan: Plan, draft: Draft) -> None:
    """Frozen weights take the dtype of autocast; trained ones are fp32, except under pure_bf16."""
    pure = plan.dtype == "bfloat16" and (plan.autocast == "none" or plan.method == "full")
    half = plan.autocast == "float16" or (plan.dtype == "float16" and plan.autocast == "none")
    draft.set("pure_bf16", pure, "dtype", "autocast", note="bfloat16 weights, no autocast")
    draft.set("bf16", plan.autocast == "bfloat16" and not pure, "dtype", "autocast")
    draft.set("fp16", half, "dtype", "autocast")
    if pure and plan.autocast == "bfloat16":
        draft.lose("autocast", "with autocast it would store fp32 weights, so this goes without", autocast="none")
    if plan.dtype == "float16" and plan.autocast == "none":
        draft.lose("autocast", "it computes float16 weights under autocast always", autocast="float16")
    if plan.method != "full" and plan.dtype == "float32":
        stored = "float16" if plan.autocast == "float16" else "bfloat16"
        draft.lose("dtype", "it stores frozen weights in 16 bits: less memory than planned", dtype=stored)


def _describe_memory(plan: Plan, draft: Draft) -> None:
    draft.set("disable_gradient_checkpointing", not plan.gradient_checkpointing, "gradient_checkpointing")
    draft.set("use_reentrant_gc", False)
    if plan.loss == "chunked":
        draft.lose("loss", "it makes all logits at once: more memory than planned", loss="standard")
    else:
        draft.keep("loss", "it makes all logits at once")


def _describe_data(plan: Plan, draft: Draft) -> None:
    template = next((template for start, template in _TEMPLATES if plan.model.startswith(start)), None)
    if template is not None:
        draft.set("template", template)
    else:
        draft.set("template", "default", note="name your model's: LLaMA-Factory's README lists them")
    draft.set("cutoff_len", plan.seq_len, "seq_len")
    draft.set("packing", plan.packing, "packing")
    draft.set("neat_packing", plan.packing, "packing", note="samples in a row do not see each other")
    tell_padding(plan, draft)
    draft.set("dataset_dir", ".", note=f"needs a dataset_info.json there: {_DATASET_INFO}")
    draft.set("dataset", "train", note="yours; a plan names no data")
    share = plan.training.validation
    draft.set("val_size", share, "training.validation")
    draft.set("eval_strategy", "epoch" if share else "no")
