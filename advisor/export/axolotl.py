"""A plan for axolotl.

Source: axolotl/utils/schemas/, loaders/model.py, utils/config/__init__.py and core/builders/base.py of the release
below.
"""

from __future__ import annotations

from advisor.export.draft import DATA_FILE, Draft, model_reference
from advisor.export.trainer_arguments import learning_rate, tell_gpu, tell_padding, tell_stepping
from advisor.plan import Plan

CHECKED_AGAINST = "axolotl 0.19.0"
COMMANDS = ("axolotl train {file}",)

_FUSED = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


def describe(plan: Plan, draft: Draft) -> None:
    """Fills the draft in the order of a reader's questions: what, how, on what data."""
    draft.set("base_model", model_reference(plan.model), "model")
    _describe_precision(plan, draft)
    draft.set("attn_implementation", plan.attention, "attention")
    _describe_adapters(plan, draft)
    _describe_step(plan, draft)
    _describe_schedule(plan, draft)
    _describe_data(plan, draft)
    draft.set("output_dir", "axolotl-run")
    tell_gpu(plan, draft)


def _describe_precision(plan: Plan, draft: Draft) -> None:
    """One switch decides both the dtype of the weights and autocast."""
    computed = plan.autocast if plan.autocast != "none" else plan.dtype
    draft.set("bf16", computed == "bfloat16", "dtype", "autocast", note="weights and autocast")
    draft.set("fp16", computed == "float16", "dtype", "autocast", note="weights and autocast")
    if plan.dtype == "float32" and plan.autocast == "float16" and plan.method == "full":
        said = "it stores float16 weights under fp16, and the gradient scaler refuses to train those: this will fail"
        draft.lose("dtype", said, dtype="float16")
    elif plan.dtype == "float32" and plan.autocast != "none":
        said = f"it stores {plan.autocast} weights under autocast: less memory than planned"
        draft.lose("dtype", said, dtype=plan.autocast)
    if plan.dtype != "float32" and plan.autocast == "none":
        draft.lose("autocast", "it computes 16-bit weights under autocast always", autocast=plan.dtype)
    if plan.method == "full" and plan.dtype != "float32" and plan.attention != "flash_attention_2":
        said = f"it keeps norms, embedding and head in fp32 with {plan.attention}: more memory than planned"
        draft.lose("dtype", said)


def _describe_adapters(plan: Plan, draft: Draft) -> None:
    if plan.upcast_frozen:
        said = "it turns what it upcast back into 16 bits: less memory than planned"
        draft.lose("upcast_frozen", said, upcast_frozen=False)
    else:
        draft.keep("upcast_frozen", "what is upcast on the way is 16-bit again when training starts")
    if plan.lora is None:
        draft.keep("method", "without an adapter every weight is trained")
        return
    draft.set("adapter", plan.method, "method")
    if plan.quantization is not None:
        draft.set("load_in_4bit", True, "quantization.bits")
        stored = {
            "bnb_4bit_quant_type": plan.quantization.type,
            "bnb_4bit_use_double_quant": plan.quantization.double,
        }
        draft.set("bnb_config_kwargs", stored, "quantization.type", "quantization.double")
    draft.set("lora_r", plan.lora.rank, "lora.rank")
    draft.set("lora_alpha", plan.lora.alpha, "lora.alpha")
    draft.set("lora_dropout", plan.lora.dropout, "lora.dropout")
    targets = plan.lora.target_modules
    if targets == "all-linear":
        draft.set("lora_target_linear", True, "lora.target_modules")
    else:
        names = targets if isinstance(targets, str) else list(targets)
        draft.set("lora_target_modules", names, "lora.target_modules")
    for name in _FUSED:
        draft.set(name, False, note="switched on by themselves, they keep other tensors than were counted")


def _describe_step(plan: Plan, draft: Draft) -> None:
    draft.set("optimizer", plan.optimizer, "optimizer")
    if plan.method == "full" and "8bit" in plan.optimizer:
        draft.lose("optimizer", "Trainer keeps the states of embeddings in 32 bits: 6 bytes a weight more than planned")
    draft.set("micro_batch_size", plan.micro_batch, "micro_batch")
    draft.set("gradient_accumulation_steps", plan.gradient_accumulation, "gradient_accumulation")
    draft.set("gradient_checkpointing", plan.gradient_checkpointing, "gradient_checkpointing")
    if plan.gradient_checkpointing:
        draft.set("gradient_checkpointing_kwargs", {"use_reentrant": False})
    draft.set("chunked_cross_entropy", plan.loss == "chunked", "loss")
    if plan.loss == "chunked":
        said = "it computes the loss in chunks, but makes all logits at once before: more memory than planned"
        draft.lose("loss", said, loss="standard")
    tell_stepping(plan, draft)


def _describe_schedule(plan: Plan, draft: Draft) -> None:
    training = plan.training
    draft.set("learning_rate", learning_rate(plan), "training.learning_rate")
    draft.set("lr_scheduler", training.schedule, "training.schedule")
    draft.set("warmup_ratio", training.warmup, "training.warmup")
    draft.set("weight_decay", training.weight_decay, "training.weight_decay")
    draft.set("num_epochs", training.epochs, "training.epochs")
    if training.max_steps is None:
        draft.keep("training.max_steps", "the epochs decide")
    else:
        draft.set("max_steps", training.max_steps, "training.max_steps")
    draft.set("seed", training.seed, "training.seed")
    draft.set("torch_compile", training.compile, "training.compile")


def _describe_data(plan: Plan, draft: Draft) -> None:
    draft.set("sequence_len", plan.seq_len, "seq_len")
    draft.set("sample_packing", plan.packing, "packing")
    if plan.packing:
        draft.set("pad_to_sequence_len", True)
    tell_padding(plan, draft)
    data = {"path": DATA_FILE, "ds_type": "json", "type": "chat_template"}
    draft.set("datasets", [data], note="yours; a plan names no data")
    draft.set("val_set_size", plan.training.validation, "training.validation")
