"""A plan for TRL's `trl sft`: ScriptArguments, SFTConfig, ModelConfig and DatasetMixtureConfig in one file.

Source: trl/scripts/sft.py, trl/trainer/sft_trainer.py, sft_config.py, model_config.py of the release below.
"""

from __future__ import annotations

from advisor.export.draft import DATA_FILE, Draft, model_reference
from advisor.export.trainer_arguments import (
    set_batches,
    set_optimizer,
    set_schedule,
    tell_gpu,
    tell_padding,
)
from advisor.plan import Plan

CHECKED_AGAINST = "TRL 1.16.0"
COMMANDS = ("trl sft --config {file}",)


def describe(plan: Plan, draft: Draft) -> None:
    """Fills the draft in the order of a reader's questions: what, how, on what data."""
    _describe_model(plan, draft)
    _describe_adapters(plan, draft)
    set_optimizer(plan, draft)
    set_batches(plan, draft)
    _describe_memory(plan, draft)
    set_schedule(plan, draft)
    _describe_data(plan, draft)
    draft.set("output_dir", "trl-run")
    draft.set("report_to", "none")
    tell_gpu(plan, draft)


def _describe_model(plan: Plan, draft: Draft) -> None:
    draft.set("model_name_or_path", model_reference(plan.model), "model")
    draft.set("dtype", plan.dtype, "dtype", note="also what 4-bit weights compute in" if plan.quantization else "")
    draft.set("bf16", plan.autocast == "bfloat16", "autocast", note="SFTConfig would switch it on by itself")
    draft.set("fp16", plan.autocast == "float16", "autocast")
    draft.set("attn_implementation", plan.attention, "attention")
    if plan.quantization is not None:
        draft.set("load_in_4bit", True, "quantization.bits")
        draft.set("bnb_4bit_quant_type", plan.quantization.type, "quantization.type")
        draft.set("use_bnb_nested_quant", plan.quantization.double, "quantization.double")
    if plan.upcast_frozen:
        said = "it does not call prepare_model_for_kbit_training: less memory than planned"
        draft.lose("upcast_frozen", said, upcast_frozen=False)
    else:
        draft.keep("upcast_frozen", "it does not call prepare_model_for_kbit_training")


def _describe_adapters(plan: Plan, draft: Draft) -> None:
    draft.set("use_peft", plan.lora is not None, "method")
    if plan.lora is None:
        return
    draft.set("lora_r", plan.lora.rank, "lora.rank")
    draft.set("lora_alpha", plan.lora.alpha, "lora.alpha")
    draft.set("lora_dropout", plan.lora.dropout, "lora.dropout")
    draft.set("lora_target_modules", _targets(plan.lora.target_modules), "lora.target_modules")
    if plan.quantization is not None:
        said = "it stores the adapters of a quantised model in bfloat16, not fp32: less memory, coarser updates"
        if plan.autocast == "float16":
            said += "; under fp16's gradient scaler torch may refuse bfloat16 gradients: try one step first"
        draft.lose("lora", said)


def _targets(targets: str | tuple[str, ...]) -> list[str]:
    """TRL hands PEFT a list of one as a plain text, which PEFT reads as a pattern for the whole name."""
    if isinstance(targets, str):
        return [targets]
    return [rf"(?:.*\.)?{targets[0]}"] if len(targets) == 1 else list(targets)


def _describe_memory(plan: Plan, draft: Draft) -> None:
    draft.set("gradient_checkpointing", plan.gradient_checkpointing, "gradient_checkpointing")
    if plan.gradient_checkpointing:
        draft.set("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if plan.loss == "chunked":
        draft.keep("loss", "its head and loss always run in chunks")
    else:
        draft.lose("loss", "its head and loss always run in chunks: less memory than planned", loss="chunked")


def _describe_data(plan: Plan, draft: Draft) -> None:
    share = plan.training.validation
    draft.set("max_length", plan.seq_len, "seq_len")
    draft.set("packing", plan.packing, "packing")
    if plan.packing and plan.micro_batch > 1 and plan.attention != "flash_attention_2":
        said = "it lays a micro-batch's rows end to end, and masks all tokens against all: more memory than planned"
        draft.lose("packing", said, micro_batch=1, seq_len=plan.micro_batch * plan.seq_len)
    tell_padding(plan, draft)
    draft.set("datasets", [{"path": "json", "data_files": DATA_FILE}], note="yours; a plan names no data")
    if share:
        draft.set("test_split_size", share, "training.validation")
    else:
        draft.keep("training.validation", "nothing is held out")
    draft.set("eval_strategy", "epoch" if share else "no")
