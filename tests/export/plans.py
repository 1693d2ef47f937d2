"""Plans that between them reach every branch of an export."""

from __future__ import annotations

from dataclasses import replace

from advisor.plan import Hyperparameters, LoraSettings, Plan, Quantization

_FULL = Plan(model="phi-3-mini-4k", method="full", gpu="a100-80gb")
_LORA = Plan(
    model="phi-3-mini-4k",
    method="lora",
    autocast="bfloat16",
    lora=LoraSettings(),
    micro_batch=4,
    gradient_accumulation=4,
    padding="longest",
    loss="chunked",
    gpu="rtx-4090",
)
_QLORA = replace(_LORA, method="qlora", quantization=Quantization(), gpu="t4")

PLANS: dict[str, Plan] = {
    "full in bfloat16": _FULL,
    "full in fp32 under fp16": replace(_FULL, dtype="float32", autocast="float16", optimizer="paged_adamw_8bit"),
    "full in fp32 under bfloat16": replace(_FULL, dtype="float32", autocast="bfloat16", attention="eager"),
    "full in fp32": replace(_FULL, dtype="float32", optimizer="paged_adamw_32bit", gpu=None),
    "full in bfloat16 under autocast": replace(_FULL, autocast="bfloat16", attention="flash_attention_2"),
    "full, stepped in backward": replace(_FULL, optimizer_in_backward=True, loss="chunked", optimizer="adamw_8bit"),
    "lora": _LORA,
    "lora in fp16": replace(_LORA, dtype="float16", autocast="float16", gradient_checkpointing=False),
    "lora in fp16 without autocast": replace(_LORA, dtype="float16", autocast="none", hold_outputs=True),
    "lora in fp32": replace(_LORA, dtype="float32", autocast="none", optimizer="adamw_bnb_8bit"),
    "lora, packed": replace(_LORA, packing=True, padding="none", loss="standard", model="phi-4-mini"),
    "lora on one module": replace(_LORA, lora=LoraSettings(rank=8, alpha=32, dropout=0.1, target_modules=("o_proj",))),
    "lora on two modules": replace(_LORA, lora=LoraSettings(target_modules=("qkv_proj", "o_proj"))),
    "lora by pattern": replace(_LORA, lora=LoraSettings(target_modules=r".*\.qkv_proj"), model="acme/model-7b"),
    "qlora": _QLORA,
    "qlora in fp16": replace(_QLORA, dtype="float16", autocast="float16"),
    "qlora, upcast": replace(_QLORA, upcast_frozen=True, quantization=Quantization(type="fp4", double=False)),
    "every hyperparameter": replace(
        _QLORA,
        training=Hyperparameters(
            learning_rate=2e-5,
            schedule="constant_with_warmup",
            warmup=0.0,
            weight_decay=0.01,
            epochs=3.0,
            max_steps=500,
            validation=0.0,
            seed=7,
            compile=True,
        ),
    ),
}
