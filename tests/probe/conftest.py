"""A model that is small enough to be probed in seconds, and devices to probe it on."""

from __future__ import annotations

from typing import Any

import pytest

from advisor.hardware import Gpu
from advisor.plan import Plan, plan_from_fields
from advisor.probe.measure import Subject
from advisor.profiles import ModelSource
from advisor.units import GIB, MIB

SMALL: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 8}},
    "qlora": {"method": "qlora", "lora": {"rank": 8}, "quantization": {}},
}


def small_plan(method: str = "lora", **fields: Any) -> Plan:
    base = {"model": "small", "micro_batch": 2, "seq_len": 64, "dtype": "float32"}
    return plan_from_fields({**base, **METHODS[method], **fields})


@pytest.fixture
def source() -> ModelSource:
    return ModelSource(name="small", label="small", config=SMALL, origin="small", source="a test")


@pytest.fixture
def cpu() -> Gpu:
    return Gpu(
        name="A processor",
        backend="cpu",
        total_bytes=8 * GIB,
        driver_bytes=8 * GIB,
        free_bytes=6 * GIB,
        detected=True,
        bfloat16=True,
        unified=True,
        context_bytes=512 * MIB,
    )


@pytest.fixture
def h100() -> Gpu:
    from advisor.hardware import what_if
    from advisor.profiles import load_gpu

    gpu = what_if(load_gpu("h100"))
    from dataclasses import replace

    return replace(gpu, detected=True, uuid="GPU-1", index=0, driver="580.1", free_bytes=gpu.total_bytes)


@pytest.fixture
def subject(source: ModelSource, cpu: Gpu) -> Subject:
    return Subject(model=source, gpu=cpu, timeout_seconds=300)
