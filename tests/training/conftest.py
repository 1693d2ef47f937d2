"""Small models that train on the CPU, one for each method."""

from __future__ import annotations

from typing import Any

import pytest

from advisor.plan import Plan, plan_from_fields

SMALL: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
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


def plan(method: str, **fields: Any) -> Plan:
    """A small plan of a method."""
    base = {"model": "small", "micro_batch": 2, "seq_len": 64, "dtype": "float32"}
    return plan_from_fields({**base, **METHODS[method], **fields})


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Each of the three."""
    name: str = request.param
    return name


@pytest.fixture
def architecture() -> dict[str, Any]:
    """The keys of a small config.json."""
    return dict(SMALL)


@pytest.fixture
def make_plan() -> Any:
    """`plan`, for tests that cannot import this file."""
    return plan
