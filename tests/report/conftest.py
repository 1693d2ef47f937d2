"""Real traces of a small model, made once."""

from __future__ import annotations

import pytest

from advisor.advise import Advice, advise
from advisor.hardware import what_if
from advisor.memory.trace import Trace, trace
from advisor.plan import LoraSettings, Plan
from advisor.profiles import ModelSource, profile_of
from advisor.traced import TracedPlan, trace_plan
from advisor.units import GIB

ARCHITECTURE = {
    "model_type": "phi3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Large enough for the allocator's large pool: its logits take 8 MiB."""


@pytest.fixture(scope="session")
def small_trace() -> Trace:
    plan = Plan(model="small", method="lora", lora=LoraSettings(rank=8), micro_batch=2, seq_len=256)
    return trace(plan, ARCHITECTURE)


@pytest.fixture(scope="session")
def small_source() -> ModelSource:
    return ModelSource(name="small", label="small", config=ARCHITECTURE, origin="small", source="tests")


@pytest.fixture(scope="session")
def small_advice(small_source: ModelSource) -> Advice:
    """On a GPU that has room for it, and others on it."""
    return advise(profile_of(small_source), what_if(vram_bytes=2 * GIB, free_bytes=GIB + GIB // 2))


@pytest.fixture(scope="session")
def small_step(small_advice: Advice, small_source: ModelSource) -> TracedPlan:
    return trace_plan(small_advice.choice.plan, small_source, small_advice.gpu)
